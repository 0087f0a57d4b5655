"""The header of a safetensors file: 8 bytes of length n, n bytes of JSON, then the tensors one after another.

Everything is checked before it is believed: a checkpoint may be half written, damaged or hostile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from peel_agent.errors import IncompleteCheckpoint

from ..files.checkpoint_folder import WAIT, read_into, refused
from ..pickles.torch_tensors import DTYPE_BYTES, MAX_DIMENSIONS, SAFETENSORS, is_count

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_TENSORS = 300_000  # of one file or of a whole checkpoint


@dataclass(frozen=True)
class Header:
    """What a file says of itself: where each tensor is, and texts beside them (`__metadata__`)."""

    tensors: Mapping[str, Extent]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Extent:
    """Where one tensor of torch's `dtype` lies in its file: `size` bytes from byte `offset` of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(descriptor: int, name: str, file_size: int) -> Header:
    """The header of an open safetensors file of `file_size` bytes; `name` is for the errors.

    Raises IncompleteCheckpoint for a file shorter than its header says, CheckpointError for a longer one or a header
    that cannot be right.
    """
    if file_size < 8:
        raise IncompleteCheckpoint(f"{name} has {file_size:,} of at least 8 bytes", remedy=WAIT)
    prefix = bytearray(8)
    read_into(descriptor, memoryview(prefix), 0, name)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise refused(name, f"says its header has {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that are read")
    if file_size < 8 + length:
        raise IncompleteCheckpoint(f"{name} has {file_size:,} of at least {8 + length:,} bytes", remedy=WAIT)
    text = bytearray(length)
    read_into(descriptor, memoryview(text), 8, name)
    header = _parse(text, name)
    expected = max((extent.offset + extent.size for extent in header.tensors.values()), default=8 + length)
    if file_size < expected:
        raise IncompleteCheckpoint(f"{name} has {file_size:,} of {expected:,} bytes", remedy=WAIT)
    if file_size > expected:
        raise refused(name, f"has {file_size:,} bytes where its header says {expected:,}")
    return header


def _parse(text: bytearray, name: str) -> Header:
    # Every tensor opens a brace and two brackets: counting them refuses a flood before memory is spent on parsing it.
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b"[") > 2 * MAX_TENSORS or text.count(b",") > 12 * MAX_TENSORS:
        raise refused(name, f"has a header of more than {MAX_TENSORS:,} tensors")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(name, f"has a header that does not parse: {error}") from error
    if not isinstance(header, dict):
        raise refused(name, f"has a header that is a JSON {type(header).__name__}, not an object")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise refused(name, "has a __metadata__ that is no object of texts")
    extents = {tensor: _extent(entry, 8 + len(text), f"{name}: tensor `{tensor}`") for tensor, entry in header.items()}
    _check_packed(extents, 8 + len(text), name)
    return Header(extents, texts)


def _extent(entry: object, data_start: int, what: str) -> Extent:
    if not isinstance(entry, dict):
        raise refused(what, "is not described by an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        raise refused(what, f"has the unknown dtype {dtype!r}; known are {', '.join(SAFETENSORS)}")
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise refused(what, "has a shape that is not a list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refused(what, "has data_offsets that are not a begin and a later end")
    begin, end = offsets
    size = math.prod(shape) * DTYPE_BYTES[SAFETENSORS[dtype]]
    if end - begin != size:
        raise refused(what, f"has {end - begin:,} bytes where shape {shape} of {dtype} needs {size:,}")
    return Extent(SAFETENSORS[dtype], tuple(shape), data_start + begin, size)


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(map(is_count, value))


def _check_packed(extents: Mapping[str, Extent], data_start: int, name: str) -> None:
    """As safetensors itself demands: no tensor overlaps another and no byte belongs to none."""
    expected = data_start
    for tensor, extent in sorted(extents.items(), key=lambda item: (item[1].offset, item[1].size)):
        if extent.offset != expected:
            fault = "overlaps the one before it" if extent.offset < expected else "leaves a gap before it"
            raise refused(f"{name}: tensor `{tensor}`", f"begins at byte {extent.offset:,}, not {expected:,}: {fault}")
        expected = extent.offset + extent.size
