"""Tensors of a DeepSpeed checkpoint, put together from the files of its ranks; imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.checkpoint_folder import unknown_tensor
from ..files.held_files import HeldFiles
from .format import RankedTensors


class DeepSpeedWeights:
    """`records.Weights` read by offset from files held open; raises TornCheckpoint as HeldFiles does."""

    def __init__(self, layout: RankedTensors) -> None:
        self._layout = layout
        files = {file for tensor in layout.tensors.values() for file in tensor.files}
        self._files = HeldFiles(layout.folder, layout.files, files, inside=layout.inside)

    def config(self) -> Mapping[str, Any]:
        return self._layout.config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._layout.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, contiguous, in the dtype that the model runs in."""
        if name not in self._layout.tensors:
            raise unknown_tensor(self._layout.folder, name)
        tensor = self._layout.tensors[name]
        stored = tensor.stored
        data = torch.empty(stored.size, dtype=torch.uint8)
        buffer, done = data.numpy().data, 0
        for file, offset, size in tensor.pieces():
            self._files.read(file, buffer[done : done + size], offset)
            done += size
        flat = data.view(getattr(torch, stored.dtype))
        return flat.as_strided(stored.shape, stored.strides).contiguous().to(getattr(torch, tensor.dtype))
