"""ZeRO 3: each rank has a part of every weight, as deepspeed/utils/zero_to_fp32.py puts them together.

The numbers are the float32 masters in the optimizer states, for the 16-bit weights are not saved. Where the model
itself runs in 16 bits its state dict says so, by an empty tensor of that dtype under each name; the forward pass then
uses the masters rounded to it, and that is what is read. Frozen weights have no masters: theirs are the model's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.errors import IncompleteCheckpoint
from peel_agent.records import FileStamp

from ..files.checkpoint_folder import WAIT
from ..pickles.torch_archive import Saved, View, read_saved, views_of
from ..pickles.torch_pickle import Table
from ..pickles.torch_zip import shown
from ..safetensors.header import MAX_TENSORS
from .names import Names, refused
from .states import (
    FLOATS,
    Partition,
    Shape,
    Split,
    Whole,
    check_parallelism,
    check_partitioning,
    partition,
    shapes_of,
    share_of,
    table_of,
    world_size,
)

MAX_PICKLE_BYTES = 256 << 20
"""Of all ranks' files together: 1,024 ranks with 900 weights each have as much."""


@dataclass(frozen=True)
class Merged:
    """The weights of a saving by name, the stamps of all files that they are in, and the step beside them."""

    tensors: Mapping[str, Whole | Split]
    files: tuple[FileStamp, ...]
    step: Any


@dataclass(frozen=True)
class _Model:
    """What one rank's model states say."""

    world: int
    shapes: list[tuple[str, Shape]]
    frozen: list[tuple[str, Shape]]
    fragments: Mapping[str, Partition]


def merge(folder: Path, inside: str, names: Names) -> Merged:
    """The weights of a saving whose files are in `folder` under `inside` + their name.

    Raises IncompleteCheckpoint while a rank's file is not there or not whole, CheckpointError for what is refused.
    """
    files = _Files(folder, inside)
    lead = names.model.get(0)
    if lead is None:
        raise IncompleteCheckpoint("zero_pp_rank_0_mp_rank_00_model_states.pt is not there", remedy=WAIT)
    saved, states = files.states(lead)
    check_partitioning(states, f"{lead}: data.pkl")
    model = _model(saved, states, lead)
    _check_ranks(names, model.world, lead)
    # The optimizer states first: they are written last, and short to read when it is one of them that is missing.
    partitions = [_masters(files, names.optimizer[rank], model, lead) for rank in range(model.world)]
    others = (_fragments(files, names.model[rank], model, lead) for rank in range(1, model.world))
    fragments = [model.fragments, *others]
    module = views_of(table_of(states.get("module"), f"{lead}: module"), saved.offsets, f"{lead}: module")
    tensors = _tensors(lead, module, model, partitions, fragments)
    _add_shared(tensors, states.get("shared_params"), lead)
    buffers = states.get("buffer_names")
    named = {name for name in buffers if type(name) is str} if type(buffers) is list else set()
    for name, view in module.items():
        if name not in tensors and 0 in view.shape and name not in named:
            raise refused(f"{lead}: {shown(name)}", "has no numbers in any file")
        tensors.setdefault(name, Whole(lead, view))
    return Merged(tensors, tuple(files.stamps), states.get("global_steps"))


class _Files:
    """Reads files of one saving, and sums up what was read."""

    def __init__(self, folder: Path, inside: str) -> None:
        self._folder = folder
        self._inside = inside
        self._pickles = 0
        self.stamps: list[FileStamp] = []

    def states(self, name: str) -> tuple[Saved, Table]:
        saved = read_saved(self._folder, self._inside + name)
        self._pickles += saved.pickle_bytes
        if self._pickles > MAX_PICKLE_BYTES:
            raise refused(name, f"is one of several with more than {MAX_PICKLE_BYTES:,} bytes of pickles")
        self.stamps.append(saved.stamp)
        return saved, table_of(saved.value, f"{name}: data.pkl")


def _check_ranks(names: Names, world: int, lead: str) -> None:
    for rank in range(world):
        for kind, name_by_rank in (("model", names.model), ("optim", names.optimizer)):
            if rank not in name_by_rank:
                raise IncompleteCheckpoint(
                    f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt is not there: {lead} says dp_world_size {world}",
                    remedy=WAIT,
                )
    for rank, name in (*names.model.items(), *names.optimizer.items()):
        if rank >= world:
            raise refused(name, f"is there, yet {lead} says dp_world_size {world:,}: two savings")


