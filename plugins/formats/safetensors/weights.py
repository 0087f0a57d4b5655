"""Tensors of a safetensors checkpoint as torch tensors; imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.checkpoint_folder import unknown_tensor
from ..files.held_files import HeldFiles
from .reader import LocatedTensors


class SafetensorsWeights:
    """`records.Weights` read by offset from files held open; raises TornCheckpoint as HeldFiles does."""

    def __init__(self, layout: LocatedTensors) -> None:
        self._layout = layout
        self._files = HeldFiles(layout.folder, layout.files, {file for file, _ in layout.tensors.values()})

    def config(self) -> Mapping[str, Any]:
        return self._layout.config

    def metadata(self) -> Mapping[str, str]:
        """The texts in the headers of the files; torchao says there how its tensors are put together."""
        return self._layout.texts

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: extent.shape for name, (_, extent) in self._layout.tensors.items()}

    def read(self, name: str) -> Tensor:
        if name not in self._layout.tensors:
            raise unknown_tensor(self._layout.folder, name)
        file, extent = self._layout.tensors[name]
        data = torch.empty(extent.size, dtype=torch.uint8)
        self._files.read(file, data.numpy().data, extent.offset)
        return data.view(getattr(torch, extent.dtype)).reshape(extent.shape)
