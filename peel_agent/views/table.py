"""Rows under named columns: what charts draw, and what a program reads out of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool | None

DIGITS = 5
"""Significant digits that a page keeps of a number."""


@dataclass(frozen=True)
class Table:
    """`rows` have a value for each of the `columns`."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Value, ...]]

    def form(self) -> dict[str, Any]:
        """The table as JSON values; texts of a column are numbers, of their places in `texts`, and said once."""
        texts: dict[str, list[str]] = {}
        columns: list[list[Value]] = []
        for place, name in enumerate(self.columns):
            values = [row[place] for row in self.rows]
            if any(isinstance(value, str) for value in values):
                place_by_value = {
                    value: index for index, value in enumerate(dict.fromkeys(v for v in values if v is not None))
                }
                texts[name] = [str(value) for value in place_by_value]
                columns.append([None if value is None else place_by_value[value] for value in values])
            else:
                columns.append([_short(value) for value in values])
        rows = [list(row) for row in zip(*columns, strict=True)]
        return {"columns": list(self.columns), "texts": texts, "rows": rows}

    def records(self) -> list[dict[str, Value]]:
        """One object a row."""
        return [dict(zip(self.columns, map(_short, row), strict=True)) for row in self.rows]


def _short(value: Value) -> Value:
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 10**DIGITS else rounded
