"""One chunk in a `.distcp` file: a file of torch.save inside the file, a zip of a pickle and the numbers' bytes.

Only where the numbers lie is found out here; they are read by whoever asked.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, cast

from peel_agent.errors import CheckpointError, IncompleteCheckpoint

from .checkpoint_folder import SAVE_AGAIN, read_into
from .dcp_metadata import DTYPE_BYTES, Chunk
from .dcp_pickle import ORDERED_DICT, Applied, Reference, Word, read_pickle

MAX_READ = 1 << 20  # the directory of a zip with one tensor has under 1 KiB, its pickle under 300 bytes
_PICKLE_MEMORY = 16 << 20
_LOCAL_HEADER = struct.Struct("<4s22sHH")

_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
_UNTYPED = Word("torch.storage", "UntypedStorage")
_WORDS = frozenset(
    {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        (_UNTYPED.module, _UNTYPED.name),
        *(("torch", name) for name in (*_STORAGES, *DTYPE_BYTES)),
        ORDERED_DICT,
    }
)


@dataclass(frozen=True)
class Numbers:
    """Where a chunk's numbers lie: `size` bytes from byte `position` of the file, in memory order by `strides`."""

    position: int
    size: int
    strides: tuple[int, ...]


def find_numbers(descriptor: int, chunk: Chunk, dtype: str) -> Numbers:
    """Where the numbers of a chunk lie in its open file.

    Raises CheckpointError when what is stored there is not a tensor of this dtype and of the chunk's sizes.
    """
    item = chunk.item
    what = f"{item.file}, {item.length:,} bytes from {item.offset:,} on:"
    window = _Window(descriptor, item.offset, item.length, what)
    try:
        with zipfile.ZipFile(cast(IO[bytes], window)) as archive:
            return _find(archive, descriptor, chunk, dtype, what)
    # All that zipfile raises for a file that is none, or is of a kind that torch does not write.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, RuntimeError) as error:
        raise _refused(what, f"is no zip as torch.save writes it: {error}") from error


def _find(archive: zipfile.ZipFile, descriptor: int, chunk: Chunk, dtype: str, what: str) -> Numbers:
    members = {member.filename: member for member in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(members) != len(archive.infolist()):
        raise _refused(what, f"has {len(pickles)} members data.pkl, not 1, or a member twice")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and _content(descriptor, chunk, order, what) != b"little":
        raise _refused(what, "was written on a big-endian machine, which is not read")
    pickle = _content(descriptor, chunk, members[pickles[0]], what)
    key, stored, strides = _parse(pickle, chunk.sizes, f"{what} data.pkl")
    if stored != dtype:
        raise _refused(what, f"holds {stored} where .metadata says {dtype}")
    member = members.get(f"{root}data/{key}")
    size = math.prod(chunk.sizes) * DTYPE_BYTES[dtype]
    if member is None or member.file_size != size:
        there = "no member" if member is None else f"{member.file_size:,} bytes"
        raise _refused(what, f"has {there} of numbers where sizes {chunk.sizes} of {dtype} need {size:,} bytes")
    return Numbers(_position(descriptor, chunk, member, what), size, strides)


def _parse(pickle: bytes, sizes: tuple[int, ...], what: str) -> tuple[str, str, tuple[int, ...]]:
    """The storage's key, its dtype and the tensor's strides, from `_rebuild_tensor_v2` or `_v3` and its arguments."""
    try:
        tensor = read_pickle(pickle, what, _WORDS, memory=_PICKLE_MEMORY, references=True)
    except IncompleteCheckpoint as error:  # the file is as long as it should be: nothing more will come
        raise CheckpointError(error.what, remedy=SAVE_AGAIN) from error
    if not isinstance(tensor, Applied) or not tensor.word.name.startswith("_rebuild_tensor_") or tensor.state:
        raise _refused(what, "holds something else than a tensor")
    typed = tensor.word.name == "_rebuild_tensor_v2"
    if len(tensor.arguments) not in ((6,) if typed else (7, 8)):
        raise _refused(what, f"gives {len(tensor.arguments)} arguments to {tensor.word.name}")
    reference, offset, size, strides = tensor.arguments[:4]
    storage = reference.what if isinstance(reference, Reference) else None
    if not isinstance(storage, tuple) or len(storage) != 5 or storage[0] != "storage":
        raise _refused(what, "has a tensor without a storage")
    kind, key = storage[1:3]
    named = kind if typed else tensor.arguments[6]
    if not isinstance(key, str) or not isinstance(kind, Word) or not isinstance(named, Word):
        raise _refused(what, "has a storage without key or dtype")
    dtype = _STORAGES.get(named.name, "") if typed else named.name
    if dtype not in DTYPE_BYTES or (not typed and kind != _UNTYPED):
        raise _refused(what, f"has the unknown dtype {named.name}")
    if size != sizes:
        raise _refused(what, f"holds another size than the {sizes} of .metadata")
    if offset != 0 or not _are_dense(strides, sizes):
        raise _refused(what, "has strides or an offset by which its numbers are not side by side")
    return key, dtype, cast("tuple[int, ...]", strides)


def _are_dense(strides: object, sizes: tuple[int, ...]) -> bool:
    """True when these strides visit each of the numbers once, in whatever order of the dimensions."""
    if not isinstance(strides, tuple) or len(strides) != len(sizes) or any(type(item) is not int for item in strides):
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return all(0 <= stride < 2**63 for stride in strides)


def _content(descriptor: int, chunk: Chunk, member: zipfile.ZipInfo, what: str) -> bytes:
    if member.file_size > MAX_READ:
        raise _refused(what, f"has a member of {member.file_size:,} bytes that should be small")
    content = bytearray(member.file_size)
    read_into(descriptor, memoryview(content), _position(descriptor, chunk, member, what), chunk.item.file)
    return bytes(content)


def _position(descriptor: int, chunk: Chunk, member: zipfile.ZipInfo, what: str) -> int:
    """The byte of the file at which the content of a member of the chunk's zip begins."""
    item = chunk.item
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
        raise _refused(what, "has a member that is compressed or encrypted")
    header = bytearray(_LOCAL_HEADER.size)
    end = item.offset + item.length
    start = item.offset + member.header_offset
    if not item.offset <= start <= end - len(header):
        raise _refused(what, "has a member that begins outside it")
    read_into(descriptor, memoryview(header), start, item.file)
    signature, _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    position = start + len(header) + name_length + extra_length
    if signature != b"PK\x03\x04" or position + member.file_size > end:
        raise _refused(what, "has a member that ends outside it")
    return int(position)


class _Window(io.RawIOBase):
    """The bytes of one item, as a file for zipfile to read the directory of; large reads are refused."""

    def __init__(self, descriptor: int, offset: int, length: int, what: str) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._length = length
        self._what = what
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError("a place before its beginning")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        count = max(0, self._length - self._at)
        count = count if size < 0 else min(size, count)
        if count > MAX_READ:
            raise _refused(self._what, f"has a zip directory of {count:,} bytes, far too many for one tensor")
        data = os.pread(self._descriptor, count, self._offset + self._at)
        self._at += len(data)
        return data


def _refused(what: str, fault: str) -> CheckpointError:
    return CheckpointError(f"{what} {fault}", remedy=SAVE_AGAIN)
