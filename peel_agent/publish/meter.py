"""Progress for people: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

from collections.abc import Callable

LINE_SECONDS = 30.0
BAR_WIDTH = 24


class Meter:
    """Told how far a stage is, writes it with an estimate of what is left of that stage.

    `write` takes text as it is to appear; `now` gives seconds. On a terminal each call redraws one line; otherwise a
    line is written no more often than every LINE_SECONDS.
    """

    def __init__(self, write: Callable[[str], object], now: Callable[[], float], *, terminal: bool) -> None:
        self._write = write
        self._now = now
        self._terminal = terminal
        self._stage = ""
        self.at = ""
        """How far it is: the stage, and its finished pieces."""
        self._began = self._told = now()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` equal pieces of the stage are finished."""
        now = self._now()
        if stage != self._stage:
            self._stage, self._began = stage, now
        left = (now - self._began) * (total - done) / done if done else 0.0
        self.at = f"{stage}: {done} of {total}"
        words = self.at + (f", about {left:.0f} s left" if 0 < done < total else "")
        if self._terminal:
            filled = BAR_WIDTH * done // total
            self._write(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {words}\x1b[K")
            self._told = now
        elif now - self._told >= LINE_SECONDS:
            self._write(words + "\n")
            self._told = now

    def close(self) -> None:
        """Clears the bar."""
        if self._terminal:
            self._write("\r\x1b[K")
