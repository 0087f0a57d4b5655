"""Whether trackers and sinks would take what is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from peel_agent import registry
from peel_agent.config import RunSettings, SinkSettings, TrackerSettings
from peel_agent.deliver import in_words
from peel_agent.destinations import pinned_run, sink_settings, tracker_settings
from peel_agent.doctor.configuration import failed
from peel_agent.errors import PeelError
from peel_agent.identity import run_key
from peel_agent.records import Check
from peel_agent.spi import Checking, Sink, Tracker


def check_trackers(
    run: RunSettings, state_dir: Path | None, name: str, now: Callable[[], float], *, alone: bool
) -> Iterator[Check]:
    """Each tracker of a run by its own checks; `name` begins what they are called. A wrong one hides no other."""
    settings: dict[str, Any] = {}
    for used in run.tracker.use:
        try:
            settings |= tracker_settings(_only(run, used), alone=alone)
        except PeelError as error:
            yield failed(f"{name}tracker {used}", error)
    try:
        tracker_settings(run.tracker, alone=alone)  # a table or a flag that none of them reads
    except PeelError as error:
        if len(settings) == len(run.tracker.use):
            yield failed(f"{name}trackers", error)
    key = run_key(run.name, str(run.watch.path), pinned_run(settings))
    folder = (state_dir or Path()) / "runs" / key
    for used, options in settings.items():
        connect = partial(registry.tracker(used).connect, options, checkpoint_dir=str(run.watch.path), state_dir=folder)
        yield from _checked(f"{name}tracker {used}", connect, now)


def _only(run: RunSettings, used: str) -> TrackerSettings:
    """The tracker's part of the settings alone."""
    options = {used: run.tracker.options[used]} if used in run.tracker.options else {}
    known = {field.name for field in fields(registry.tracker(used).settings)}
    flags = {key: value for key, value in run.tracker.flags.items() if key in known}
    return replace(run.tracker, use=(used,), options=options, flags=flags)


def check_sinks(sinks: Sequence[SinkSettings], state_dir: Path | None, now: Callable[[], float]) -> Iterator[Check]:
    """Each sink: that it can be opened, and what it says of itself. No notice is sent."""
    for sink in sinks:
        yield from _checked(f"sink {sink.name}", partial(_connected, sink, state_dir or Path()), now)


def _connected(sink: SinkSettings, state_dir: Path) -> Sink:
    return registry.sink(sink.use).connect(sink_settings(sink), state_dir=state_dir)


def _checked(what: str, connect: Callable[[], Tracker | Sink], now: Callable[[], float]) -> Iterator[Check]:
    """What a plug-in says of itself; one that raises anything hides no other."""
    try:
        connected = connect()
        try:
            if isinstance(connected, Checking):
                for check in connected.check(now):
                    yield replace(check, what=f"{what}, {check.what}")
            else:
                words = f"{connected.where()}: nothing is sent in order to try it"
                yield Check(what, None, words, "wait for the first thing that is sent, and look there")
        finally:
            connected.close()
    except PeelError as error:
        yield failed(what, error)
    except Exception as error:  # somebody else's plug-in
        remedy = "repair or uninstall the distribution that this plug-in comes from: `peel-agent plugins` names it"
        yield Check(what, False, f"the plug-in failed: {in_words(error)}", remedy)
