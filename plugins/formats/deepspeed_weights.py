"""Tensors of a DeepSpeed checkpoint, put together from the files of its ranks; imports torch."""

from __future__ import annotations

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
from .deepspeed_folder import Layout

MAX_OPEN = 256
"""Files held open at once. A run on more ranks has more; the rest are opened for each read."""


class DeepSpeedWeights:
    """`records.Weights` read by offset, from files held open so that a rotated checkpoint can be read to its end.

    Every read raises TornCheckpoint when a file that it needs changed since the layout was read.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, close_all, self._descriptors)
        self._stamps = {stamp.name: stamp for stamp in layout.files}
        files = {file for tensor in layout.tensors.values() for file in tensor.files}
        for file in sorted(files)[:MAX_OPEN]:
            self._descriptors[file] = self._open(file)

    def config(self) -> Mapping[str, Any]:
        return self._layout.config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._layout.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, contiguous, in the dtype that the model runs in."""
        if name not in self._layout.tensors:
            raise CheckpointError(
                f"{self._layout.folder} has no tensor `{name}`", remedy="ask for one of the names in shapes()"
            )
        tensor = self._layout.tensors[name]
        stored = tensor.stored
        data = torch.empty(stored.size, dtype=torch.uint8)
        buffer, done = data.numpy().data, 0
        for file, offset, size in tensor.pieces():
            with self._opened(file) as descriptor:
                read_into(descriptor, buffer[done : done + size], offset, file)
            done += size
        flat = data.view(getattr(torch, stored.dtype))
        return flat.as_strided(stored.shape, stored.strides).contiguous().to(getattr(torch, tensor.dtype))

    @contextmanager
    def _opened(self, file: str) -> Iterator[int]:
        held = self._descriptors.get(file)
        descriptor = self._open(file) if held is None else held
        try:
            yield descriptor
            status = os.fstat(descriptor)
        except OSError as error:
            raise torn_file(file, f"cannot be read any more: {error.strerror}") from error
        finally:
            if held is None:
                os.close(descriptor)
        self._check(FileStamp(self._layout.inside + file, status.st_size, status.st_mtime_ns, status.st_ino))

    def _open(self, file: str) -> int:
        try:
            descriptor, stamp = open_inside(self._layout.folder, self._layout.inside + file)
        except IncompleteCheckpoint as error:
            raise torn_file(file, f"is gone: {error.what}") from error
        try:
            self._check(stamp)
        except CheckpointError:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, now: FileStamp) -> None:
        if now != self._stamps[now.name]:
            raise torn_file(now.name, "changed while it was read")
