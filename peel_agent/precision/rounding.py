"""Error-compensated rounding in the Gram metric: the nearest matrix of a weight set, as the layer's inputs see it.

The procedure is GPTQ's (arXiv 2210.17323, after optimal brain surgeon): columns are rounded one after another, and
what each loses is made up for by those that follow; then, with the codes fixed, scales are solved for in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peel_agent.precision.quantise import Grid, in_units
from peel_agent.records import WeightSet

DAMPING = 0.01
"""Added to the Gram matrix, relative to its mean diagonal."""

COLUMNS = 128
"""Columns that are rounded before the rest is brought up to date in one product."""

ROWS = 512
"""Output channels whose products with the metric are held at once."""

WIDE = 1024
"""Inputs from which on products are taken in float32; what is factorised or solved stays float64."""


def round_in_gram(matrix: Tensor, gram: Tensor, weight_set: WeightSet) -> Tensor:
    """The wanted matrix [out, in] rounded into the set, near in the metric of `gram` = X'X [in, in]; float64."""
    if not weight_set.restricts:
        return matrix
    wanted = matrix.to(torch.float64 if matrix.shape[1] < WIDE else torch.float32)
    metric = gram.to(torch.float64, copy=True)
    metric.diagonal().add_(DAMPING * float(metric.diagonal().mean()) or 1.0)
    grid = Grid.of(wanted, weight_set)
    codes = _compensated(wanted, metric, grid)
    scale = _scales(codes, wanted, metric.to(wanted.dtype), grid)
    return (scale.double() * in_units(codes, weight_set)).flatten(1)


def _compensated(wanted: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """Codes minus zero points [out, in], column by column with error feedback.

    With metric = R R', R upper triangular, errors E cost ||E R||^2, and each column's code can make up for what the
    columns before it leave in its own column of E R. That is GPTQ without the inverse (LDLQ, arXiv 2307.13304).
    Everything is laid out [in, out], a column of the matrix contiguous.
    """
    upper = torch.linalg.cholesky(metric.flip(0, 1)).flip(0, 1)
    feedback = (upper / upper.diagonal()).T.to(wanted.dtype).contiguous()
    wanted = wanted.T.contiguous()
    aims, codes, errors = wanted.clone(), torch.empty_like(wanted), torch.empty_like(wanted)
    scales, zeros = (units.squeeze(-1).T.contiguous() for units in (grid.scale, grid.zero))
    size = grid.weight_set.group if grid.weight_set.unit == "group" else len(wanted)
    for start in range(0, len(wanted), COLUMNS):
        stop = min(start + COLUMNS, len(wanted))
        for column in range(start, stop):
            unit = column // size
            column_grid = Grid(grid.weight_set, scales[unit], zeros[unit], grid.least, grid.most)
            codes[column] = column_grid.codes(aims[column] + feedback[column, start:column] @ errors[start:column])
            errors[column] = wanted[column] - scales[unit] * codes[column]
        aims[stop:].addmm_(feedback[stop:, start:stop], errors[start:stop])
    return codes.T.contiguous()


def _scales(codes: Tensor, wanted: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """The scales [out or 1, units, 1] that minimise the error in the metric with these codes, or else the old ones."""
    if grid.weight_set.kind.startswith("fp8"):
        return grid.scale
    if grid.weight_set.unit == "group":
        return _group_scales(codes, wanted, metric, grid)
    seen = codes @ metric
    over = (0, 1) if grid.weight_set.unit == "matrix" else (1,)
    numerator = (seen * wanted).sum(dim=over, keepdim=True)
    solved = numerator / (seen * codes).sum(dim=over, keepdim=True)
    return torch.where(solved.isfinite() & (solved > 0), solved, grid.scale.squeeze(1)).unsqueeze(1)


def _group_scales(codes: Tensor, wanted: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """Per output channel, the groups' scales are one small least-squares problem, as definite as the metric is."""
    parts = zip(codes.split(ROWS), wanted.split(ROWS), strict=True)
    solved = torch.cat([_solved(*part, metric, grid.weight_set) for part in parts])
    usable = (solved.isfinite() & (solved > 0)).all(dim=1, keepdim=True)
    return torch.where(usable, solved, grid.scale.double())


def _solved(codes: Tensor, wanted: Tensor, metric: Tensor, weight_set: WeightSet) -> Tensor:
    """The groups' scales [out, units, 1], NaN for a channel with a group whose codes are all 0."""
    grouped, seen = in_units(codes, weight_set), torch.empty_like(codes)
    right = torch.empty_like(grouped[..., :1])
    system = grouped.new_zeros(*grouped.shape[:2], grouped.shape[1])
    for unit, rows in enumerate(metric.split(weight_set.group)):
        torch.mm(grouped[:, unit], rows, out=seen)
        right[:, unit, 0] = torch.linalg.vecdot(seen, wanted)
        system[:, unit, : unit + 1] = torch.linalg.vecdot(
            in_units(seen, weight_set)[:, : unit + 1], grouped[:, : unit + 1]
        )
    factors, failed = torch.linalg.cholesky_ex(system.double())
    return torch.where(failed[:, None, None] == 0, torch.cholesky_solve(right.double(), factors), torch.nan)
