"""Which run may peel on which device now: the worst margin first, and nobody waits for ever; the CPU is one device."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from peel_agent.devices import Devices
from peel_agent.errors import DeviceUnavailable
from peel_agent.journal import Journal
from peel_agent.records import DeviceLease, Request
from peel_agent.spi import Engine, Leasing

GIVEN_UP_AFTER = 2
"""A run that asked and does not ask again is passed by after so many asks of another for a device that is free."""

PATIENCE = 2
"""A run is next, whatever its margin, once so many peels of others began for each run that waits."""


@dataclass(frozen=True)
class Turn:
    """A run that waits for a device.

    `worst_margin` is the least margin of a block at its last peel, in nats per token, None before the first; `passed`
    counts the peels of other runs that began since it waits.
    """

    run: str
    worst_margin: float | None
    passed: int


def next_turn(waiting: Sequence[Turn]) -> Turn:
    """The run that gets the next device; `waiting` is in the order in which the runs began to wait.

    A run that was never peeled comes first, then the worst margin; of equals the one that waits longest. Of n runs none
    waits for more than (PATIENCE + 1) n peels of others: one that was passed by PATIENCE n times goes before all that
    came later. So at least a third of the devices' time goes evenly to all, whatever their margins.
    """
    overdue = [turn for turn in waiting if turn.passed >= PATIENCE * len(waiting)]
    return overdue[0] if overdue else min(waiting, key=_urgency)


def _urgency(turn: Turn) -> tuple[bool, float]:
    return turn.worst_margin is not None, turn.worst_margin or 0.0


@dataclass
class _Seat:
    """What is known of a run that waits, and how often each other run asked since it asked last."""

    worst_margin: float | None = None
    passed: int = 0
    asked_since: Counter[str] = field(default_factory=Counter)


class Leases:
    """The devices, shared by the runs of one agent; the engine is told when a device is wanted by somebody else.

    They are those of this machine, unless the engine leases its own.
    """

    def __init__(self, devices: Devices, engine: Engine, journal: Journal) -> None:
        self._devices = devices
        self._lender: Leasing = engine if isinstance(engine, Leasing) else devices
        self._engine = engine
        self._journal = journal
        self._out: dict[str, DeviceLease] = {}
        """By their key."""
        self._work: dict[str, str] = {}
        """The checkpoint that is peeled on it."""
        self._waiting: dict[str, _Seat] = {}
        """In the order in which they asked first."""
        self._lock = threading.RLock()
        self.words = "no device was asked for yet"

    def ask(self, run: str, worst_margin: float | None = None) -> DeviceLease | None:
        """A device for this run's next peel, or None: it asks again at its next round. See Turn for `worst_margin`."""
        with self._lock:
            seat = self._waiting.setdefault(run, _Seat())
            seat.worst_margin = worst_margin
            seat.asked_since.clear()
            if not self._is_next(run):
                return None
            try:
                lease = self._lender.acquire()
            except DeviceUnavailable as error:
                self._journal.begin("device", f"{error.what} -> {error.remedy}")
                return None
            if lease is None or lease.key in self._out:  # all of them, or the CPU, are in use
                return None
            self._journal.end("device", f"{lease.label} is free again")
            del self._waiting[run]
            for other in self._waiting.values():
                other.passed += 1
            self._out[lease.key] = lease
            words = f"{lease.label}: {lease.reason}"
            if words != self.words:
                self.words = words
                self._journal.tell("device", f"peeling on {words}")
            return lease

    def _is_next(self, run: str) -> bool:
        """Whether no other run goes before; one that did not ask again for too long is dropped: it has gone away."""
        while (first := next_turn(self._turns()).run) != run:
            if self._out:  # it may still ask in time
                return False
            asked_since = self._waiting[first].asked_since
            asked_since[run] += 1
            if asked_since[run] <= GIVEN_UP_AFTER:
                return False
            del self._waiting[first]
        return True

    def _turns(self) -> list[Turn]:
        return [Turn(run, seat.worst_margin, seat.passed) for run, seat in self._waiting.items()]

    def forget(self, run: str) -> None:
        """The run does not ask any more."""
        with self._lock:
            self._waiting.pop(run, None)

    def working(self, request: Request) -> None:
        """What a device is used for."""
        with self._lock:
            self._work[request.lease.key] = request.ref.fingerprint

    def give_back(self, lease: DeviceLease) -> None:
        with self._lock:
            if self._out.pop(lease.key, None) is not None:
                self._work.pop(lease.key, None)
                self._lender.release(lease)

    def look(self) -> None:
        """Keeps the record of who uses the GPUs, and gives way where somebody moved in. Called every few seconds."""
        if self._lender is not self._devices:
            return
        with self._lock:
            self._devices.sample()
            leased = [(lease, self._work.get(key)) for key, lease in self._out.items() if key]
            wanted = [(self._devices.must_give_way(lease), fingerprint) for lease, fingerprint in leased]
        for why, fingerprint in wanted:
            if why is not None and fingerprint is not None:
                self._engine.give_way(fingerprint, why)
