"""The tensors of a base model with an adapter merged into them, one at a time; imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peel_agent.records import Weights

from ..files.checkpoint_folder import unknown_tensor
from .merger import Merger, Pair


class MergedWeights:
    """`records.Weights` of base + adapter; what is stored in 16 bits comes in float32, in which it is merged.

    Rounding the sum to bfloat16, as a merged checkpoint of that dtype has it, would lose most of a small adapter.
    """

    def __init__(self, path: Path, base: Weights, adapter: Weights, merger: Merger) -> None:
        self._path = path
        self._base = base
        self._adapter = adapter
        self._merger = merger

    def config(self) -> Mapping[str, Any]:
        return self._merger.config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: origin.shape for name, origin in self._merger.origins.items()}

    def read(self, name: str) -> Tensor:
        if name not in self._merger.origins:
            raise unknown_tensor(self._path, name)
        origin = self._merger.origins[name]
        stored = self._adapter.read(origin.replacement) if origin.replacement else self._base.read(origin.base)
        if not stored.is_floating_point():
            return stored
        tensor = _widened(stored)
        if origin.rows:
            rows = self._adapter.read(origin.rows).to(tensor.dtype)
            return tensor.index_copy(0, torch.tensor(origin.tokens), rows)
        if origin.bias:
            tensor = tensor + origin.scaling * self._adapter.read(origin.bias).to(tensor.dtype)
        return tensor if origin.pair is None else self._added(tensor, origin.pair)

    def _added(self, weight: Tensor, pair: Pair) -> Tensor:
        """The weight [outputs, inputs], or [inputs, outputs] when transposed, with a pair merged into it."""
        a, b = (self._adapter.read(name).to(weight.dtype) for name in (pair.a, pair.b))
        change = (b @ a) * pair.scaling
        merged = weight + (change.T if pair.is_transposed else change)
        if pair.magnitude is None:
            return merged
        # Weight-decomposed adaptation (DoRA, arXiv 2402.09353, equation 5): each output has a length of its own.
        inputs = 0 if pair.is_transposed else 1
        lengths = torch.linalg.vector_norm(merged, dim=inputs)
        factors: Tensor = self._adapter.read(pair.magnitude).to(weight.dtype) / lengths
        return merged * factors.unsqueeze(inputs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
