"""Weights of a Megatron-core checkpoint as transformers has them: rows of Megatron's tensors; imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peel_agent.errors import CheckpointError

from ..dcp.weights import DcpWeights
from .names import Part


class MegatronWeights:
    """`records.Weights` over the tensors of `raw`: of each only the layer and the rows that are asked for are read."""

    def __init__(self, raw: DcpWeights, parts: Mapping[str, Part]) -> None:
        self._raw = raw
        self._parts = parts
        self._widths = {name: shape[-1] for name, shape in raw.shapes().items()}

    def config(self) -> Mapping[str, Any]:
        return self._raw.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self._parts.items()}

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            raise CheckpointError(f"the checkpoint has no tensor `{name}`", remedy="ask for one of those in shapes()")
        part = self._parts[name]
        stretches = [self._stretch(part, start, stop) for start, stop in part.rows]
        rows = stretches[0] if len(stretches) == 1 else torch.cat(stretches)
        return rows.t().contiguous() if part.transposed else rows

    def _stretch(self, part: Part, start: int, stop: int) -> Tensor:
        """Rows from `start` to before `stop`: [rows, columns], or [rows] of a vector."""
        columns = (self._widths[part.stored],) if len(part.shape) == 2 else ()
        offsets, sizes = (start, *(0 for _ in columns)), (stop - start, *columns)
        if part.layer is None:
            return self._raw.read_part(part.stored, (offsets, sizes))
        return self._raw.read_part(part.stored, ((part.layer, *offsets), (1, *sizes))).reshape(sizes)
