"""The quantisers of the weight sets: latent weights to the effective ones that a low-bit forward pass uses.

Matrices are [out, in], a row an output channel. `sign` is the paper's binarisation (arXiv 2605.02853), `ternary` the
absmean quantiser of BitNet b1.58 (arXiv 2402.17764), `int` round-to-nearest with the largest value of a unit at the
end of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peel_agent.records import WeightSet

_FP8 = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a matrix, [out or 1, units, 1] each, and the codes that its entries may have.

    The value of code c is scale * (c - zero). `least` and `most` bound the codes; for `sign` only these two exist.
    """

    weight_set: WeightSet
    scale: Tensor
    zero: Tensor
    least: int
    most: int

    @classmethod
    def of(cls, matrix: Tensor, weight_set: WeightSet) -> Grid:
        """The grid that the quantiser of this set lays over a matrix [out, in]."""
        units = in_units(matrix, weight_set)
        over = (0, 1, 2) if weight_set.unit == "matrix" else (2,)
        none = torch.zeros_like(units.amax(dim=over, keepdim=True))
        if weight_set.kind in ("sign", "ternary"):
            return cls(weight_set, units.abs().mean(dim=over, keepdim=True), none, -1, 1)
        if weight_set.kind in _FP8:
            most = torch.finfo(_FP8[weight_set.kind]).max
            return cls(weight_set, units.abs().amax(dim=over, keepdim=True) / most, none, 0, 0)
        if not weight_set.affine:
            most = 2 ** (weight_set.bits - 1) - 1
            return cls(weight_set, units.abs().amax(dim=over, keepdim=True) / most, none, -most, most)
        low = units.amin(dim=over, keepdim=True).clamp(max=0)
        high = units.amax(dim=over, keepdim=True).clamp(min=0)
        most = 2**weight_set.bits - 1
        scale = (high - low) / most
        return cls(weight_set, scale, torch.round(-low / _nonzero(scale)), 0, most)

    def codes(self, units: Tensor) -> Tensor:
        """What is multiplied by the scale, for entries [out, units, size]: the nearest code minus the zero point."""
        if self.weight_set.kind == "sign":
            return torch.where(units >= 0, 1.0, -1.0).to(units.dtype)
        steps = units / _nonzero(self.scale)
        if self.weight_set.kind in _FP8:
            dtype = _FP8[self.weight_set.kind]
            most = torch.finfo(dtype).max  # beyond it e5m2 has infinity, and error feedback goes beyond it
            return steps.clamp(-most, most).to(torch.float32).to(dtype).to(units.dtype)
        return (torch.round(steps) + self.zero).clamp(self.least, self.most) - self.zero


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def in_units(matrix: Tensor, weight_set: WeightSet) -> Tensor:
    """A matrix [out, in] as [out, units, size]. ValueError when a group does not divide the width."""
    if weight_set.unit != "group":
        return matrix[:, None, :]
    if matrix.shape[1] % weight_set.group:
        raise ValueError(f"groups of {weight_set.group} do not divide a width of {matrix.shape[1]}")
    units: Tensor = matrix.unflatten(1, (-1, weight_set.group))
    return units


def quantise(matrix: Tensor, weight_set: WeightSet) -> Tensor:
    """The effective weights [out, in] of a matrix of latents, in its own dtype. ValueError as `in_units`."""
    if not weight_set.restricts:
        return matrix
    grid = Grid.of(matrix, weight_set)
    return (grid.scale * grid.codes(in_units(matrix, weight_set))).flatten(1)


def straight_through(matrix: Tensor, weight_set: WeightSet) -> Tensor:
    """The effective weights, with the gradient of the identity: what low-bit training differentiates."""
    if not weight_set.restricts:
        return matrix
    effective: Tensor = matrix + (quantise(matrix, weight_set) - matrix).detach()
    return effective


def latents_of(effective: Tensor, weight_set: WeightSet) -> Tensor:
    """Latents [out, in] whose quantiser gives these effective weights, which must be in the set.

    Absmean quantisers see the zeros in the mean, so the others must be larger for it. Other sets hold their own fixed
    points; an integer one does where the largest entry of a unit is at the end of the grid.
    """
    if weight_set.kind != "ternary":
        return effective
    over = (0, 1) if weight_set.unit == "matrix" else (1,)
    filled = (effective != 0).to(effective.dtype).mean(dim=over, keepdim=True)
    return effective / torch.where(filled == 0, 1.0, filled)
