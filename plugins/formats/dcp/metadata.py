"""`.metadata` of a torch.distributed.checkpoint folder: which tensors there are, and in which files their chunks lie.

Everything is checked before it is believed: the file may be damaged or hostile. The classes named here are those of
torch/distributed/checkpoint/metadata.py and filesystem.py; none of them is imported.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from peel_agent.errors import IncompleteCheckpoint

from ..files.checkpoint_folder import WAIT, refused
from ..pickles.machine import (
    GETATTR,
    MAX_MEMORY,
    ORDERED_DICT,
    STEPS,
    Applied,
    Ended,
    Fault,
    Machine,
    Word,
)
from ..pickles.torch_tensors import DTYPE_BYTES, MAX_DIMENSIONS, is_count
from .names import model_names
from .tiling import check_tiling

MAX_OPERATIONS = 15_000_000  # about 60 write one chunk
METADATA = ".metadata"
MAX_ENTRIES = 1_000_000
HOSTILE = "do not open this checkpoint with torch either, unless you know who wrote it; then save it again"

_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where older releases of torch had some of them
WORDS = frozenset(
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
"""The classes and functions that torch names in a `.metadata`."""

_FILE = re.compile(r"[^/\\\0]+\.distcp")
SHARD = re.compile(r"__\d+_\d+\.distcp")
"""The names that torch gives to the files with the numbers."""


@dataclass(frozen=True, slots=True)
class Item:
    """One chunk as stored: `length` bytes from byte `offset` of `file`."""

    file: str
    offset: int
    length: int
    transforms: bool


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A part of a tensor: `sizes` numbers from `offsets` on in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the chunks that tile it, those without any number left out."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Contents:
    """The model's tensors under the model's own names, and for each file of the checkpoint where its last item ends."""

    tensors: Mapping[str, StoredTensor]
    ends: Mapping[str, int]


Naming: TypeAlias = Callable[[Iterable[str], Mapping[str, tuple[object, ...]]], Mapping[str, str]]
"""The model's tensors among those stored, by stored name, from all names and the places that are known of them."""


def read_contents(
    pickle: bytes | bytearray,
    *,
    words: Container[tuple[str, str]] = WORDS,
    kinds: tuple[str, ...] = ("Metadata",),
    naming: Naming = model_names,
) -> Contents:
    """What a `.metadata` says; it is an object of one of the classes `kinds` and names `words` alone.

    Raises IncompleteCheckpoint when it ends too early, CheckpointError for anything in it that cannot be right.
    """
    fields = _fields(read_pickle(pickle, METADATA, words), METADATA, *kinds)
    entries = _dict(fields.get("state_dict_metadata"), f"{METADATA}: state_dict_metadata")
    storage = _dict(fields.get("storage_data"), f"{METADATA}: storage_data")
    items = dict(_items(storage))
    if len(items) != len(storage):
        raise refused(METADATA, "stores a chunk twice")
    tensors = dict(_tensors(entries))
    names = naming(tensors, _paths(fields.get("planner_data")))
    if not names:
        raise refused(METADATA, f"names no tensor of a model among its {len(entries):,} entries")
    if len(set(names.values())) != len(names):
        raise refused(METADATA, "names a tensor of the model twice")
    allowance = iter(range(MAX_ENTRIES))
    stored = {model_name: _stored(name, tensors[name], items, allowance) for name, model_name in names.items()}
    _check_apart(stored)
    ends: dict[str, int] = {}
    for item in items.values():
        ends[item.file] = max(ends.get(item.file, 0), item.offset + item.length)
    return Contents(stored, ends)


def read_pickle(
    data: bytes | bytearray, what: str, words: Container[tuple[str, str]], *, memory: int = MAX_MEMORY
) -> object:
    """The one object of a pickle, as Words, Applied and plain values; `what` names it in errors.

    Raises IncompleteCheckpoint when it ends too early, CheckpointError for a word that is not in `words` as (module,
    name), for what is not read of pickles, and for one that takes more than `memory` bytes.
    """
    try:
        return Machine(data, words).run(STEPS, memory=memory, operations=MAX_OPERATIONS)
    except Ended as fault:
        raise IncompleteCheckpoint(f"{what} {fault}", remedy=WAIT) from fault
    except Fault as fault:
        raise refused(what, str(fault), remedy=HOSTILE) from fault


_Place = tuple[str, tuple[int, ...] | None]


