"""Progress for people: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0

BAR_SECONDS = 0.1
"""A bar is redrawn no more often than that."""

NARROW = 60
"""Columns of a terminal under which the bar and its words are short."""


class Meter:
    """Told how far a stage is, writes it with an estimate of what is left of that stage.

    `write` takes text as it is to appear; `now` gives seconds. On a terminal one line is redrawn; otherwise a line is
    written no more often than every LINE_SECONDS.
    """

    def __init__(self, write: Callable[[str], object], now: Callable[[], float], *, terminal: bool) -> None:
        self._write = write
        self._now = now
        self._bar = _Bar() if terminal else None
        self._stage = ""
        self.at = ""
        """How far it is: the stage, and its finished pieces."""
        self._began = self._told = now()

    @classmethod
    def on(cls, stream: TextIO, now: Callable[[], float]) -> Meter:
        """One that writes to a stream: bars where a line can be written over."""

        def write(text: str) -> None:
            stream.write(text)
            stream.flush()

        return cls(write, now, terminal=stream.isatty() and not _colour_console().is_dumb_terminal)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` equal pieces of the stage are finished."""
        now = self._now()
        if stage != self._stage:
            self._stage, self._began = stage, now
        left = (now - self._began) * (total - done) / done if done else 0.0
        self.at = f"{stage}: {done} of {total}"
        remaining = f"about {left:.0f} s left" if 0 < done < total else ""
        if self._bar is not None:
            if done in (0, total) or now - self._told >= BAR_SECONDS:
                self._write(self._bar.drawn(self.at, remaining, done, total))
                self._told = now
        elif now - self._told >= LINE_SECONDS:
            self._write(self.at + (f", {remaining}" if remaining else "") + "\n")
            self._told = now

    def close(self) -> None:
        """Clears the bar."""
        if self._bar is not None:
            self._write("\r\x1b[K")


class _Bar:
    """A bar of rich on one line. It is drawn when there is something new, by nobody else: no thread, no hidden cursor,
    so that a process that is killed leaves the terminal as it was.
    """

    def __init__(self) -> None:
        self._console: Console | None = None

    def drawn(self, at: str, remaining: str, done: int, total: int) -> str:
        """What to write to see it in the place of the last one, in one line of the terminal."""
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = self._console = self._console or _colour_console()
        is_narrow = console.width < NARROW
        words = f"{at}  {remaining.removeprefix('about ') if is_narrow else remaining}".rstrip()
        bar = BarColumn(bar_width=8 if is_narrow else 24, complete_style="cyan", finished_style="cyan")
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        progress = Progress(bar, text, console=console, auto_refresh=False)
        progress.add_task(words, total=total, completed=done)
        with console.capture() as captured:
            # The last column stays free: some terminals go on to the next line when it is written to.
            console.print(progress.get_renderable(), width=max(1, console.width - 1), end="")
        return "\r" + captured.get().rstrip("\n") + "\x1b[K"


def _colour_console() -> Console:
    """A console that draws into a string for a terminal of this size; without codes of colour under NO_COLOR."""
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True)
    return Console(file=io.StringIO(), force_terminal=True, color_system=None) if console.no_color else console