def _model(saved: Saved, states: Table, name: str) -> _Model:
    what = f"{name}: data.pkl"
    check_parallelism(states, what)
    shapes = shapes_of(states.get("param_shapes"), f"{name}: param_shapes")
    frozen = states.get("frozen_param_shapes")
    pairs = [] if frozen is None else shapes_of([frozen], f"{name}: frozen_param_shapes")
    if len(shapes) + len(pairs) > MAX_TENSORS:
        raise refused(what, f"has more than {MAX_TENSORS:,} weights")
    parts = table_of(states.get("frozen_param_fragments"), f"{name}: frozen_param_fragments") if pairs else Table()
    fragments = {}
    for weight, _ in pairs:
        where = f"{name}: frozen_param_fragments: {shown(weight)}"
        if weight not in parts:
            raise refused(where, "is missing")
        fragments[weight] = partition([parts[weight]], saved, name, where)
    return _Model(world_size(states, what), shapes, pairs, fragments)


def _fragments(files: _Files, name: str, model: _Model, lead: str) -> Mapping[str, Partition]:
    """The frozen weights' parts in another rank's model states, when these agree with the first rank's."""
    saved, states = files.states(name)
    this_rank = _model(saved, states, name)
    if this_rank.world != model.world:
        raise refused(name, f"says dp_world_size {this_rank.world:,}, {lead} {model.world:,}: two savings")
    if (this_rank.shapes, this_rank.frozen) != (model.shapes, model.frozen):
        raise refused(name, f"has other param_shapes than {lead}: two savings")
    return this_rank.fragments


def _masters(files: _Files, name: str, model: _Model, lead: str) -> Partition:
    saved, states = files.states(name)
    what = f"{name}: optimizer_state_dict"
    optimizer = table_of(states.get("optimizer_state_dict"), what)
    count = optimizer.get("partition_count")
    if count != model.world or type(count) is not int:
        said = f"{count:,}" if type(count) is int else type(count).__name__
        raise refused(what, f"says partition_count {said}, {lead} dp_world_size {model.world:,}: two savings")
    part = partition(optimizer.get("fp32_flat_groups"), saved, name, f"{name}: fp32_flat_groups")
    needed = sum(share_of(shape, model.world) for _, shape in model.shapes)
    if part.ends[-1] != needed:
        raise refused(
            f"{name}: fp32_flat_groups", f"has {part.ends[-1]:,} numbers where param_shapes in {lead} need {needed:,}"
        )
    return part


def _tensors(
    lead: str,
    module: Mapping[str, View],
    model: _Model,
    partitions: list[Partition],
    fragments: list[Mapping[str, Partition]],
) -> dict[str, Whole | Split]:
    tensors: dict[str, Whole | Split] = {}
    start = 0
    for name, shape in model.shapes:
        tensors[name] = _split(lead, module, name, Split(shape, "", start, partitions))
        start += share_of(shape, model.world)
    for name, shape in model.frozen:
        if name in tensors:
            raise refused(f"{lead}: {shown(name)}", "is both trained and frozen")
        parts = [parts[name] for parts in fragments]
        for part in parts:
            if part.ends[-1] != share_of(shape, model.world):
                raise refused(
                    f"{part.file}: frozen_param_fragments: {shown(name)}",
                    f"has {part.ends[-1]:,} numbers where shape {shape} needs {share_of(shape, model.world):,}",
                )
        tensors[name] = _split(lead, module, name, Split(shape, "", 0, parts))
    return tensors


def _split(lead: str, module: Mapping[str, View], name: str, split: Split) -> Split:
    """The same with the dtype that the forward pass uses."""
    stored = {part.dtype for part in split.partitions}
    if len(stored) > 1:
        raise refused(f"{lead}: {shown(name)}", f"is in parts of {' and '.join(sorted(stored))}")
    dtype = module[name].dtype if name in module else split.partitions[0].dtype
    if dtype not in FLOATS:
        raise refused(f"{lead}: {shown(name)}", f"is of {dtype}, which ZeRO does not split")
    return dataclasses.replace(split, dtype=dtype)


def _add_shared(tensors: dict[str, Whole | Split], shared: Any, lead: str) -> None:
    """Gives tied weights, which are saved once, their second names."""
    for name, owner in (table_of(shared, f"{lead}: shared_params") if shared is not None else {}).items():
        if type(owner) is not str or name in tensors:
            raise refused(f"{lead}: shared_params: {shown(name)}", "has weights of its own too")
        if owner in tensors:  # not with exclude_frozen_parameters, when both are frozen
            tensors[name] = tensors[owner]
