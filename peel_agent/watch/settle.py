"""Which checkpoints have been at rest long enough to be read. Pure: it sees sightings and the time it is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peel_agent.records import CheckpointRef, FileStamp, Readiness
from peel_agent.watch.scan import Sighting


@dataclass(frozen=True)
class Observed:
    """`ready` oldest first; `waiting` and `unreadable` as (path, reason)."""

    ready: tuple[CheckpointRef, ...]
    waiting: tuple[tuple[Path, str], ...]
    unreadable: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class _Rest:
    """A readiness, and the time since which it has been the same."""

    readiness: Readiness
    since: float


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

    def observe(self, sightings: Iterable[Sighting], now: float) -> Observed:
        """Takes one scan at the time `now`, in Unix seconds, and sorts its sightings.

        A checkpoint seen for the first time counts as unchanged since its newest modification time, so that an old one
        is ready at once. A clock set back only restarts the waiting.
        """
        before, self._rests = self._rests, {}
        ready, waiting, unreadable = [], [], []
        for sighting in sightings:
            path, readiness = sighting.path, sighting.readiness
            rest = self._rests[path] = _Rest(readiness, _unchanged_since(before.get(path), readiness, now))
            age = now - rest.since
            if readiness.state == "damaged":
                unreadable.append((path, readiness.reason))
            elif readiness.state == "incomplete" and age >= self._give_up_seconds:
                unreadable.append((path, f"{readiness.reason}, and nothing changed for {self._give_up_seconds:g} s"))
            elif readiness.state == "incomplete":
                waiting.append((path, readiness.reason))
            elif age < self._settle_seconds:
                waiting.append((path, f"whole, but it changed less than {self._settle_seconds:g} s ago"))
            else:
                ready.append(checkpoint_ref(path, sighting.format, readiness, sighting.step))
        return Observed(tuple(sorted(ready, key=_oldest_first)), tuple(waiting), tuple(unreadable))


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


def _unchanged_since(before: _Rest | None, readiness: Readiness, now: float) -> float:
    if before is None:
        return min(_newest(readiness.files, default=now), now)
    same = (before.readiness.state, before.readiness.files) == (readiness.state, readiness.files)
    return min(before.since, now) if same else now


def _newest(files: Sequence[FileStamp], default: float) -> float:
    """The newest modification time in Unix seconds."""
    return max((stamp.mtime_ns / 1e9 for stamp in files), default=default)


def _oldest_first(ref: CheckpointRef) -> tuple[bool, int, float]:
    # Those without a step are exports made at the end of a run, or of another producer: after the run's own.
    return (ref.step is None, ref.step or 0, ref.committed_at)
