"""A simulated week of one agent with many runs and a bounded number of devices. Who gets a device is decided by the
agent's own function, `peel_agent.leases.next_turn`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peel_agent.leases import Turn, next_turn

HOUR = 3600.0
WEEK = 7 * 24 * HOUR


@dataclass(frozen=True)
class Training:
    """A run: it saves every `interval` seconds, give or take a tenth; a peel of it takes `peel` seconds.

    `margin` is its worst margin at every peel, in nats per token, give or take a fifth.
    """

    name: str
    kind: str
    interval: float
    peel: float
    margin: float


@dataclass
class Record:
    """What became of a run's saves. `waits` are the seconds from a save to the end of its peel, of each peel."""

    training: Training
    saves: int = 0
    waits: list[float] = field(default_factory=list)
    longest_queue: float = 0.0
    """The longest time that it waited for a device, in seconds."""
    most_passed: int = 0
    """The most peels of others that began while it waited."""

    @property
    def share(self) -> float:
        """The part of its saves that was peeled; the others were passed over for a newer one."""
        return len(self.waits) / self.saves if self.saves else 1.0


@dataclass(frozen=True)
class Week:
    """The records of all runs, the age of each run's oldest waiting save at every full hour, and the devices' load."""

    records: tuple[Record, ...]
    ages: tuple[tuple[float, ...], ...]
    busy: float
    decisions: int


@dataclass
class _Waiting:
    since: float
    grants: int


class _Fleet:
    def __init__(self, trainings: Sequence[Training], devices: int, seed: int, end: float) -> None:
        self.records = tuple(Record(training) for training in trainings)
        self.noise = random.Random(seed)
        self.free = devices
        self.end = end
        self.margins: dict[int, float] = {}
        self.saved: dict[int, list[float]] = {}
        """Saves of a run that wait, the oldest first."""
        self.waiting: dict[int, _Waiting] = {}
        self.at_work: set[int] = set()
        self.grants = 0
        self.busy = 0.0
        self.events: list[tuple[float, int, str, int, float]] = []
        self._number = itertools.count()

    def at(self, when: float, kind: str, run: int, of: float = 0.0) -> None:
        heapq.heappush(self.events, (when, next(self._number), kind, run, of))

    def save(self, now: float, run: int) -> None:
        record = self.records[run]
        record.saves += 1
        self.saved.setdefault(run, []).append(now)
        self.at(now + record.training.interval * self.noise.uniform(0.9, 1.1), "save", run)
        self.ask(now, run)

    def ask(self, now: float, run: int) -> None:
        if run not in self.at_work and run not in self.waiting and self.saved.get(run):
            self.waiting[run] = _Waiting(now, self.grants)

    def done(self, now: float, run: int, of: float) -> None:
        record = self.records[run]
        record.waits.append(now - of)
        self.margins[run] = record.training.margin * self.noise.uniform(0.8, 1.2)
        self.at_work.remove(run)
        self.free += 1
        self.ask(now, run)

    def give(self, now: float) -> None:
        """Free devices to those whose turn it is. The newest of a run's saves is peeled, the others are passed over."""
        while self.free and self.waiting:
            turns = [
                Turn(str(run), self.margins.get(run), self.grants - seat.grants) for run, seat in self.waiting.items()
            ]
            run = int(next_turn(turns).run)
            seat = self.waiting.pop(run)
            record = self.records[run]
            record.longest_queue = max(record.longest_queue, now - seat.since)
            record.most_passed = max(record.most_passed, self.grants - seat.grants)
            self.grants += 1
            self.free -= 1
            self.at_work.add(run)
            seconds = record.training.peel * self.noise.uniform(0.8, 1.2)
            self.busy += min(seconds, self.end - now)
            self.at(now + seconds, "done", run, self.saved.pop(run)[-1])

    def age(self, now: float, run: int) -> float:
        """What `peel_lag_seconds` says: the age of the oldest save in the queue, 0 without one."""
        waiting = self.saved.get(run)
        return now - waiting[0] if waiting else 0.0


def simulate(trainings: Sequence[Training], devices: int, *, seconds: float = WEEK, seed: int = 0) -> Week:
    """One agent with these runs and devices, from their first saves on; runs begin at times of their own."""
    fleet = _Fleet(trainings, devices, seed, seconds)
    for run, training in enumerate(trainings):
        fleet.at(fleet.noise.uniform(0, training.interval), "save", run)
    ages: list[tuple[float, ...]] = []
    while fleet.events and fleet.events[0][0] < seconds:
        now, _, kind, run, of = heapq.heappop(fleet.events)
        while len(ages) * HOUR <= now:
            ages.append(tuple(fleet.age(len(ages) * HOUR, one) for one in range(len(trainings))))
        if kind == "save":
            fleet.save(now, run)
        else:
            fleet.done(now, run, of)
        fleet.give(now)
    return Week(fleet.records, tuple(ages), fleet.busy / (devices * seconds), fleet.grants)


def quantile(values: Iterable[float], part: float) -> float:
    """The value below which this part of them lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
