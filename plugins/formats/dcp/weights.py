"""Tensors of a torch.distributed.checkpoint directory, put together from their chunks; imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.checkpoint_folder import read_into, refused, unknown_tensor
from ..files.held_files import HeldFiles
from .folder import ChunkedTensors
from .item import find_numbers
from .metadata import StoredChunk, StoredTensor
from .tiling import Box, intersection


class DcpWeights:
    """`records.Weights` read by offset from files held open; raises TornCheckpoint as HeldFiles does."""

    def __init__(self, layout: ChunkedTensors) -> None:
        self._layout = layout
        files = {chunk.item.file for tensor in layout.tensors.values() for chunk in tensor.chunks}
        self._files = HeldFiles(layout.folder, layout.files, files, inside=layout.inside)

    def config(self) -> Mapping[str, Any]:
        return self._layout.config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._layout.tensors.items()}

    def read(self, name: str) -> Tensor:
        shape = self._stored(name).shape
        return self.read_part(name, ((0,) * len(shape), shape))

    def read_part(self, name: str, box: Box) -> Tensor:
        """A box of one tensor, contiguous.

        Only the chunks that it meets are read, and of each only what lies from its first number there to its last.
        Raises CheckpointError for a box that is not inside the tensor.
        """
        stored = self._stored(name)
        dtype: torch.dtype = getattr(torch, stored.dtype)
        common = ((chunk, intersection((chunk.offsets, chunk.sizes), box)) for chunk in stored.chunks)
        shares = [(chunk, share) for chunk, share in common if share is not None]
        if sum(math.prod(sizes) for _, (_, sizes) in shares) != math.prod(box[1]):
            raise refused(
                f"tensor `{name}` of shape {stored.shape}",
                f"has no part of sizes {box[1]} at {box[0]}",
                remedy="ask for a part that is inside the shape in shapes()",
            )
        if len(shares) == 1:
            return self._read_share(*shares[0], dtype)
        whole = torch.empty(box[1], dtype=dtype)
        for chunk, (offsets, sizes) in shares:
            starts = (offset - start for offset, start in zip(offsets, box[0], strict=True))
            part = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
            whole[part] = self._read_share(chunk, (offsets, sizes), dtype)
        return whole

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._layout.tensors:
            raise unknown_tensor(self._layout.folder, name)
        return self._layout.tensors[name]

    def _read_share(self, chunk: StoredChunk, share: Box, dtype: torch.dtype) -> Tensor:
        """The numbers of a box inside one chunk, contiguous."""
        file, (offsets, sizes) = chunk.item.file, share
        with self._files.opened(file) as descriptor:
            view = find_numbers(descriptor, chunk, str(dtype).removeprefix("torch."))
            strides = view.strides
            starts = zip(offsets, chunk.offsets, strides, strict=True)
            first = sum((offset - start) * stride for offset, start, stride in starts)
            count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            read_into(descriptor, data.numpy().data, view.offset + first * dtype.itemsize, file)
        return data.view(dtype).as_strided(sizes, strides).contiguous()
