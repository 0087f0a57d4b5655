"""Which weight set a matrix of effective weights is in, told from its values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peel_agent.records import FULL_PRECISION, WeightSet

ROWS = 8
"""Rows that are looked at; a matrix is restricted when every one of them is."""

NEARLY = 1e-3
"""Magnitudes that differ by less than this fraction of the largest are one."""

GRID_TOLERANCE = 0.04
"""How far from a whole step a value may be: bfloat16 moves the largest one by 0.03 steps of four bits."""

BITS = (2, 3, 4)
GROUPS = (32, 64, 128)


def recognise(matrix: Tensor) -> WeightSet:
    """The set of a matrix [out, in], FULL_PRECISION when its values are in none that can be told from values.

    `sign` and `ternary` and integers of few bits leave few distinct magnitudes in a row, evenly spaced. Eight bits
    leave too many to be told from rounding to bfloat16, and weights stored as fp8 do not say their scale: name them in
    the configuration when they are latents, or else they count as free.
    """
    rows = matrix[torch.linspace(0, len(matrix) - 1, min(ROWS, len(matrix))).long()].float()
    if not bool(rows.any()):
        return FULL_PRECISION
    sizes = rows.abs()
    largest = sizes.amax(dim=1, keepdim=True)
    full, empty = sizes >= (1 - NEARLY) * largest, sizes <= NEARLY * largest
    uneven = bool((largest - largest[0]).abs().max() > NEARLY * largest.max())
    if bool((full & (largest > 0)).all()):
        return WeightSet.named("sign" if uneven else "sign-matrix")
    if bool((full | empty).all()):
        return WeightSet.named("ternary-channel" if uneven else "ternary")
    return next(_grids(rows), FULL_PRECISION)


def _grids(rows: Tensor) -> Iterator[WeightSet]:
    """The integer sets whose grids hold all values, the coarsest first."""
    for bits in BITS:
        if _on_grid(rows, bits):
            yield WeightSet.named(f"int{bits}-channel")
        for group in (size for size in GROUPS if rows.shape[1] % size == 0 and rows.shape[1] > size):
            if _on_grid(rows.unflatten(1, (-1, group)).flatten(0, 1), bits):
                yield WeightSet.named(f"int{bits}-g{group}")


def _on_grid(units: Tensor, bits: int) -> bool:
    """Whether every entry of every unit is a multiple of its largest magnitude over 2^(bits-1) - 1."""
    most = 2 ** (bits - 1) - 1
    steps = units / units.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) * most
    return bool((steps - steps.round()).abs().max() < GRID_TOLERANCE) and units.shape[1] >= 2 ** (bits + 1)
