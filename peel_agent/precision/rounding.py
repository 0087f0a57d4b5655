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


def round_in_gram(matrix: Tensor, gram: Tensor, own: WeightSet) -> Tensor:
    """The wanted matrix [out, in] rounded into the set, near in the metric of `gram` = X'X [in, in]; float64."""
    if not own.restricts:
        return matrix
    wanted, metric = matrix.double(), gram.double().clone()
    metric.diagonal().add_(DAMPING * float(metric.diagonal().mean()) or 1.0)
    grid = Grid.of(wanted, own)
    codes = _compensated(wanted, metric, grid)
    scale = _scales(codes, wanted, metric, grid)
    return (scale * in_units(codes, own)).flatten(1)


def _compensated(wanted: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """Codes minus zero points [out, in], column by column with error feedback."""
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(metric)), upper=True)
    work, codes = wanted.clone(), torch.empty_like(wanted)
    scale, zero = (_by_column(own, wanted, grid.own) for own in (grid.scale, grid.zero))
    for start in range(0, wanted.shape[1], COLUMNS):
        stop = min(start + COLUMNS, wanted.shape[1])
        block, errors = work[:, start:stop], torch.empty_like(work[:, start:stop])
        for place in range(stop - start):
            column = start + place
            own = Grid(grid.own, scale[:, column], zero[:, column], grid.least, grid.most)
            codes[:, column] = own.codes(block[:, place])
            error = (block[:, place] - scale[:, column] * codes[:, column]) / upper[column, column]
            block[:, place:] -= error[:, None] * upper[column, column:stop]
            errors[:, place] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def _by_column(units: Tensor, like: Tensor, own: WeightSet) -> Tensor:
    """Scales or zero points [out or 1, units, 1] as [out, in]."""
    size = own.group if own.unit == "group" else like.shape[1]
    return units.expand(like.shape[0], -1, size).flatten(1)


def _scales(codes: Tensor, wanted: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """The scales [out or 1, units, 1] that minimise the error in the metric with these codes, or else the old ones."""
    if grid.own.kind.startswith("fp8"):
        return grid.scale
    seen = codes @ metric
    if grid.own.unit == "group":
        return _group_scales(codes, wanted, metric, grid)
    over = (0, 1) if grid.own.unit == "matrix" else (1,)
    numerator = (seen * wanted).sum(dim=over, keepdim=True)
    solved = numerator / (seen * codes).sum(dim=over, keepdim=True)
    return torch.where(solved.isfinite() & (solved > 0), solved, grid.scale.squeeze(1)).unsqueeze(1)


def _group_scales(codes: Tensor, wanted: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """Per output channel, the groups' scales are one small least-squares problem."""
    grouped = in_units(codes, grid.own)
    seen = [own @ rows for own, rows in zip(grouped.unbind(1), metric.split(grid.own.group), strict=True)]
    system = torch.stack([in_units(own * codes, grid.own).sum(-1) for own in seen], dim=1)
    right = (grouped * in_units(wanted @ metric, grid.own)).sum(-1)
    solved = torch.linalg.lstsq(system, right[..., None], driver="gelsd" if system.is_cpu else None).solution
    usable = (solved.isfinite() & (solved > 0)).all(dim=1, keepdim=True)
    return torch.where(usable, solved, grid.scale)
