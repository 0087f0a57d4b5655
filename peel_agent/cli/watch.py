"""`peel-agent watch`: the sidecar."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from peel_agent.cli.options import add_common, check_probe, common_flags, say
from peel_agent.cli.terminal import show
from peel_agent.config import RunSettings, Settings, load_settings
from peel_agent.errors import ConfigurationError, PeelError, ProbeError
from peel_agent.publish import Grid, Lines, Sheet, layer_grid, sheet
from peel_agent.records import PeelReport
from peel_agent.sources import with_absolute_places
from peel_agent.views import standing, verdict
from peel_agent.watch import is_url

MOST_SHOWN = 12
"""Blocks that a terminal is shown of each checkpoint; `scan` shows all."""


def add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="the directory that the training writes checkpoints to, or its s3:// URL (default: what the file names)",
    )
    add_common(parser)
    parser.add_argument(
        "--run-id", metavar="ID", help="the tracker's run to write into (default: found, else a new one)"
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="the tracking server")
    parser.add_argument("--state", metavar="DIR", help="where findings are kept (default: beneath ~/.local/state)")
    parser.add_argument("--log-format", choices=("text", "json"), help="the log's lines, on stderr (default: text)")
    parser.add_argument("--once", action="store_true", help="peel everything complete that is there now, then exit")
    parser.add_argument("--json", action="store_true", help="each report as one line of JSON on stdout")
    parser.set_defaults(run=_watch)


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of a sidecar, with every place absolute. Raises ConfigurationError and ProbeError."""
    flags = common_flags(options) | {
        "watch.path": options.path,
        "tracker.*.run_id": options.run_id,
        "tracker.*.tracking_uri": options.tracking_uri,
        "state.path": options.state,
        "log.format": options.log_format,
    }
    settings = load_settings(options.config, flags)
    settings = with_absolute_places(settings)
    for run in settings.runs:
        check_probe(run.probe)
    if len(settings.runs) == 1:  # one of several may be away, or be written to later
        check_place(str(settings.runs[0].watch.path))
    return settings


def check_place(place: str) -> None:
    """Raises ConfigurationError for a watched place that cannot become a directory."""
    # One that is not there yet is waited for.
    if not is_url(place) and Path(place).exists() and not Path(place).is_dir():
        raise ConfigurationError(
            f"{place} is no directory", remedy="give the directory that the training writes its checkpoints to"
        )


def check_length(run: RunSettings, now: float) -> None:
    """Raises ProbeError for a `sequence_length` that the probe or the model of the newest checkpoint rules out.

    The next peel may be hours away. Without a `sequence_length`, or a checkpoint, nothing is looked at; `now` is in
    Unix seconds.
    """
    place = str(run.watch.path)
    if run.probe.sequence_length is None or is_url(place) or not Path(place).is_dir():
        return
    from peel_agent.doctor.folder import checkpoints_in, opened_by_child

    try:
        newest = checkpoints_in(Path(place), run.watch.format, run.watch.ready_markers, now).newest
        if newest is None:
            return
        opened = opened_by_child(newest, run.model, run.probe, quick=run.peel.effort == "quick")
    except (PeelError, OSError):  # of the checkpoint, not of the probe: the agent tells it, and waits for better
        return
    if opened.probe_fault is not None:
        what = f"the probe does not suit {newest.path.name}: {opened.probe_fault.what}"
        raise ProbeError(what, remedy=opened.probe_fault.remedy)


def _watch(options: argparse.Namespace) -> int:
    from peel_agent.agent import Agent
    from peel_agent.destinations import exposed_secrets
    from peel_agent.ledger import Ledger
    from peel_agent.state import state_dir_of

    settings = settings_of(options)
    if not settings.runs:
        raise ConfigurationError(
            "there is no directory to watch", remedy="give it: peel-agent watch PATH, or [watch] path in peel.toml"
        )
    # With --once the first peel says it just as soon. One run of several may be on a mount that hangs.
    if not options.once and len(settings.runs) == 1:
        check_length(settings.runs[0], time.time())
    ledger = Ledger(state_dir_of(settings, options.config))
    emit = _printed if options.json else _shown if sys.stdout.isatty() else None
    try:
        agent = Agent(settings, ledger, say=say, emit=emit, reload=lambda: settings_of(options))
        for words in exposed_secrets(settings, options.config):
            agent.journal.tell("started", words, level="warning")
        return agent.run(once=options.once)
    finally:
        ledger.close()


def _printed(line: str) -> None:
    print(line, flush=True)


def _shown(line: str) -> None:
    """A report's line of JSON as a person at a terminal wants it: what was found, and the blocks that stand out."""
    from peel_agent.publish import report_from_json

    show(brief_sheet(report_from_json(json.loads(line))), sys.stdout)


def brief_sheet(report: PeelReport) -> Sheet:
    """What was found, and the blocks that have a finding or are not certainly above, the first ones of many."""
    notable = [layer for layer in report.layers if layer.finding is not None or layer.status in ("below", "undecided")]
    shown, others = notable[:MOST_SHOWN], len(report.layers) - len(notable[:MOST_SHOWN])
    parts: list[Lines | Grid] = [Lines((verdict(report), standing(report)), "verdict")]
    if shown:
        parts.append(layer_grid(shown))
        parts.append(Lines((f"and {others} more blocks",) if others else (), "faint"))
    return sheet(*parts, Lines(("",)))


def state_folder(options: argparse.Namespace) -> Path:
    """The state folder of the sidecar that was started with the same file and flags."""
    from peel_agent.state import state_dir_of

    if options.state is not None:
        return Path(options.state).expanduser()
    flags = {"watch.path": options.path, "tracker.*.run_id": options.run_id}
    return state_dir_of(with_absolute_places(load_settings(options.config, flags)), options.config)
