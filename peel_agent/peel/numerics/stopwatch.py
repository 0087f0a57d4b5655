"""Adds up seconds by kind of work, tells how far it is and what time is left; clock and listener are handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from peel_agent.records import Progress, Timing

Kind = Literal["capture", "solve", "score"]
Item = TypeVar("Item")


def _silence(_stage: str, _done: int, _total: int) -> None:
    """Tells nobody."""


class Stopwatch:
    """`with stopwatch("solve"): ...` adds the time spent inside to `solve`."""

    def __init__(
        self, clock: Callable[[], float], progress: Progress | None = None, *, budget: float | None = None
    ) -> None:
        self._clock = clock
        self._began = clock()
        self.budget = budget
        self.progress = progress or _silence
        self._last: dict[Kind, float] = {}
        self._seconds: dict[Kind, float] = {"capture": 0.0, "solve": 0.0, "score": 0.0}

    @contextmanager
    def __call__(self, kind: Kind) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._last[kind] = self._clock() - start
            self._seconds[kind] += self._last[kind]

    def each(self, kind: Kind, items: Iterator[Item]) -> Iterator[Item]:
        """The items, with the time that it takes to come by each of them added to `kind`."""
        while True:
            with self(kind):
                item = next(items, None)
            if item is None:
                return
            yield item

    def last(self, kind: Kind) -> float:
        """What the last piece of this kind of work took, 0 before the first."""
        return self._last.get(kind, 0.0)

    def seconds(self, kind: Kind) -> float:
        """Spent so far on this kind of work."""
        return self._seconds[kind]

    def now(self) -> float:
        """The clock."""
        return self._clock()

    def affords(self, seconds: float) -> bool:
        """Whether so much of the time budget is left."""
        return self.budget is None or self._clock() - self._began + seconds <= self.budget

    def refusal(self) -> str:
        """Why work that is not afforded is left out."""
        return f"the time budget of {self.budget:g} s does not suffice ([peel] time_budget_seconds)"

    def timing(self) -> Timing:
        return Timing(**self._seconds)
