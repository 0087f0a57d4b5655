"""Figures of a bench beside those of an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def over_stored(figures: Any, stored: Any) -> Any:
    """Every number over the one stored in its place, in the same shape; None where there is nothing to compare."""
    if isinstance(figures, Mapping):
        known = stored if isinstance(stored, Mapping) else {}
        ratios = {str(key): over_stored(value, known.get(str(key))) for key, value in figures.items()}
        return {key: ratio for key, ratio in ratios.items() if ratio is not None} or None
    if isinstance(figures, int | float) and isinstance(stored, int | float) and stored:
        return round(figures / stored, 3)
    return None
