"""Tensors of a torch.distributed.checkpoint directory, put together from their chunks; imports torch."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import FileStamp

from .checkpoint_folder import close_all, open_inside, read_into, torn_file
from .dcp_item import find_numbers
from .dcp_metadata import Chunk, StoredTensor
from .dcp_tiling import Box, intersection
from .distributed_checkpoint import Layout

MAX_OPEN = 256
"""Files held open at once. A run on more ranks has more files; the rest are opened for each read."""


class DcpWeights:
    """`records.Weights` read by offset, from files held open so that a rotated checkpoint can be read to its end.

    Every read raises TornCheckpoint when its file changed since the layout was read.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, close_all, self._descriptors)
        self._stamps = {stamp.name: stamp for stamp in layout.files}
        chunks = (chunk for tensor in layout.tensors.values() for chunk in tensor.chunks)
        for name in sorted({chunk.item.file for chunk in chunks})[:MAX_OPEN]:
            self._descriptors[name] = self._open(name)

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
            raise CheckpointError(
                f"tensor `{name}` of shape {stored.shape} has no part of sizes {box[1]} at {box[0]}",
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
            raise CheckpointError(
                f"{self._layout.folder} has no tensor `{name}`", remedy="ask for one of the names in shapes()"
            )
        return self._layout.tensors[name]

    def _read_share(self, chunk: Chunk, share: Box, dtype: torch.dtype) -> Tensor:
        """The numbers of a box inside one chunk, contiguous."""
        file, (offsets, sizes) = chunk.item.file, share
        with self._opened(file) as descriptor:
            numbers = find_numbers(descriptor, chunk, str(dtype).removeprefix("torch."))
            strides = numbers.strides
            starts = zip(offsets, chunk.offsets, strides, strict=True)
            first = sum((offset - start) * stride for offset, start, stride in starts)
            count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            read_into(descriptor, data.numpy().data, numbers.position + first * dtype.itemsize, file)
        return data.view(dtype).as_strided(sizes, strides).contiguous()

    @contextmanager
    def _opened(self, file: str) -> Iterator[int]:
        """The descriptor of a file. Whatever goes wrong, a file that changed meanwhile is torn and not damaged."""
        held = self._descriptors.get(file)
        descriptor = self._open(file) if held is None else held
        try:
            yield descriptor
        except OSError as error:
            raise torn_file(file, f"cannot be read any more: {error.strerror}") from error
        except CheckpointError:
            self._check_unchanged(file, descriptor)
            raise
        else:
            self._check_unchanged(file, descriptor)
        finally:
            if held is None:
                os.close(descriptor)

    def _open(self, file: str) -> int:
        name = self._layout.inside + file
        try:
            descriptor, stamp = open_inside(self._layout.folder, name)
        except IncompleteCheckpoint as error:
            raise torn_file(file, f"is gone: {error.what}") from error
        if stamp != self._stamps[name]:
            os.close(descriptor)
            raise torn_file(file, "changed while it was read")
        return descriptor

    def _check_unchanged(self, file: str, descriptor: int) -> None:
        name = self._layout.inside + file
        status = os.fstat(descriptor)
        if FileStamp(name, status.st_size, status.st_mtime_ns, status.st_ino) != self._stamps[name]:
            raise torn_file(file, "changed while it was read")
