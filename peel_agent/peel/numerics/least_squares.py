"""Ridge regression from running normal equations (method.md 2).

Products of a chunk are taken in the features' own dtype and summed over chunks in float64; a Gram matrix is factorised
once a ridge, and one factor serves every target.
Residuals are never taken from the normal equations: callers measure them in a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

RIDGES = (1e-2, 1e-4, 1e-6, 1e-8)
"""Ridges relative to the mean diagonal of the Gram matrix, strongest first; one is picked on `select`."""

DEAD_COLUMN = 1e-12
"""A feature whose energy is below this fraction of the largest one carries nothing; its weights are zero."""

PRODUCT_ROWS = 1024
"""Rows whose products are summed in float32, before the sum goes on in float64."""

STRIPS = 4
"""Into so many strips of rows a Gram matrix is cut; more of them spare little, and small products are slow."""

GRAM_SHARE = (1 + 1 / STRIPS) / 2
"""What of a Gram matrix is multiplied out."""

TOKENS_PER_COLUMN = 2
"""With fewer fit tokens than this times the number of unknowns a row, a least-squares fit is meaningless."""


@dataclass(frozen=True)
class Solution:
    """weight [p, q] (float64) minimising ||X W - Y||^2 + ridge * mean(diag(X'X)) * ||W||^2, and how it was found.

    `condition` is the ratio of the extreme eigenvalues of the regularised Gram (from the Cholesky diagonal: a lower
    bound; exact for `eigen`). `rank` counts the live columns that were solved for (for `eigen`: the numerical rank).
    """

    weight: Tensor
    ridge: float
    status: Literal["cholesky", "eigen"]
    condition: float
    rank: int


def tokens_needed(columns: int) -> int:
    """The fit tokens with which a fit of this many columns can be trusted."""
    return TOKENS_PER_COLUMN * columns


def shortfall(tokens: int, columns: int) -> str | None:
    """Why a fit of this many columns to this many fit tokens cannot be trusted; None when it can."""
    needed = tokens_needed(columns)
    if tokens >= needed:
        return None
    return f"{tokens:,} fit tokens; a fit of {columns:,} columns needs {needed:,}"


class Gram:
    """Running X'X [p, p] and X'Y [p, q]: update, merge, solve. With `intercept`, X gets a column of ones at its end.

    X'X is its own mirror image: of STRIPS strips of rows only what is left of and on the diagonal is added up.
    """

    def __init__(self, features: int, targets: int, *, intercept: bool, device: torch.device) -> None:
        self.columns = features + int(intercept)
        self._intercept = intercept
        self._lower = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=device)
        """What lies to the right of the strips is set by `_whole`."""
        self._cross = torch.zeros(self.columns, targets, dtype=torch.float64, device=device)
        bounds = [features * strip // STRIPS for strip in range(STRIPS + 1)]
        self._strips = [slice(start, stop) for start, stop in pairwise(bounds)]

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Adds rows: features [..., p] and targets [..., q], PRODUCT_ROWS at a time."""
        x, y = features.flatten(0, -2), targets.flatten(0, -2)
        for rows, wanted in zip(x.split(PRODUCT_ROWS), y.split(PRODUCT_ROWS), strict=True):
            for strip in self._strips:
                self._lower[strip, : strip.stop].add_(rows[:, strip].T @ rows[:, : strip.stop])
            self._cross[: x.shape[1]].add_(rows.T @ wanted)
            if self._intercept:
                self._add_ones(rows, wanted)

    def _add_ones(self, rows: Tensor, wanted: Tensor) -> None:
        """What the column of ones adds. It is no part of the products: tensor cores take widths that 4 divides."""
        self._lower[-1, :-1] += rows.sum(dim=0, dtype=torch.float64)
        self._lower[-1, -1] += len(rows)
        self._cross[-1] += wanted.sum(dim=0, dtype=torch.float64)

    def _whole(self) -> Tensor:
        """X'X, its upper part set from the lower one."""
        for strip in self._strips:
            self._lower[strip, strip.stop :] = self._lower[strip.stop :, strip].T
        return self._lower

    @property
    def metric(self) -> Tensor:
        """X'X [p, p] of the features alone, float64."""
        return self._whole()[:-1, :-1] if self._intercept else self._whole()

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of X @ weight for a weight [p, q], the intercept's row included."""
        return float((weight * (self._whole() @ weight)).sum().clamp(min=0).sqrt())

    def merge(self, other: Gram) -> None:
        """Adds the rows that another Gram of the same shape has seen."""
        self._lower += other._lower
        self._cross += other._cross

    def solve(self, ridges: tuple[float, ...] = RIDGES) -> tuple[Solution, ...]:
        """One solution for each relative ridge, in the order given."""
        whole = self._whole()
        diagonal = whole.diagonal()
        live = diagonal > DEAD_COLUMN * diagonal.max()
        gram, cross = whole[live][:, live], self._cross[live]
        scale = float(diagonal.mean())
        return tuple(self._solve_one(gram, cross, live, ridge, ridge * scale) for ridge in ridges)

    def _solve_one(self, gram: Tensor, cross: Tensor, live: Tensor, ridge: float, penalty: float) -> Solution:
        weight = torch.zeros_like(self._cross)
        regularised = gram.clone()
        regularised.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(regularised)
        if int(failed) == 0:
            weight[live] = torch.cholesky_solve(cross, factor)
            pivots = factor.diagonal()
            condition = float((pivots.max() / pivots.min()) ** 2) if len(pivots) else 1.0
            return Solution(weight, ridge, "cholesky", condition, len(pivots))
        values, vectors = torch.linalg.eigh(regularised)
        kept = values > values.max() * len(values) * torch.finfo(torch.float64).eps
        inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
        weight[live] = vectors @ (inverse[:, None] * (vectors.T @ cross))
        condition = float(values.max() / values[kept].min())
        return Solution(weight, ridge, "eigen", condition, int(kept.sum()))
