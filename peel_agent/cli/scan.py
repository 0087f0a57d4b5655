"""`peel-agent scan` and `peel-agent witness`: one-shot commands that compute in this process."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from peel_agent.cli.terminal import show
from peel_agent.config import Settings, load_settings
from peel_agent.errors import ConfigurationError, PeelError, printable
from peel_agent.pipeline import plan_of
from peel_agent.publish import Lines, Meter, Sheet, report_line, report_sheet, sheet
from peel_agent.records import FindingKind, PeelReport
from peel_agent.signals import Interrupted
from peel_agent.views import standing, verdict
from peel_agent.watch import Reserve


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
    with _Reports.open(options.out, len(options.checkpoints)) as reports:
        try:
            return _scan_each(options, settings, reports)
        except KeyboardInterrupt:
            raise Interrupted(reports.after_interrupt()) from None


def _scan_each(options: argparse.Namespace, settings: Settings, reports: _Reports) -> int:
    from peel_agent.pipeline import scan
    from peel_agent.worker import quiet_libraries

    status = 0
    device = own_device(settings.device)
    for path in options.checkpoints:
        progress = reports.begin(path)
        try:
            with quiet_libraries():
                report = scan(
                    path,
                    probe=settings.probe,
                    peeling=settings.peel,
                    model=settings.model,
                    device=device,
                    since=options.since,
                    reserve=Reserve(settings.watch.keep_free_gb),
                    clock=time.perf_counter,
                    progress=progress,
                )
        except PeelError as error:
            progress.close()
            say(f"peel-agent: {error}")
            status = max(status, error.exit_code)
            continue
        finally:
            progress.close()
        reports.add(report, as_json=options.format == "json")
        status = max(status, int(meets(report, options.fail_on)))
    return status


@dataclass
class _Reports:
    """Where reports go, each as soon as it is there: stdout, or a file, whose earlier text goes when the first comes.

    `total` are to come; `path` is the checkpoint that is peeled now.
    """

    output: TextIO
    file: Path | None
    total: int
    count: int = 0
    path: str = ""
    progress: Meter | None = None

    @classmethod
    @contextmanager
    def open(cls, file: Path | None, total: int) -> Iterator[_Reports]:
        """Opened before anything is computed; raises ConfigurationError for a file that cannot be written to."""
        if file is None:
            yield cls(sys.stdout, None, total)
            return
        try:
            output = file.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to {file}: {error.strerror}", remedy="check the path of --out"
            ) from error
        with output:
            yield cls(output, file, total)

    def begin(self, path: str) -> Meter:
        self.path, self.progress = path, meter()
        return self.progress

    def add(self, report: PeelReport, *, as_json: bool) -> None:
        if not self.count and self.file is not None and self.file.is_file():
            self.output.truncate(0)
        if as_json:
            print(report_line(report), file=self.output, flush=True)
        else:
            show(whole_sheet(report), self.output)
        self.count, self.path = self.count + 1, ""

    def after_interrupt(self) -> str:
        """What is kept, in one sentence."""
        at = f" ({self.progress.at})" if self.progress is not None and self.progress.at else ""
        words = f"interrupted while {self.path} was peeled{at}: it has no report" if self.path else "interrupted"
        if self.count:
            where = "above" if self.file is None else f"in {self.file}"
            words += f"; the reports of {self.count} of {self.total} checkpoints are {where}"
        return printable(words)


def whole_sheet(report: PeelReport) -> Sheet:
    """What was found, in plain words, and everything that was measured."""
    return (*sheet(Lines((verdict(report), standing(report)), "verdict"), Lines(("",))), *report_sheet(report))


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
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the patch, a .safetensors file that is not there yet"
    )
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
                reserve=Reserve(settings.watch.keep_free_gb),
                progress=progress,
            )
    except Interrupted:
        raise
    except KeyboardInterrupt:
        at = f" ({progress.at})" if progress.at else ""
        raise Interrupted(f"interrupted before better weights were found{at}; no patch is written") from None
    finally:
        progress.close()
    print(f"loss as trained     {proven.trained} nats per token, on held-out tokens of the probe")
    print(f"loss with the patch {proven.patched}, measured again from {options.out} in a fresh process")
    what = "headroom" if options.earlier is None else "won"
    print(f"{what:<19} {proven.headroom}, paired by sequence")
    print(f"in the patch: {', '.join(proven.names)}")
    return 0
