"""`peel-agent scan` and `peel-agent witness`: one-shot commands that compute in this process."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

from peel_agent.cli.options import (
    add_common,
    add_model,
    add_probe,
    check_probe,
    common_flags,
    meter,
    own_device,
    probe_flags,
    say,
)
from peel_agent.config import Settings, load_settings
from peel_agent.errors import ConfigurationError, PeelError
from peel_agent.pipeline import plan_of
from peel_agent.records import FindingKind, PeelReport


def add_scan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a checkpoint folder or file, or its s3:// URL")
    add_common(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="json: one report a line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    parser.add_argument("--since", metavar="CKPT", help="an earlier checkpoint of the run, to hold each one against")
    parser.add_argument("--fail-on", choices=tuple(NEEDED), help="exit 1 when a report says so of a block, part or run")
    parser.set_defaults(run=_scan)


def _scan(options: argparse.Namespace) -> int:
    settings = load_settings(options.config, common_flags(options))
    check_probe(settings.probe)
    _check_fail_on(settings, options.fail_on, options.since)
    from peel_agent.pipeline import scan
    from peel_agent.publish import report_line, table
    from peel_agent.worker import quiet_libraries

    form = report_line if options.format == "json" else table
    status = 0
    device = own_device(settings.device)
    with _output(options.out) as output:
        for path in options.checkpoints:
            progress = meter()
            try:
                with quiet_libraries():
                    report = scan(
                        path,
                        probe=settings.probe,
                        peeling=settings.peel,
                        model=settings.model,
                        device=device,
                        since=options.since,
                        clock=time.perf_counter,
                        progress=progress,
                    )
            except PeelError as error:
                say(f"peel-agent: {error}")
                status = max(status, error.exit_code)
                continue
            finally:
                progress.close()
            print(form(report), file=output, flush=True)
            status = max(status, int(meets(report, options.fail_on)))
    return status


def _output(file: Path | None) -> AbstractContextManager[TextIO]:
    """The file, opened before anything is computed, or stdout."""
    if file is None:
        return nullcontext(sys.stdout)
    try:
        return file.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {file}: {error.strerror}", remedy="check the path of --out"
        ) from error


NEEDED = {
    "below": "margin",
    "changed": "margin",
    "regressed": "margin",
    "improvable": "headroom",
    "caution": "bounds",
}
"""What must be computed for each condition of --fail-on."""

FAILING: dict[str, frozenset[FindingKind]] = {
    "below": frozenset({"below", "never_trained", "dead", "dropped", "flooding", "early", "collapsed"}),
    "changed": frozenset({"changed"}),
    "regressed": frozenset({"regressed"}),
}
"""The findings that meet each condition."""


def _check_fail_on(settings: Settings, what: str | None, since: str | None) -> None:
    """A condition on something that is not computed would never be met."""
    if what is None:
        return
    needed = NEEDED[what]
    if needed not in plan_of(settings.peel).quantities:
        raise ConfigurationError(
            f"--fail-on {what} needs {needed}, which this scan does not compute",
            remedy=f"add --quantities {needed}, or take a larger --effort",
        )
    if what in ("changed", "regressed") and since is None:
        raise ConfigurationError(
            f"--fail-on {what} needs an earlier checkpoint to compare with",
            remedy="add --since with an earlier checkpoint of the run",
        )


def meets(report: PeelReport, what: str | None) -> bool:
    """Whether a report meets a condition of --fail-on. What is undecided or was not measured meets none."""
    if what == "below" and report.finding is not None and report.finding.kind == "early":
        return any(layer.status == "below" for layer in report.layers)
    if what == "improvable":
        return any(layer.headroom is not None and layer.headroom.low > 0.0 for layer in report.layers)
    findings = [report.finding, *(layer.finding for layer in report.layers)]
    if what in FAILING:
        return any(finding is not None and finding.kind in FAILING[what] for finding in findings)
    return what is not None and report.zone == what


# ---------------------------------------------------------------- witness


def add_witness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint folder or file, or its s3:// URL")
    add_probe(parser)
    add_model(parser)
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="the block's index, from 0")
    parser.add_argument(
        "--from",
        dest="earlier",
        metavar="CKPT",
        help="an earlier checkpoint of the run, whose block is taken as the better one",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the patch, a .safetensors file")
    parser.set_defaults(run=_witness)


def _witness(options: argparse.Namespace) -> int:
    settings = load_settings(options.config, probe_flags(options))
    check_probe(settings.probe)
    from peel_agent.witness import witness
    from peel_agent.worker import quiet_libraries

    progress = meter()
    try:
        with quiet_libraries():
            proven = witness(
                options.checkpoint,
                layer=options.layer,
                out=options.out,
                probe=settings.probe,
                model=settings.model,
                device=own_device(settings.device),
                clock=time.perf_counter,
                earlier=options.earlier,
                progress=progress,
            )
    finally:
        progress.close()
    print(f"loss as trained     {proven.trained} nats per token, on held-out tokens of the probe")
    print(f"loss with the patch {proven.patched}, measured again from {options.out} in a fresh process")
    what = "headroom" if options.earlier is None else "won"
    print(f"{what:<19} {proven.headroom}, paired by sequence")
    print(f"in the patch: {', '.join(proven.names)}")
    return 0
