"""Which checkpoints have been at rest long enough to be read. Pure: it sees sightings and the time it is given."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peel_agent.records import CheckpointRef, FileStamp, Readiness
from peel_agent.watch.queue import oldest_first
from peel_agent.watch.scan import Sighting

GIVE_UP_SECONDS = 600.0
"""So long a checkpoint that is not whole is waited for when nothing of it changes."""


RESTLESS = 3
"""So many saves of one path in a row that were overwritten before they were at rest are told."""


class Unread(NamedTuple):
    """A place, a path or a URL, that is not read, why, and what to do about it; empty where nothing is to be done."""

    place: str
    reason: str
    remedy: str = ""

    @property
    def words(self) -> str:
        """The reason and the remedy in one line."""
        return f"{self.reason} -> {self.remedy}" if self.remedy else self.reason


@dataclass(frozen=True)
class Observed:
    """`ready` oldest first; what is `waiting`, and what is `unreadable`; `vanished` were whole, not settled.

    `restless` are those of `waiting` whose saves come too fast to be read. In `rests_in` seconds the next whole one
    will have been at rest for long enough; None while there is none.
    """

    ready: tuple[CheckpointRef, ...]
    waiting: tuple[Unread, ...]
    unreadable: tuple[Unread, ...]
    vanished: tuple[CheckpointRef, ...] = ()
    restless: tuple[Unread, ...] = ()
    rests_in: float | None = None


@dataclass(frozen=True)
class _Rest:
    """A sighting, and the time since which it has been the same.

    `saves` counts the whole ones since `restless` of which none was `offered`; the last of them had the files `last`.
    """

    sighting: Sighting
    since: float
    offered: bool = False
    saves: int = 0
    restless: float = 0.0
    last: tuple[FileStamp, ...] = ()


class Settling:
    """Tells from one scan to the next which checkpoints are whole and at rest.

    A checkpoint is ready when it is complete and its stamps have not changed for `settle_seconds`; unreadable when it
    is damaged, or incomplete and unchanged for `give_up_seconds`. Nothing is final: it is offered again by every
    `observe`, a rewritten one settles anew under a new fingerprint, and an unreadable one that becomes whole is ready.
    One that lacks a marker file waits for it; unchanged for `marker_seconds`, it is unreadable.
    """

    def __init__(
        self, settle_seconds: float, give_up_seconds: float = GIVE_UP_SECONDS, marker_seconds: float = math.inf
    ) -> None:
        self._settle_seconds = settle_seconds
        self._give_up_seconds = give_up_seconds
        self._marker_seconds = marker_seconds
        self._rests: dict[Path, _Rest] = {}
        self._started = False

    def observe(self, sightings: Iterable[Sighting], now: float) -> Observed:
        """Takes one scan at the time `now`, in Unix seconds, and sorts its sightings.

        In the first scan a checkpoint counts as unchanged since its newest modification time, so that an old one is
        ready at once; one that comes later since it came, whatever the clock of the machine that wrote it said. A
        clock set back only restarts the waiting.
        """
        before, self._rests = self._rests, {}
        first, self._started = not self._started, True
        ready: list[CheckpointRef] = []
        waiting: list[Unread] = []
        unreadable: list[Unread] = []
        for sighting in sightings:
            path, readiness = sighting.path, sighting.readiness
            since = _unchanged_since(before.get(path), readiness, now, trusted=first)
            offered = _is_whole(sighting) and now - since >= self._settle_seconds
            self._rests[path] = _rest(before.get(path), sighting, since, now, offered=offered)
            if offered:
                ready.append(_ref(sighting))
                continue
            reason, is_over = self._why_not(sighting, now - since)
            (unreadable if is_over else waiting).append(Unread(str(path), reason, readiness.remedy))
        return Observed(
            tuple(sorted(ready, key=oldest_first)),
            tuple(waiting),
            tuple(unreadable),
            self._vanished(before),
            tuple(self._restless(now)),
            self._rests_in(now),
        )

    def _restless(self, now: float) -> Iterator[Unread]:
        for path, rest in self._rests.items():
            if rest.saves >= RESTLESS and now - rest.restless >= 2 * self._settle_seconds:
                seconds = f"{self._settle_seconds:g} s"
                reason = f"it is saved again before it has been at rest for {seconds}, so that no save can be read"
                yield Unread(str(path), reason, "make [watch] settle_seconds less than the time between two saves")

    def _rests_in(self, now: float) -> float | None:
        whole = (rest for rest in self._rests.values() if _is_whole(rest.sighting) and not rest.offered)
        return min((rest.since + self._settle_seconds - now for rest in whole), default=None)

    def _why_not(self, sighting: Sighting, age: float) -> tuple[str, bool]:
        """Why one that has been the same for `age` seconds is not ready, and whether it is waited for no more."""
        readiness, limit = sighting.readiness, self._give_up_seconds
        if readiness.state == "damaged":
            return readiness.reason, True
        if _is_whole(sighting):
            return f"whole, but it changed less than {self._settle_seconds:g} s ago", False
        reason = readiness.reason
        if readiness.state == "complete":
            reason, limit = waits_for(sighting.lacking), self._marker_seconds
        return (f"{reason}, and nothing changed for {limit:g} s", True) if age >= limit else (reason, False)

    def _vanished(self, before: Mapping[Path, _Rest]) -> tuple[CheckpointRef, ...]:
        """Those that were whole, never offered, and are now at no path."""
        there = {fingerprint(rest.sighting.readiness.files) for rest in self._rests.values()}
        gone = (rest for path, rest in before.items() if path not in self._rests and not rest.offered)
        refs = (_ref(rest.sighting) for rest in gone if _is_whole(rest.sighting))
        return tuple(ref for ref in refs if ref.fingerprint not in there)


def waits_for(lacking: Sequence[str]) -> str:
    """What is said of a checkpoint that lacks marker files, such as `waits for STABLE`."""
    return f"waits for {', '.join(lacking)}"


def _is_whole(sighting: Sighting) -> bool:
    return sighting.readiness.state == "complete" and not sighting.lacking


def _ref(sighting: Sighting) -> CheckpointRef:
    return checkpoint_ref(sighting.path, sighting.format, sighting.readiness, sighting.step)


def checkpoint_ref(path: Path, format_name: str, readiness: Readiness, step: int | None) -> CheckpointRef:
    """The record of a checkpoint that was found complete; its path becomes absolute."""
    return CheckpointRef(
        path=path.absolute(),
        step=step,
        format=format_name,
        fingerprint=fingerprint(readiness.files),
        committed_at=_newest(readiness.files, default=0.0),
        files=readiness.files,
        beside=readiness.beside,
    )


def fingerprint(files: Sequence[FileStamp]) -> str:
    """16 hexadecimal digits over the names, sizes and modification times of files, in any order.

    Not over inodes or the path: a checkpoint that is moved keeps its fingerprint.
    """
    facts = sorted((stamp.name, stamp.size, stamp.mtime_ns) for stamp in files)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _unchanged_since(before: _Rest | None, readiness: Readiness, now: float, *, trusted: bool) -> float:
    if before is None:
        return min(_newest(readiness.files, default=now), now) if trusted else now
    seen = before.sighting.readiness
    same = (seen.state, seen.files) == (readiness.state, readiness.files)
    return min(before.since, now) if same else now


def _rest(before: _Rest | None, sighting: Sighting, since: float, now: float, *, offered: bool) -> _Rest:
    if offered:
        return _Rest(sighting, since, offered=True)
    if before is None or before.offered:
        before = _Rest(sighting, since, restless=now)
    files = sighting.readiness.files
    if not _is_whole(sighting) or files == before.last:
        return _Rest(sighting, since, saves=before.saves, restless=before.restless, last=before.last)
    return _Rest(sighting, since, saves=before.saves + 1, restless=before.restless, last=files)


def _newest(files: Sequence[FileStamp], default: float) -> float:
    """The newest modification time of a checkpoint's own files in Unix seconds."""
    return max((stamp.mtime_ns / 1e9 for stamp in files if not stamp.is_elsewhere), default=default)
