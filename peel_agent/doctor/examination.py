"""Everything that a run needs, looked at in parts that do not wait for each other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peel_agent.config import Settings
from peel_agent.destinations import exposed_secrets
from peel_agent.doctor.configuration import failed, name_of, read_configuration
from peel_agent.doctor.destinations import check_sinks, check_trackers
from peel_agent.doctor.machine import check_device, check_health, check_libraries, check_limits, check_plugins
from peel_agent.doctor.places import check_place, check_state
from peel_agent.errors import PeelError, printable
from peel_agent.records import Check
from peel_agent.state import state_dir_of

PART_SECONDS = 330.0
"""So long a part may take: a dead mount holds for ever whoever looks at it."""


@dataclass
class _Part:
    """Some checks, made in a thread of their own; `answers` ends with None."""

    name: str
    checks: Callable[[], Iterable[Check]]
    answers: queue.SimpleQueue[Check | None] = field(default_factory=queue.SimpleQueue)

    def start(self) -> None:
        threading.Thread(target=self._work, name=self.name, daemon=True).start()

    def _work(self) -> None:
        try:
            for check in self.checks():
                self.answers.put(check)
        except PeelError as error:
            self.answers.put(failed(self.name, error))
        except OSError as error:
            words = f"{error.filename or 'the system'}: {error.strerror or error}"
            self.answers.put(Check(self.name, False, words, "see to that, and ask again"))
        except Exception as error:  # of a plug-in, a driver, a library: the other parts go on
            words = f"this could not be looked at: {type(error).__name__}: {error}"
            self.answers.put(Check(self.name, False, words, "please report it, unless it is a plug-in of your own"))
        self.answers.put(None)

    def told(self) -> Iterator[Check]:
        while True:
            try:
                check = self.answers.get(timeout=PART_SECONDS)
            except queue.Empty:
                words = f"no answer within {PART_SECONDS:.0f} s"
                yield Check(self.name, False, words, "look for a mount or a server that is dead")
                return
            if check is None:
                return
            yield check


def examine(file: Path | None, flags: Mapping[str, Any], *, now: Callable[[], float]) -> Iterator[Check]:
    """Each thing that a run of these settings needs, in order, as it is found out; `now` gives Unix seconds.

    `file` and `flags` are those of `load_settings`. Of a wrong configuration the faults are told, and what it says
    elsewhere is looked at all the same.
    """
    settings, checks = read_configuration(file, flags)
    parts = [*_parts(settings, _state_dir(settings, file), now), _Part("secrets", partial(_secrets, settings, file))]
    for part in parts:
        part.start()
    for check in checks:
        yield _shown(check)
    for part in parts:
        for check in part.told():
            yield _shown(check)


def _shown(check: Check) -> Check:
    """The same in words fit for a terminal: names and messages may come from anywhere."""
    remedy = None if check.remedy is None else printable(check.remedy)
    return Check(printable(check.what), check.ok, printable(check.words), remedy)


def _state_dir(settings: Settings, file: Path | None) -> Path | PeelError:
    try:
        return state_dir_of(settings, file)
    except PeelError as error:
        return error


def _parts(settings: Settings, state_dir: Path | PeelError, now: Callable[[], float]) -> list[_Part]:
    alone = len(settings.runs) == 1
    folder = state_dir if isinstance(state_dir, Path) else None
    parts = [
        _Part("libraries", check_libraries),
        _Part("plug-ins", check_plugins),
        _Part("device", partial(check_device, settings.device, settings.engine)),
        _Part("limits", partial(check_limits, settings.device)),
        _Part("state folder", partial(_state, state_dir)),
        _Part("health endpoint", partial(check_health, settings.health, folder)),
    ]
    for run in settings.runs:
        name = name_of(run.name, alone=alone)
        parts.append(_Part(f"{name}watched place", partial(check_place, run, folder, name, now)))
    for run in settings.runs:
        name = name_of(run.name, alone=alone)
        parts.append(_Part(f"{name}trackers", partial(check_trackers, run, folder, name, now, alone=alone)))
    parts.append(_Part("sinks", partial(check_sinks, settings.sinks, folder, now)))
    return parts


def _secrets(settings: Settings, file: Path | None) -> Iterable[Check]:
    exposed = exposed_secrets(settings, file)
    if not exposed:
        return [Check("secrets", True, "none stands in plain text where others may read it")]
    return [Check("secrets", False, *words.split(": ", 1)) for words in exposed]


def _state(state_dir: Path | PeelError) -> Iterable[Check]:
    return check_state(state_dir) if isinstance(state_dir, Path) else [failed("state folder", state_dir)]