def _items(storage: dict[object, object]) -> Iterator[tuple[_Place, Item]]:
    """What is stored of each chunk, by the name of its tensor and its offsets there."""
    for key, value in storage.items():
        index = _fields(key, f"{METADATA}: a key of storage_data", "MetadataIndex")
        name = index.get("fqn")
        if not isinstance(name, str):
            raise refused(METADATA, "has a key of storage_data without a name")
        what = f"{METADATA}: `{_short(name)}`"
        offsets = None if index.get("offset") is None else _counts(index["offset"], what)
        info = _fields(value, what, "_StorageInfo")
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            shown = ascii(file[:120]) if isinstance(file, str) else f"a {type(file).__name__}"
            raise refused(what, f"lies in {shown}, which is not the name of a .distcp file beside it")
        if not is_count(offset) or not is_count(length):
            raise refused(what, f"has no offset and length in {file}")
        yield (name, offsets), Item(file, offset, length, bool(info.get("transform_descriptors")))


def _tensors(entries: Mapping[object, object]) -> Iterator[tuple[str, Applied]]:
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise refused(METADATA, "has an entry whose name is no text")
        if not isinstance(entry, Applied) or entry.word.name not in ("TensorStorageMetadata", "BytesStorageMetadata"):
            raise refused(f"{METADATA}: `{_short(name)}`", "is described neither as a tensor nor as bytes")
        if entry.word.name == "TensorStorageMetadata":
            yield name, entry


def _paths(planner_data: object) -> dict[str, tuple[object, ...]]:
    """Where in the nested state dict each entry was, for those of which that is known."""
    paths = planner_data if isinstance(planner_data, dict) else {}
    return {name: path for name, path in paths.items() if isinstance(path, tuple) and isinstance(name, str)}


def _stored(name: str, entry: object, items: Mapping[_Place, Item], allowance: Iterator[int]) -> StoredTensor:
    what = f"{METADATA}: tensor `{_short(name)}`"
    fields = _fields(entry, what, "TensorStorageMetadata")
    dtype = _dtype(fields.get("properties"), what)
    shape = _counts(fields.get("size"), what)
    if math.prod(shape) >= 2**60:
        raise refused(what, f"has the shape {shape}, more than any file can hold")
    listed = fields.get("chunks")
    if not isinstance(listed, list):
        raise refused(what, "has no list of chunks")
    chunks = []
    for part in listed:
        if next(allowance, None) is None:
            raise refused(METADATA, f"has more than {MAX_ENTRIES:,} chunks")
        box = _fields(part, what, "ChunkStorageMetadata")
        offsets, sizes = _counts(box.get("offsets"), what), _counts(box.get("sizes"), what)
        if 0 in sizes and len(sizes) == len(shape):
            continue  # the share of a rank that has nothing of this tensor
        item = items.get((name, offsets))
        if item is None:
            raise refused(what, f"has a chunk at {offsets} that no file holds")
        size = math.prod(sizes) * DTYPE_BYTES[dtype]
        if item.transforms:
            raise refused(what, f"is stored in {item.file} through an extension (compressed?), which is not read")
        if item.length <= size:
            raise refused(what, f"has {item.length:,} bytes in {item.file} for {size:,} bytes of numbers")
        chunks.append(StoredChunk(offsets, sizes, item))
    fault = check_tiling(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    if fault is not None:
        raise refused(what, fault)
    return StoredTensor(dtype, shape, tuple(chunks))


def _dtype(properties: object, what: str) -> str:
    state = properties.state if isinstance(properties, Applied) else None
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[0], Word):
        raise refused(what, "has no properties")
    dtype, layout = state[0], state[1]
    if dtype.module != "torch" or dtype.name not in DTYPE_BYTES:
        raise refused(what, f"has the unknown dtype {dtype.name}; known are {', '.join(DTYPE_BYTES)}")
    if not isinstance(layout, Applied) or layout.arguments != ("torch.strided",):
        raise refused(what, "is not dense")
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
            raise refused(
                METADATA, f"has `{_short(next_name)}` begin at byte {next_offset:,} of {file}, inside `{_short(name)}`"
            )


def _fields(value: object, what: str, *kinds: str) -> dict[object, object]:
    if not isinstance(value, Applied) or value.word.name not in kinds or not isinstance(value.state, dict):
        raise refused(what, f"is no {kinds[0]}")
    return value.state


def _dict(value: object, what: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise refused(what, "is no dict")
    if len(value) > MAX_ENTRIES:
        raise refused(what, f"has {len(value):,} entries, more than the {MAX_ENTRIES:,} that are read")
    return value


def _counts(value: object, what: str) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    (counts,) = value.arguments if isinstance(value, Applied) and len(value.arguments) == 1 else (None,)
    if not isinstance(counts, tuple) or len(counts) > MAX_DIMENSIONS or not all(is_count(item) for item in counts):
        raise refused(what, "has a shape or offsets that are not a torch.Size of counts")
    return counts


def _short(name: str) -> str:
    return ascii(name[:200])[1:-1]
