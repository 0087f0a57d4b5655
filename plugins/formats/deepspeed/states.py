"""Files of DeepSpeed's states: what they say of themselves, and the tensors that are whole or split over the ranks.

Runs in the parent daemon: reads directories and pickles, no tensor data, and imports no torch.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pickles.torch_archive import Saved, View, view_of
from ..pickles.torch_pickle import Table
from ..pickles.torch_tensors import DTYPE_BYTES, MAX_COUNT, MAX_DIMENSIONS, is_count
from ..pickles.torch_zip import shown
from .names import EXPORT, GATHER, MERGE, refused

MAX_RANKS = 4096
FLOATS = frozenset({"float64", "float32", "bfloat16", "float16"})

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that is in one file as it is."""

    file: str
    view: View

    @property
    def shape(self) -> Shape:
        return self.view.shape

    @property
    def dtype(self) -> str:
        return self.view.dtype

    @property
    def stored(self) -> View:
        """How the bytes of `pieces` are to be looked at."""
        return self.view

    @property
    def files(self) -> Sequence[str]:
        return (self.file,)

    def pieces(self) -> Iterator[tuple[str, int, int]]:
        """File, first byte and bytes of each part, in the order in which they make up the tensor."""
        yield self.file, self.view.offset, self.view.size


@dataclass(frozen=True, slots=True)
class Partition:
    """What one rank has of many tensors: vectors of one file, laid end to end; `ends` is where each of them ends."""

    file: str
    vectors: tuple[View, ...]
    ends: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.vectors[0].dtype

    def pieces(self, start: int, count: int) -> Iterator[tuple[str, int, int]]:
        """File, first byte and bytes of `count` numbers from number `start` on."""
        number = bisect_right(self.ends, start)
        while count > 0:
            vector, end = self.vectors[number], self.ends[number]
            item = DTYPE_BYTES[vector.dtype]
            taken = min(count, end - start)
            yield self.file, vector.offset + (start - end + math.prod(vector.shape)) * item, taken * item
            start, count, number = start + taken, count - taken, number + 1


@dataclass(frozen=True, slots=True)
class Split:
    """A tensor cut into equal parts, the last ones padded, which begin at number `start` of each rank's partition.

    `dtype` is what the model's forward pass uses.
    """

    shape: Shape
    dtype: str
    start: int
    partitions: Sequence[Partition]

    @property
    def stored(self) -> View:
        """How the bytes of `pieces` are to be looked at."""
        strides = tuple(math.prod(self.shape[dimension + 1 :]) for dimension in range(len(self.shape)))
        dtype = self.partitions[0].dtype
        return View(dtype, self.shape, strides, 0, math.prod(self.shape) * DTYPE_BYTES[dtype])

    @property
    def files(self) -> Sequence[str]:
        return tuple(partition.file for partition in self.partitions)

    def pieces(self) -> Iterator[tuple[str, int, int]]:
        """File, first byte and bytes of each part, in the order in which they make up the tensor."""
        left = math.prod(self.shape)
        share = share_of(self.shape, len(self.partitions))
        for partition in self.partitions:
            yield from partition.pieces(self.start, min(share, left))
            left -= min(share, left)


def share_of(shape: Shape, ranks: int) -> int:
    """How many numbers of a tensor of this shape each rank has, padding included."""
    return -(-math.prod(shape) // ranks)


def partition(value: object, saved: Saved, file: str, what: str) -> Partition:
    """The partition in a list of flat vectors of one float dtype; raises CheckpointError for anything else."""
    if type(value) is not list or not value:
        raise refused(what, "is no list of tensors")
    views = tuple(view_of(item, saved.offsets, what) for item in value)
    if len({view.dtype for view in views}) > 1 or views[0].dtype not in FLOATS:
        raise refused(what, f"has the dtypes {', '.join(sorted({view.dtype for view in views}))}")
    for view in views:
        if len(view.shape) != 1 or (view.strides != (1,) and view.shape[0] > 1):
            raise refused(what, f"has a tensor of shape {view.shape}, not a flat vector")
    return Partition(file, views, tuple(itertools.accumulate(view.shape[0] for view in views)))


def table_of(value: object, what: str) -> Table:
    """A dict whose keys are text; raises CheckpointError for anything else."""
    if type(value) is not Table:
        raise refused(what, f"is {'missing' if value is None else 'no dict'}")
    if value.unnamed:
        raise refused(what, f"has {value.unnamed:,} names that are no text")
    return value


def shapes_of(tables: Any, what: str) -> list[tuple[str, Shape]]:
    """Names and shapes in their order, from a list of dicts; raises CheckpointError for anything else."""
    if type(tables) is not list:
        raise refused(what, "is no list of dicts from names to shapes")
    pairs = [pair for table in tables for pair in table_of(table, what).items()]
    for name, shape in pairs:
        if type(shape) is not tuple or not all(map(is_count, shape)):
            raise refused(f"{what}: {shown(name)}", "has a shape that is no tuple of sizes")
        # A size of 0 must not hide the others: strides are made of them.
        if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= MAX_COUNT:
            raise refused(f"{what}: {shown(name)}", "has a shape larger than any tensor")
    if len(dict(pairs)) != len(pairs):
        raise refused(what, "has a name twice")
    return pairs


def world_size(states: Table, what: str) -> int:
    """`dp_world_size`; raises CheckpointError when it is no count of ranks."""
    size = states.get("dp_world_size")
    if type(size) is not int or not 1 <= size <= MAX_RANKS:
        said = f"{size:,}" if type(size) is int else type(size).__name__
        raise refused(what, f"has dp_world_size {said}, not 1 to {MAX_RANKS:,} ranks")
    return size


def check_parallelism(states: Table, what: str) -> None:
    """Raises CheckpointError, with the way out, when model states say that they are in more parts than are read."""
    degrees = states.get("checkpoint_parallel_dimensions")
    degrees = degrees if type(degrees) is Table else {}
    for value, name in (
        (states.get("mp_world_size"), "mp_world_size"),
        (degrees.get("tp_degree"), "tp_degree"),
        (degrees.get("pp_degree"), "pp_degree"),
    ):
        if type(value) is int and value > 1:
            raise refused(what, f"has {name} {value:,}: weights cut by model parallelism are not read", remedy=EXPORT)
    if states.get("num_experts") or states.get("ds_autoep_layers"):
        raise refused(what, "is of a mixture of experts (MoE), which is not read", remedy=EXPORT)
    if states.get("module") is None:
        raise refused(what, "has no module: a pipeline saves its layers apart, which is not read", remedy=EXPORT)


def check_partitioning(states: Table, what: str) -> None:
    """Raises CheckpointError, with the way out, when the configuration of ZeRO 3 is one whose files are not read."""
    config = _table(_table(states.get("ds_config")).get("zero_optimization"))
    if _above(config.get("zero_hpz_partition_size"), 1):
        raise refused(what, "is of ZeRO++ with secondary partitions (hpZ), which are not read", remedy=MERGE)
    if _above(config.get("mics_shard_size"), 0):
        raise refused(what, "is of MiCS, whose partitions are not read", remedy=GATHER)
    for key in ("offload_param", "offload_optimizer"):
        if _table(config.get(key)).get("device") == "nvme":
            raise refused(what, f"is of a training with {key} on NVMe, which is not read", remedy=GATHER)


def _table(value: object) -> Mapping[str, Any]:
    return value if type(value) is Table else {}


def _above(value: object, limit: int) -> bool:
    return type(value) is int and value > limit
