"""`.metadata` of a torch.distributed.checkpoint folder: which tensors there are, and in which files their chunks lie.

Everything is checked before it is believed: the file may be damaged or hostile. The classes named here are those of
torch/distributed/checkpoint/metadata.py and filesystem.py; none of them is imported.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from peel_agent.errors import CheckpointError

from .checkpoint_folder import SAVE_AGAIN
from .dcp_names import model_names
from .dcp_pickle import GETATTR, ORDERED_DICT, Applied, Word, read_pickle
from .dcp_tiling import check_tiling

METADATA = ".metadata"
MAX_ENTRIES = 1_000_000
MAX_DIMENSIONS = 64  # torch's own limit

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex128": 16,
    "complex64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
"""Names of torch's dtypes and the bytes of one number."""

_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where older releases of torch had some of them
_WORDS = frozenset(
    {
        *((_CHECKPOINT, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
        *((_CHECKPOINT, name) for name in ("ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta")),
        (_CHECKPOINT, "_MEM_FORMAT_ENCODING"),
        (_SHARDED, "TensorProperties"),
        (_SHARDED, "MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", name) for name in DTYPE_BYTES),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
        ORDERED_DICT,
        GETATTR,
    }
)
_FILE = re.compile(r"[^/\\\0]+\.distcp")


@dataclass(frozen=True, slots=True)
class Item:
    """One chunk as stored: `length` bytes from byte `offset` of `file`."""

    file: str
    offset: int
    length: int
    transforms: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor: `sizes` numbers from `offsets` on in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the chunks that tile it, those without any number left out."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Contents:
    """The model's tensors under the model's own names, and for each file of the checkpoint where its last item ends."""

    tensors: Mapping[str, StoredTensor]
    ends: Mapping[str, int]


def read_contents(pickle: bytes | bytearray) -> Contents:
    """What a `.metadata` says.

    Raises IncompleteCheckpoint when it ends too early, CheckpointError for anything in it that cannot be right.
    """
    fields = _fields(read_pickle(pickle, METADATA, _WORDS), "Metadata", METADATA)
    entries = _dict(fields.get("state_dict_metadata"), f"{METADATA}: state_dict_metadata")
    storage = _dict(fields.get("storage_data"), f"{METADATA}: storage_data")
    items = dict(_items(storage))
    if len(items) != len(storage):
        raise _refused(METADATA, "stores a chunk twice")
    tensors = dict(_tensors(entries))
    names = model_names(tensors, _paths(fields.get("planner_data")))
    if not names:
        raise _refused(METADATA, f"names no tensor of a model among its {len(entries):,} entries")
    if len(set(names.values())) != len(names):
        raise _refused(METADATA, "names a tensor of the model twice")
    allowance = iter(range(MAX_ENTRIES))
    stored = {own: _stored(name, tensors[name], items, allowance) for name, own in names.items()}
    _check_apart(stored)
    ends: dict[str, int] = {}
    for item in items.values():
        ends[item.file] = max(ends.get(item.file, 0), item.offset + item.length)
    return Contents(stored, ends)


_Place = tuple[str, tuple[int, ...] | None]


def _items(storage: dict[object, object]) -> Iterator[tuple[_Place, Item]]:
    """What is stored of each chunk, by the name of its tensor and its offsets there."""
    for key, value in storage.items():
        index = _fields(key, "MetadataIndex", f"{METADATA}: a key of storage_data")
        name = index.get("fqn")
        if not isinstance(name, str):
            raise _refused(METADATA, "has a key of storage_data without a name")
        what = f"{METADATA}: `{_short(name)}`"
        offsets = None if index.get("offset") is None else _counts(index["offset"], what)
        info = _fields(value, "_StorageInfo", what)
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            shown = ascii(file[:120]) if isinstance(file, str) else f"a {type(file).__name__}"
            raise _refused(what, f"lies in {shown}, which is not the name of a .distcp file beside it")
        if not _is_count(offset) or not _is_count(length):
            raise _refused(what, f"has no offset and length in {file}")
        yield (name, offsets), Item(file, cast(int, offset), cast(int, length), bool(info.get("transform_descriptors")))


def _tensors(entries: Mapping[object, object]) -> Iterator[tuple[str, Applied]]:
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise _refused(METADATA, "has an entry whose name is no text")
        if not isinstance(entry, Applied) or entry.word.name not in ("TensorStorageMetadata", "BytesStorageMetadata"):
            raise _refused(f"{METADATA}: `{_short(name)}`", "is described neither as a tensor nor as bytes")
        if entry.word.name == "TensorStorageMetadata":
            yield name, entry


def _paths(planner_data: object) -> dict[str, tuple[object, ...]]:
    """Where in the nested state dict each entry was, for those of which that is known."""
    paths = planner_data if isinstance(planner_data, dict) else {}
    return {name: path for name, path in paths.items() if isinstance(path, tuple) and isinstance(name, str)}


def _stored(name: str, entry: object, items: Mapping[_Place, Item], allowance: Iterator[int]) -> StoredTensor:
    what = f"{METADATA}: tensor `{_short(name)}`"
    fields = _fields(entry, "TensorStorageMetadata", what)
    dtype = _dtype(fields.get("properties"), what)
    shape = _counts(fields.get("size"), what)
    if math.prod(shape) >= 2**60:
        raise _refused(what, f"has the shape {shape}, more than any file can hold")
    listed = fields.get("chunks")
    if not isinstance(listed, list):
        raise _refused(what, "has no list of chunks")
    chunks = []
    for part in listed:
        if next(allowance, None) is None:
            raise _refused(METADATA, f"has more than {MAX_ENTRIES:,} chunks")
        box = _fields(part, "ChunkStorageMetadata", what)
        offsets, sizes = _counts(box.get("offsets"), what), _counts(box.get("sizes"), what)
        if 0 in sizes and len(sizes) == len(shape):
            continue  # the share of a rank that has nothing of this tensor
        item = items.get((name, offsets))
        if item is None:
            raise _refused(what, f"has a chunk at {offsets} that no file holds")
        size = math.prod(sizes) * DTYPE_BYTES[dtype]
        if item.transforms:
            raise _refused(what, f"is stored in {item.file} through an extension (compressed?), which is not read")
        if item.length <= size:
            raise _refused(what, f"has {item.length:,} bytes in {item.file} for {size:,} bytes of numbers")
        chunks.append(Chunk(offsets, sizes, item))
    fault = check_tiling(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    if fault is not None:
        raise _refused(what, fault)
    return StoredTensor(dtype, shape, tuple(chunks))


def _dtype(properties: object, what: str) -> str:
    state = properties.state if isinstance(properties, Applied) else None
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[0], Word):
        raise _refused(what, "has no properties")
    dtype, layout = state[0], state[1]
    if dtype.module != "torch" or dtype.name not in DTYPE_BYTES:
        raise _refused(what, f"has the unknown dtype {dtype.name}; known are {', '.join(DTYPE_BYTES)}")
    if not isinstance(layout, Applied) or layout.arguments != ("torch.strided",):
        raise _refused(what, "is not dense")
    return dtype.name


def _check_apart(tensors: Mapping[str, StoredTensor]) -> None:
    """No byte belongs to two chunks, so that all tensors together are not larger than their files."""
    spans = sorted(
        (chunk.item.file, chunk.item.offset, chunk.item.length, name)
        for name, tensor in tensors.items()
        for chunk in tensor.chunks
    )
    for (file, offset, length, name), (next_file, next_offset, _, next_name) in itertools.pairwise(spans):
        if file == next_file and offset + length > next_offset:
            raise _refused(
                METADATA, f"has `{_short(next_name)}` begin at byte {next_offset:,} of {file}, inside `{_short(name)}`"
            )


def _fields(value: object, name: str, what: str) -> dict[object, object]:
    if not isinstance(value, Applied) or value.word.name != name or not isinstance(value.state, dict):
        raise _refused(what, f"is no {name}")
    return value.state


def _dict(value: object, what: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise _refused(what, "is no dict")
    if len(value) > MAX_ENTRIES:
        raise _refused(what, f"has {len(value):,} entries, more than the {MAX_ENTRIES:,} that are read")
    return value


def _counts(value: object, what: str) -> tuple[int, ...]:
    """The numbers of a torch.Size, each below 2**63 so that products and offsets stay small enough to compute."""
    (counts,) = value.arguments if isinstance(value, Applied) and len(value.arguments) == 1 else (None,)
    if not isinstance(counts, tuple) or len(counts) > MAX_DIMENSIONS or not all(_is_count(item) for item in counts):
        raise _refused(what, "has a shape or offsets that are not a torch.Size of counts")
    return counts


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # `type is int` keeps out true and false


def _short(name: str) -> str:
    return ascii(name[:200])[1:-1]


def _refused(what: str, fault: str) -> CheckpointError:
    return CheckpointError(f"{what} {fault}", remedy=SAVE_AGAIN)
