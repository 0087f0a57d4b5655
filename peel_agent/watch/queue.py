"""Checkpoints that wait to be peeled, their files held; and which of them is next when they come faster than that."""

from __future__ import annotations

from collections.abc import Sequence

from peel_agent.records import CheckpointRef
from peel_agent.watch.pins import Pins


class Queue:
    """Waiting checkpoints, oldest first. `policy` is that of `[watch] backlog`: latest, all or every:N.

    Some are put off until a time, in Unix seconds; it is not their turn before.
    """

    def __init__(self, pins: Pins, policy: str) -> None:
        self.policy = policy
        self._pins = pins
        self._waiting: list[CheckpointRef] = []
        self._put_off: list[tuple[float, CheckpointRef]] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._put_off)

    def __contains__(self, ref: CheckpointRef) -> bool:
        return any(waiting.fingerprint == ref.fingerprint for waiting in self._all())

    def _all(self) -> tuple[CheckpointRef, ...]:
        return (*self._waiting, *(ref for _, ref in self._put_off))

    def add(self, ref: CheckpointRef) -> None:
        """Takes a checkpoint in, whose files are held if they can be."""
        self._waiting.append(ref)
        self._waiting.sort(key=oldest_first)

    def put_off(self, ref: CheckpointRef, until: float) -> None:
        """Takes in a checkpoint whose turn comes at that time."""
        self._put_off.append((until, ref))

    def come_due(self, now: float, longest: float) -> None:
        """The turn of those that were put off until now has come; a longer pause was set by another clock."""
        due = [(until, ref) for until, ref in self._put_off if not 0 < until - now <= longest]
        for entry in due:
            self._put_off.remove(entry)
            self.add(entry[1])

    def take_out(self, ref: CheckpointRef) -> None:
        """It does not wait any more."""
        self._waiting = [waiting for waiting in self._waiting if waiting is not ref]

    def held(self) -> tuple[CheckpointRef, ...]:
        """Those that are held."""
        return tuple(ref for ref in self._all() if ref.held is not None)

    @property
    def has_next(self) -> bool:
        """Whether it is somebody's turn."""
        return bool(self._waiting)

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
        return chosen, passed

    def overtaken(self, newer: CheckpointRef) -> tuple[CheckpointRef, ...]:
        """By `latest`, the earlier saves of the same file: none of them is ever next once this one waits."""
        if self.policy != "latest":
            return ()
        return tuple(ref for ref in self._waiting if ref.path == newer.path and ref.committed_at < newer.committed_at)

    def lost(self) -> tuple[CheckpointRef, ...]:
        """Takes out those whose files were removed or written over, and are not held by a copy."""
        lost = tuple(ref for ref in self._waiting if not self._pins.is_whole(ref))
        for ref in lost:
            self.take_out(ref)
        return lost

    def make_room(self) -> bool:
        """Whether the files of those that wait were let go of: the file system has too little free."""
        if all(ref.held is None for ref in self._waiting) or not self._pins.crowded():
            return False
        for index, ref in enumerate(self._waiting):
            self._pins.release(ref)
            self._waiting[index] = ref.released()
        return True


def oldest_first(ref: CheckpointRef) -> tuple[bool, int, float]:
    """Sorts by step; those without one are exports made at the end of a run, or of another producer: they come last."""
    return (ref.step is None, ref.step or 0, ref.committed_at)
