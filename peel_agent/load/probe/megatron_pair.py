"""Megatron's indexed data sets: ids in NAME.bin, and NAME.idx with their dtype and where each document lies."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.load.probe.raw import check_dtype
from peel_agent.load.probe.tokens import Ids

_MAGIC = b"MMIDIDX\x00\x00"
_FAIRSEQ_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, number of entries in the list of documents."""

_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_AGAIN = "write the pair again with Megatron's tools/preprocess_data.py"


def index_of(path: Path) -> Path | None:
    """The index of a pair, one file of which is `path`; None when it is no pair."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        return None
    with index.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic.startswith(_FAIRSEQ_MAGIC):
        raise ProbeError(f"{index} is an index of fairseq, which Megatron reads no more", remedy=_AGAIN)
    return index if magic == _MAGIC else None


def read_pair(index: Path, dtype: str | None, limit: int) -> Ids:
    """Ids [T] of all documents, one after another in the order of the index; ProbeError when the pair is not whole.

    Where the documents do not lie one after another, about `limit` ids are read.
    """
    content = index.read_bytes()
    if len(content) < _HEADER.size:
        raise ProbeError(f"{index} is cut short after {len(content)} bytes", remedy=_AGAIN)
    _, version, code, sequences, documents = _HEADER.unpack_from(content)
    if version != 1 or code not in _DTYPES:
        raise ProbeError(f"{index} has version {version} and dtype code {code}, which are not known", remedy=_AGAIN)
    check_dtype(index, _DTYPES[code], dtype, "its index")
    if len(content) < _HEADER.size + 12 * sequences + 8 * documents:
        raise ProbeError(f"{index} is cut short: it says that there are {sequences:,} sequences", remedy=_AGAIN)
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size).astype(np.int64)
    starts = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    return _documents(index.with_suffix(".bin"), np.dtype(_DTYPES[code]), lengths, starts, limit)


def _documents(path: Path, dtype: np.dtype[np.integer], lengths: Ids, starts: Ids, limit: int) -> Ids:
    size = path.stat().st_size if path.is_file() else 0
    if not len(lengths) or not size:
        raise ProbeError(f"{path} holds no token, or is not there", remedy=_AGAIN)
    ends = starts + lengths * dtype.itemsize
    if lengths.min() < 0 or starts.min() < 0 or ends.max() > size or (starts % dtype.itemsize).any():
        raise ProbeError(
            f"{path} is {size:,} bytes long, and its index says that ids reach to byte {int(ends.max()):,}",
            remedy=_AGAIN,
        )
    ids: Ids = np.memmap(path, dtype=dtype.newbyteorder("<"), mode="r", shape=(size // dtype.itemsize,))
    if starts[0] == 0 and (starts[1:] == ends[:-1]).all():
        return ids[: int(ends[-1]) // dtype.itemsize]
    enough = int(np.searchsorted(np.cumsum(lengths), limit)) + 1
    pairs = zip(starts[:enough] // dtype.itemsize, lengths[:enough], strict=True)
    gathered: Ids = np.concatenate([ids[start : start + length] for start, length in pairs])
    return gathered
