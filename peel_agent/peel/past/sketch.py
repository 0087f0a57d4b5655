"""Random projections of weights, small enough to be kept when the checkpoint itself is gone (method.md 4b).

A matrix W [r, c] becomes S W R with random signs S [k, r] and R [c, k], so that ||S (W - W') R|| / ||S W' R|| estimates
||W - W'|| / ||W'||. The signs depend on the sizes only: sketches of two checkpoints can be subtracted.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from peel_agent.peel.past.change import Moved, matrices
from peel_agent.records import Block, Sketches

SIZE = 32
"""k: a sketch has at most k x k numbers; a dense change is told to about 5 %, one of rank one to about 20 %."""


class Sketcher:
    """Collects the sketches of one checkpoint, block by block."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, block: Block, weights: Mapping[str, Tensor]) -> None:
        for name, weight in matrices(weights):
            full = f"{block.name}.{name}"
            self._values[full] = base64.b64encode(sketch(weight).numpy().tobytes()).decode()
            self._shapes[full] = tuple(weight.shape)

    def finished(self, dtype: str) -> Sketches:
        return Sketches(self._values, self._shapes, dtype)


def moved_in_sketches(block: Block, weights: Mapping[str, Tensor], before: Sketches) -> dict[str, Moved] | None:
    """How far each matrix of a block moved, estimated from the sketches; None for another architecture."""
    moved = {}
    for name, weight in matrices(weights):
        full = f"{block.name}.{name}"
        if before.shapes.get(full) != tuple(weight.shape):
            return None
        earlier = torch.from_numpy(np.frombuffer(base64.b64decode(before.values[full]), dtype=np.float32).copy())
        now = sketch(weight).flatten()
        moved[name] = Moved(_squared(now - earlier), _squared(earlier))
    return moved


def sketch(weight: Tensor) -> Tensor:
    """The sketch of a weight, float32 on the CPU; a weight of no more than k x k numbers is kept as it is."""
    if weight.numel() <= SIZE * SIZE:
        return weight.detach().cpu().float().contiguous()
    projected = weight.detach().float()
    projected = projected if projected.dim() == 2 else projected.reshape(1, -1)
    for _ in range(2):  # the columns, then the rows
        if projected.shape[1] > SIZE:
            projected = projected @ _signs(projected.shape[1]).to(projected.device)
        projected = projected.T
    return projected.cpu().contiguous()


@lru_cache(maxsize=16)
def _signs(count: int) -> Tensor:
    """[count, k] of +-1/sqrt(k), the same for every weight of this size."""
    generator = torch.Generator().manual_seed(count)
    signs = torch.randint(0, 2, (count, SIZE), generator=generator, dtype=torch.int8).float()
    return signs.mul(2.0).sub(1.0).div(SIZE**0.5)


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())
