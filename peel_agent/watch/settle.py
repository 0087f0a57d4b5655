"""Which checkpoints have been at rest long enough to be read. Pure: it sees sightings and the time it is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peel_agent.records import CheckpointRef, FileStamp, Readiness
from peel_agent.watch.queue import oldest_first
from peel_agent.watch.scan import Sighting


@dataclass(frozen=True)
class Observed:
    """`ready` oldest first; `waiting` and `unreadable` as (path or URL, reason); `vanished` were whole, not settled."""

    ready: tuple[CheckpointRef, ...]
    waiting: tuple[tuple[str, str], ...]
    unreadable: tuple[tuple[str, str], ...]
    vanished: tuple[CheckpointRef, ...] = ()


@dataclass(frozen=True)
class _Rest:
    """A sighting, and the time since which it has been the same."""

    sighting: Sighting
    since: float
    offered: bool = False


class Settling:
    """Tells from one scan to the next which checkpoints are whole and at rest.

    A checkpoint is ready when it is complete and its stamps have not changed for `settle_seconds`; unreadable when it
    is damaged, or incomplete and unchanged for `give_up_seconds`. Nothing is final: it is offered again by every
    `observe`, a rewritten one settles anew under a new fingerprint, and an unreadable one that becomes whole is ready.
    """

    def __init__(self, settle_seconds: float, give_up_seconds: float = 600.0) -> None:
        self._settle_seconds = settle_seconds
        self._give_up_seconds = give_up_seconds
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
        ready, waiting, unreadable = [], [], []
        for sighting in sightings:
            path, readiness, label = sighting.path, sighting.readiness, str(sighting.path)
            since = _unchanged_since(before.get(path), readiness, now, trusted=first)
            age = now - since
            offered = readiness.state == "complete" and age >= self._settle_seconds
            self._rests[path] = _Rest(sighting, since, offered)
            if readiness.state == "damaged":
                unreadable.append((label, readiness.reason))
            elif readiness.state == "incomplete" and age >= self._give_up_seconds:
                unreadable.append((label, f"{readiness.reason}, and nothing changed for {self._give_up_seconds:g} s"))
            elif readiness.state == "incomplete":
                waiting.append((label, readiness.reason))
            elif not offered:
                waiting.append((label, f"whole, but it changed less than {self._settle_seconds:g} s ago"))
            else:
                ready.append(_ref(sighting))
        return Observed(
            tuple(sorted(ready, key=oldest_first)), tuple(waiting), tuple(unreadable), self._vanished(before)
        )

    def _vanished(self, before: Mapping[Path, _Rest]) -> tuple[CheckpointRef, ...]:
        """Those that were whole, never offered, and are now at no path."""
        there = {fingerprint(rest.sighting.readiness.files) for rest in self._rests.values()}
        gone = (rest for path, rest in before.items() if path not in self._rests and not rest.offered)
        refs = (_ref(rest.sighting) for rest in gone if rest.sighting.readiness.state == "complete")
        return tuple(ref for ref in refs if ref.fingerprint not in there)


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


def _newest(files: Sequence[FileStamp], default: float) -> float:
    """The newest modification time in Unix seconds."""
    return max((stamp.mtime_ns / 1e9 for stamp in files), default=default)
