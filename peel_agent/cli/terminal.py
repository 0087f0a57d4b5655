"""A sheet on a terminal: tables as wide as it is, colours where it has them; as plain text anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from peel_agent.publish import Grid, Lines, Sheet, plain_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLOURS = {"below": "red", "undecided": "yellow", "above": "green", "not_measured": "dim", "differ": "yellow"}
"""Of a cell that is one of these words; the word says it too."""

TONES = {"plain": "", "verdict": "bold", "faint": "dim"}

LEAST_COLUMNS = 3
"""A table that has no room for so many is a list instead."""


def show(parts: Sheet, file: TextIO) -> None:
    """Writes a sheet. What is not a terminal gets plain text, in columns as wide as they need."""
    if not file.isatty():
        print(plain_text(parts), file=file, flush=True)
        return
    console = console_of(file)
    for part in parts:
        if isinstance(part, Lines):
            for text in part.texts:
                console.print(_text(text, TONES[part.tone]))
        else:
            _show_grid(part, console)
    file.flush()


def console_of(file: TextIO, width: int | None = None) -> Console:
    """A console that writes to a terminal: no markup, no emoji; no codes at all under NO_COLOR and TERM=dumb."""
    from rich.console import Console

    console = Console(file=file, markup=False, emoji=False, highlight=False, width=width, force_terminal=True)
    if console.no_color or console.is_dumb_terminal:
        return Console(file=file, markup=False, emoji=False, highlight=False, width=width, color_system=None)
    return console


def _text(words: str, style: str) -> Text:
    from rich.text import Text

    return Text(words, style=style)


def _show_grid(grid: Grid, console: Console) -> None:
    """As a table without the columns that there is no room for, which are named; as a list on a narrow terminal."""
    kept = columns_that_fit(grid, console.width)
    if kept is None:
        _show_list(grid, console)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place in kept:
        table.add_column(grid.columns[place].name, no_wrap=True)
    for row in grid.rows:
        table.add_row(*(_text(row[place], COLOURS.get(row[place], "")) for place in kept))
    console.print(table)
    gone = [grid.columns[place].name for place in filled_columns(grid) if place not in kept]
    if gone:
        console.print(_text(f"no room for {', '.join(gone)}: a wider terminal or JSON has them", "dim"))


def columns_that_fit(grid: Grid, width: int) -> list[int] | None:
    """The places of the columns that are shown: those with nothing in them go, then by rank what there is no room for.

    None when a table has no room at all.
    """
    needed = [
        max(len(column.name), *(_cells(row[place]) for row in grid.rows), 0)
        for place, column in enumerate(grid.columns)
    ]
    kept = filled_columns(grid)
    while sum(needed[place] + 2 for place in kept) - 2 > width:
        ranked = [place for place in kept if grid.columns[place].rank]
        if not ranked:
            return None
        kept.remove(min(ranked, key=lambda place: grid.columns[place].rank))
    return kept if len(kept) >= min(LEAST_COLUMNS, len(grid.columns)) else None


def filled_columns(grid: Grid) -> list[int]:
    """The places of the columns that hold something, and of those that are always shown."""
    return [
        place
        for place, column in enumerate(grid.columns)
        if not column.rank or any(row[place] not in ("", "-") for row in grid.rows)
    ]


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _show_list(grid: Grid, console: Console) -> None:
    """One paragraph a row: its name, and below it each of its columns that hold something."""
    from rich.padding import Padding
    from rich.text import Text

    for row in grid.rows:
        console.print(_text(row[0], "bold"))
        for column, cell in zip(grid.columns[1:], row[1:], strict=True):
            if cell in ("", "-"):
                continue
            label = column.name.partition(" [")[0]
            line = Text.assemble((f"{label} ", "dim"), (cell, COLOURS.get(cell, "")))
            console.print(Padding(line, (0, 0, 0, 2)))
