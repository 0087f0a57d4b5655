"""Which run may peel on which device now: first come, first served; the CPU is one device."""

from __future__ import annotations

import threading
from collections import Counter

from peel_agent.devices import Devices, DeviceUnavailable
from peel_agent.journal import Journal
from peel_agent.records import DeviceLease, Request
from peel_agent.spi import Engine

GIVEN_UP_AFTER = 2
"""A run that asked and does not ask again is passed by after so many asks of another for a device that is free."""


class Leases:
    """The devices, shared by the runs of one agent; the engine is told when a device is wanted by somebody else."""

    def __init__(self, devices: Devices, engine: Engine, journal: Journal) -> None:
        self._devices = devices
        self._engine = engine
        self._journal = journal
        self._out: dict[str, DeviceLease] = {}
        """By what the lease makes visible."""
        self._work: dict[str, str] = {}
        """The checkpoint that is peeled on it."""
        self._waiting: dict[str, Counter[str]] = {}
        """Runs in the order in which they asked first, and how often others asked since they asked last."""
        self._lock = threading.RLock()
        self.words = "no device was asked for yet"

    def ask(self, run: str) -> DeviceLease | None:
        """A device for this run's next peel, or None: it asks again at its next round."""
        with self._lock:
            self._waiting.setdefault(run, Counter()).clear()
            if not self._is_next(run):
                return None
            try:
                lease = self._devices.acquire()
            except DeviceUnavailable as error:
                self._journal.begin("device", f"{error.what} -> {error.remedy}")
                return None
            if lease.visible in self._out:  # the CPU, which is in use
                return None
            self._journal.end("device", f"{lease.label} is free again")
            del self._waiting[run]
            self._out[lease.visible] = lease
            words = f"{lease.label}: {lease.reason}"
            if words != self.words:
                self.words = words
                self._journal.tell("device", f"peeling on {words}")
            return lease

    def _is_next(self, run: str) -> bool:
        """Whether no other run has waited longer; one that was passed by too often has gone away."""
        for other in list(self._waiting):
            if other == run:
                return True
            if self._out:  # it may still ask in time
                return False
            self._waiting[other][run] += 1
            if self._waiting[other][run] <= GIVEN_UP_AFTER:
                return False
            del self._waiting[other]
        return True

    def forget(self, run: str) -> None:
        """It does not ask any more."""
        with self._lock:
            self._waiting.pop(run, None)

    def working(self, request: Request) -> None:
        """What a device is used for."""
        with self._lock:
            self._work[request.lease.visible] = request.ref.fingerprint

    def give_back(self, lease: DeviceLease) -> None:
        with self._lock:
            if self._out.pop(lease.visible, None) is not None:
                self._work.pop(lease.visible, None)
                self._devices.release(lease)

    def look(self) -> None:
        """Keeps the record of who uses the GPUs, and gives way where somebody moved in. Called every few seconds."""
        with self._lock:
            self._devices.sample()
            leased = [(lease, self._work.get(visible)) for visible, lease in self._out.items() if visible]
            wanted = [(self._devices.must_give_way(lease), fingerprint) for lease, fingerprint in leased]
        for why, fingerprint in wanted:
            if why is not None and fingerprint is not None:
                self._engine.give_way(fingerprint, why)
