"""Checkpoints that wait to be peeled, their files held; and which of them is next when they come faster than that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peel_agent.errors import TornCheckpoint
from peel_agent.records import CheckpointRef
from peel_agent.watch.pins import Pins


class Queue:
    """Waiting checkpoints, oldest first. `policy` is that of `[watch] backlog`: latest, all or every:N."""

    def __init__(self, pins: Pins, policy: str) -> None:
        self.policy = policy
        self._pins = pins
        self._waiting: list[CheckpointRef] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, ref: CheckpointRef) -> bool:
        return any(own.fingerprint == ref.fingerprint for own in self._waiting)

    def add(self, ref: CheckpointRef) -> bool:
        """Takes a checkpoint in and holds on to its files; False for one that changed or was removed meanwhile."""
        try:
            self.put_back(self._pins.pin(ref))
        except TornCheckpoint:
            return False
        return True

    def put_back(self, ref: CheckpointRef) -> None:
        """Takes in a checkpoint whose files are held already, if they can be."""
        self._waiting.append(ref)
        self._waiting.sort(key=oldest_first)

    def held(self) -> tuple[CheckpointRef, ...]:
        """Those that wait and are held."""
        return tuple(ref for ref in self._waiting if ref.held is not None)

    def next(self) -> tuple[CheckpointRef, Sequence[CheckpointRef]]:
        """Takes out the next of those that wait (one or more), and those before it that are passed over for good.

        `all` takes the oldest, `latest` the one that was written last, `every:N` the N-th oldest, or the last where
        fewer wait. One that waits alone is always taken: nothing is passed over while peeling keeps up, and none for
        one without a step.
        """
        candidates = [ref for ref in self._waiting if ref.step is not None] or self._waiting
        if self.policy == "latest":
            candidates = sorted(candidates, key=lambda ref: (ref.committed_at, oldest_first(ref)))
        every = {"all": 1, "latest": len(candidates)}.get(self.policy) or int(self.policy.removeprefix("every:"))
        index = min(every, len(candidates)) - 1
        passed, chosen = candidates[:index], candidates[index]
        self._waiting = [ref for ref in self._waiting if ref is not chosen and ref not in passed]
        for ref in passed:
            self._pins.release(ref)
        return chosen, passed

    def gone(self) -> tuple[CheckpointRef, ...]:
        """Takes out those whose files are not held and were removed."""
        gone = tuple(ref for ref in self._waiting if ref.held is None and not ref.path.exists())
        self._waiting = [ref for ref in self._waiting if ref not in gone]
        return gone

    def make_room(self) -> Path | None:
        """Holds no waiting file any more when the file system is nearly full, and says where that is."""
        if not self._pins.crowded() or all(ref.held is None for ref in self._waiting):
            return None
        for index, ref in enumerate(self._waiting):
            self._pins.release(ref)
            self._waiting[index] = ref.released()
        return self._pins.folder


def oldest_first(ref: CheckpointRef) -> tuple[bool, int, float]:
    """Sorts by step; those without one are exports made at the end of a run, or of another producer: they come last."""
    return (ref.step is None, ref.step or 0, ref.committed_at)
