"""Tensors of a safetensors checkpoint as torch tensors; the one module of the formats that imports torch."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peel_agent.errors import CheckpointError
from peel_agent.records import FileStamp

from .checkpoint_folder import close_all, open_inside, read_into, torn_file
from .safetensors_reader import Layout

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class SafetensorsWeights:
    """`records.Weights` read by offset from files held open, so that a rotated checkpoint can be read to its end.

    Every read raises TornCheckpoint when its file changed since the layout was read.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, close_all, self._descriptors)
        self._stamps = {stamp.name: stamp for stamp in layout.files}
        for name in sorted({file for file, _ in layout.tensors.values()}):
            self._descriptors[name], stamp = open_inside(layout.folder, name)
            self._check_unchanged(stamp)

    def config(self) -> Mapping[str, Any]:
        return self._layout.config

    def metadata(self) -> Mapping[str, str]:
        """The texts in the headers of the files; torchao says there how its tensors are put together."""
        return self._layout.texts

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: extent.shape for name, (_, extent) in self._layout.tensors.items()}

    def read(self, name: str) -> Tensor:
        if name not in self._layout.tensors:
            raise CheckpointError(
                f"{self._layout.folder} has no tensor `{name}`", remedy="ask for one of the names in shapes()"
            )
        file, extent = self._layout.tensors[name]
        descriptor = self._descriptors[file]
        data = torch.empty(extent.size, dtype=torch.uint8)
        try:
            read_into(descriptor, data.numpy().data, extent.offset, file)
            status = os.fstat(descriptor)
        except OSError as error:
            raise torn_file(file, f"cannot be read any more: {error.strerror}") from error
        self._check_unchanged(FileStamp(file, status.st_size, status.st_mtime_ns, status.st_ino))
        return data.view(DTYPES[extent.dtype]).reshape(extent.shape)

    def _check_unchanged(self, now: FileStamp) -> None:
        if now != self._stamps[now.name]:
            raise torn_file(now.name, "changed while it was read")
