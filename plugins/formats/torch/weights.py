"""Tensors of a file of torch.save as torch tensors: bytes by offset, then dtype, shape and strides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peel_agent.records import Weights

from ..pickles.torch_archive import View


class TorchWeights:
    """`records.Weights` over `raw`, which has the bytes of every view as a vector of uint8 and says when one is torn.

    A tensor comes contiguous and alone, whatever it shared its storage with.
    """

    def __init__(self, raw: Weights, views: Mapping[str, View]) -> None:
        self._raw = raw
        self._views = views

    def config(self) -> Mapping[str, Any]:
        return self._raw.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: view.shape for name, view in self._views.items()}

    def read(self, name: str) -> Tensor:
        flat = self._raw.read(name)  # [bytes], refuses an unknown name
        view = self._views[name]
        dtype: torch.dtype = getattr(torch, view.dtype)
        return flat.view(dtype).as_strided(view.shape, view.strides).contiguous()
