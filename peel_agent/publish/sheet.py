"""What a command tells in words and tables, before it is laid out for a terminal, a pipe or a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from peel_agent.errors import printable

Tone = Literal["plain", "verdict", "faint"]


@dataclass(frozen=True)
class Lines:
    """Sentences, each on a line of its own; those before a colon need not stand in a table."""

    texts: tuple[str, ...]
    tone: Tone = "plain"


@dataclass(frozen=True)
class Column:
    """`width` is the least in plain text; `rank` says which columns go first where there is no room, 0 never."""

    name: str
    width: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Grid:
    """`rows` have a text for each of the `columns`; the first column names the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def widths(self) -> list[int]:
        """Characters that each column needs."""
        return [
            max(column.width, len(column.name), *(len(row[place]) for row in self.rows), 0)
            for place, column in enumerate(self.columns)
        ]


Sheet: TypeAlias = "tuple[Lines | Grid, ...]"


def sheet(*parts: Lines | Grid) -> Sheet:
    """The parts with every text fit for a terminal: names may come out of a hostile checkpoint."""
    return tuple(_clean(part) for part in parts)


def _clean(part: Lines | Grid) -> Lines | Grid:
    if isinstance(part, Lines):
        return Lines(tuple(map(_indented, part.texts)), part.tone)
    return Grid(part.columns, tuple(tuple(map(printable, row)) for row in part.rows))


def _indented(text: str) -> str:
    return " " * (len(text) - len(text.lstrip(" "))) + printable(text.lstrip(" "))


def plain_text(parts: Sequence[Lines | Grid]) -> str:
    """The sheet for a pipe or a file: columns as wide as they need, whatever the width of anything."""
    return "\n".join(line for part in parts for line in (part.texts if isinstance(part, Lines) else _aligned(part)))


def _aligned(grid: Grid) -> list[str]:
    widths = grid.widths()
    rows = [tuple(column.name for column in grid.columns), *grid.rows]
    return [" ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
