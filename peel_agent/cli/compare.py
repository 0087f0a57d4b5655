"""`peel-agent compare`: two checkpoints on one probe, or two runs by their reports."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from peel_agent.cli.options import (
    add_effort,
    add_model,
    add_probe,
    check_probe,
    command_again,
    meter,
    own_device,
    probe_flags,
    say,
)
from peel_agent.cli.report import HistoryPlace, write_whole
from peel_agent.cli.terminal import show
from peel_agent.config import load_settings
from peel_agent.contrast import contrast_runs, difference_verdict, is_worse, newly_below
from peel_agent.errors import ConfigurationError
from peel_agent.publish import Lines, Sheet, difference_line, difference_sheet, plain_text, sheet
from peel_agent.records import DifferenceReport
from peel_agent.rendering import provenance, utc
from peel_agent.signals import Interrupted
from peel_agent.watch import Reserve

DEFAULT_QUANTITIES = {"quick": "margin", "standard": "margin", "full": "margin,headroom"}

DEFAULT_TRACKER = "mlflow"

FAILING = {"worse": is_worse, "below": newly_below}
"""Of --fail-on: what must hold of the comparison."""


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a checkpoint, or a run: as of `scan` and of `report`")
    parser.add_argument("b", metavar="B", help="the other one; every difference is B - A")
    add_probe(parser)
    add_effort(parser)
    parser.add_argument(
        "--quantities", metavar="LIST", help="of margin,headroom (default: margin; both at effort full)"
    )
    add_model(parser)
    parser.add_argument(
        "--format", choices=("table", "json", "html"), default="table", help="json: one line; html: a page in one file"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    parser.add_argument(
        "--fail-on",
        choices=tuple(FAILING),
        help="exit 1 when the loss of B is higher for certain (worse), or a block or part is below in B alone (below)",
    )
    parser.add_argument(
        "--run", dest="run_names", action="append", default=[], metavar="NAME",
        help="which run, where a state holds several; given twice, the first is for A and the second for B",
    )  # fmt: skip
    parser.add_argument(
        "--tracker", default=DEFAULT_TRACKER, metavar="NAME", help=f"whose runs they are (default: {DEFAULT_TRACKER})"
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="where the tracker's runs are")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    if len(options.run_names) > 2:
        raise ConfigurationError(f"--run is given {len(options.run_names)} times", remedy="two runs have two names")
    names = [*options.run_names, None, None] if len(options.run_names) != 1 else options.run_names * 2
    places = [
        HistoryPlace(path, run_name=name, tracker=options.tracker, tracking_uri=options.tracking_uri)
        for path, name in zip((options.a, options.b), names, strict=False)
    ]
    are_runs = [place.is_history() for place in places]
    if any(are_runs) and not all(are_runs):
        run, checkpoint = (options.a, options.b) if are_runs[0] else (options.b, options.a)
        raise ConfigurationError(
            f"{run} is a run and {checkpoint} a checkpoint", remedy="compare two runs, or two checkpoints"
        )
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigurationError(
            f"cannot write {options.out}: its folder is not there", remedy="check the path of --out"
        )
    report = _of_runs(options, places) if all(are_runs) else _of_checkpoints(options)
    _tell(options, report)
    return int(options.fail_on is not None and FAILING[options.fail_on](report))


def _of_runs(options: argparse.Namespace, places: list[HistoryPlace]) -> DifferenceReport:
    a, b = (place.history() for place in places)
    report = contrast_runs(a, b, where=(options.a, options.b))
    settings = load_settings(options.config, probe_flags(options))
    if options.probe is not None:
        from peel_agent.comparing import check_probe_of_runs

        check_probe(settings.probe)
        check_probe_of_runs(settings.probe, report.probe)
    return report


def _of_checkpoints(options: argparse.Namespace) -> DifferenceReport:
    flags = probe_flags(options) | {"peel.effort": options.effort}
    settings = load_settings(options.config, flags)
    quantities = options.quantities or DEFAULT_QUANTITIES[settings.peel.effort]
    settings = load_settings(options.config, flags | {"peel.quantities": quantities})
    check_probe(settings.probe)
    from peel_agent.comparing import compare_checkpoints
    from peel_agent.worker import quiet_libraries

    progress = meter()
    try:
        with quiet_libraries():
            return compare_checkpoints(
                options.a,
                options.b,
                probe=settings.probe,
                peeling=settings.peel,
                model=settings.model,
                device=own_device(settings.device),
                clock=time.perf_counter,
                reserve=Reserve(settings.watch.keep_free_gb),
                progress=progress,
            )
    except KeyboardInterrupt:
        at = f" ({progress.at})" if progress.at else ""
        raise Interrupted(f"interrupted before both were measured{at}: nothing is written") from None
    finally:
        progress.close()


def whole_sheet(report: DifferenceReport) -> Sheet:
    """What differs, in plain words, and every number."""
    return (*sheet(Lines((difference_verdict(report),), "verdict"), Lines(("",))), *difference_sheet(report))


def _tell(options: argparse.Namespace, report: DifferenceReport) -> None:
    if options.format == "table" and options.out is None:
        show(whole_sheet(report), sys.stdout)
        return
    if options.format == "table":
        text = plain_text(whole_sheet(report))
    else:
        text = difference_line(report) if options.format == "json" else _page(options, report)
    if options.out is None:
        print(text, flush=True)
        return
    write_whole(options.out, f"{text}\n".encode())
    say(f"{options.out} is written")


def _page(options: argparse.Namespace, report: DifferenceReport) -> str:
    from peel_agent.views import difference_page

    return difference_page(report, difference_verdict(report), provenance(_command(options), utc()))


def _command(options: argparse.Namespace) -> str:
    """The command that makes the page again."""
    named = (
        ("-c", options.config),
        ("--run", options.run_names),
        ("--tracker", options.tracker if options.tracker != DEFAULT_TRACKER else None),
        ("--tracking-uri", options.tracking_uri),
        ("--probe", options.probe),
        ("--tokenizer", options.tokenizer),
        ("--text-key", options.text_key),
        ("--dtype", options.dtype),
        ("--sequence-length", options.sequence_length),
        ("--quantities", options.quantities),
        ("--effort", options.effort),
        ("--precision", options.precision),
        ("--device", options.device),
        ("--format", options.format),
        ("--out", options.out),
    )
    return command_again(["compare", options.a, options.b], named)
