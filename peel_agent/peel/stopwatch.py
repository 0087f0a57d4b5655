"""Adds up seconds by kind of work and tells how far it is; clock and listener are handed in."""

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

    def __init__(self, clock: Callable[[], float], progress: Progress | None = None) -> None:
        self._clock = clock
        self.progress = progress or _silence
        self._seconds: dict[Kind, float] = {"capture": 0.0, "solve": 0.0, "score": 0.0}

    @contextmanager
    def __call__(self, kind: Kind) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[kind] += self._clock() - start

    def each(self, kind: Kind, items: Iterator[Item]) -> Iterator[Item]:
        """The items, with the time that it takes to come by each of them added to `kind`."""
        while True:
            with self(kind):
                item = next(items, None)
            if item is None:
                return
            yield item

    def timing(self) -> Timing:
        return Timing(**self._seconds)
