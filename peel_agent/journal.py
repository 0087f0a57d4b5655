"""What happens, told once: as a line of the log, and to whoever keeps events. And what is wrong now."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from peel_agent.errors import printable
from peel_agent.records import Event, EventKind, Level

AGAIN_SECONDS = 60.0
"""The same sentence is not told twice within this time."""

NUMBERS_SECONDS = 3600.0
"""A trouble of which only numbers change, such as a GPU's utilisation, is not told anew within this time."""

REMEMBERED = 1000

_LEVELS: tuple[Level, ...] = ("info", "warning", "error")


@dataclass(frozen=True)
class _Trouble:
    words: str
    since: float
    run: str | None
    told_at: float


class Journal:
    """Writes each event as a line of the log, as text or JSON, and hands it to `keep`.

    `write` takes a line without its newline; `now` gives Unix seconds; events below `level` are kept, and not written.
    Threads may share it.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        now: Callable[[], float],
        *,
        form: str = "text",
        level: str = "info",
        keep: Callable[[Event], None] = lambda _event: None,
    ) -> None:
        self._write = write
        self.now = now
        self._as_json = form == "json"
        self._written = _LEVELS[_LEVELS.index(level) if level in _LEVELS else 0 :]
        self._keep = keep
        self._told: dict[tuple[str, str | None, str], float] = {}
        self._troubles: dict[str, _Trouble] = {}
        self.speaker: str | None = None
        """The run whose alerts also tell what is wrong with the agent itself."""
        self._lock = threading.RLock()

    def tell(
        self, kind: EventKind, words: str, *, run: str | None = None, step: int | None = None, level: Level = "info"
    ) -> None:
        """One sentence of what happened, to a run or to the agent."""
        event = Event(kind, printable(words), self.now(), run, step, level)
        with self._lock:
            if not self._is_news(event):
                return
            self._keep(event)
            if level in self._written:
                self._write(_json(event) if self._as_json else _text(event))

    def _is_news(self, event: Event) -> bool:
        same = (event.kind, event.run, event.words)
        before = self._told.get(same)
        if before is not None and 0 <= event.at - before < AGAIN_SECONDS:
            return False
        self._told[same] = event.at
        if len(self._told) > REMEMBERED:
            self._told = {key: at for key, at in self._told.items() if event.at - at < AGAIN_SECONDS}
        return True

    def begin(self, trouble: str, words: str, *, run: str | None = None) -> None:
        """Something is wrong that may pass: told when it begins, and again when its words change."""
        with self._lock:
            now, before = self.now(), self._troubles.get(trouble)
            if before is not None and (words == before.words or _is_recent_but_for_numbers(words, before, now)):
                self._troubles[trouble] = replace(before, words=words)
                return
            self._troubles[trouble] = _Trouble(words, now if before is None else before.since, run, told_at=now)
            self.tell("trouble began", words, run=run, level="warning")

    def end(self, trouble: str, words: str, *, run: str | None = None) -> None:
        """What was wrong has passed: told once, when it was told at all."""
        with self._lock:
            if self._troubles.pop(trouble, None) is not None:
                self.tell("trouble ended", words, run=run)

    def drop(self, prefix: str) -> None:
        """Nobody is concerned any more with troubles whose names begin so."""
        with self._lock:
            kept = {key: one for key, one in self._troubles.items() if not key.startswith(prefix)}
            self._troubles = kept

    @property
    def troubles(self) -> tuple[str, ...]:
        """What is wrong now, in sentences."""
        with self._lock:
            return tuple(one.words for one in self._troubles.values())

    def troubles_of(self, run: str) -> tuple[tuple[str, float], ...]:
        """What is wrong now with a run, and with the agent if the run speaks for it; since when, in Unix seconds."""
        with self._lock:
            concerned = {run, None} if run == self.speaker else {run}
            return tuple((one.words, one.since) for one in self._troubles.values() if one.run in concerned)


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(event: Event) -> str:
    return f"{_time(event.at)} {event.level.upper():<7} {event.run or 'agent'}: {event.words}"


def _json(event: Event) -> str:
    form = {"time": _time(event.at), "level": event.level, "run": event.run, "step": event.step}
    return json.dumps({**form, "event": event.kind, "message": event.words})


def _is_recent_but_for_numbers(words: str, before: _Trouble, now: float) -> bool:
    """Whether a trouble was told not long ago, in words that differ in numbers at most."""
    differs = re.sub(r"\d+", "0", words) != re.sub(r"\d+", "0", before.words)
    return not differs and 0 <= now - before.told_at < NUMBERS_SECONDS
