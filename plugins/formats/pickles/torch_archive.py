"""One file of torch.save: which of its tensors are the model's, and where each lies in it.

Runs in the parent daemon: reads the directory and the pickle, no tensor data, and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.records import FileStamp

from ..files.checkpoint_folder import opened
from .machine import Applied, Word
from .torch_pickle import MAX_PICKLE_BYTES, Content, Opaque, Storage, Table, read_pickle
from .torch_tensors import DTYPE_BYTES, MAX_DIMENSIONS, is_count
from .torch_zip import Archive, read_archive, refused, shown

STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")
STEPS = ("iter_num", "global_step", "step", "iteration")
SETTINGS = ("model_args", "hyper_parameters")
_EXTRA = "_extra_state"
"""What a module may add to its state dict besides tensors; torch's own name for it."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor in a file: the `size` bytes from byte `offset` on hold its elements, `strides` elements apart."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class SavedModel:
    """The model's tensors in one file by the names they have there, and what stands beside them.

    `settings` are those that the model was made with, as nanoGPT (`model_args`) and Lightning (`hyper_parameters`) save
    them; None when there are none.
    """

    stamp: FileStamp
    tensors: Mapping[str, View]
    step: int | None
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Saved:
    """All that is in one file: the value of its pickle, which has `pickle_bytes`, and where its storages begin."""

    stamp: FileStamp
    value: Any
    offsets: Mapping[str, int]
    pickle_bytes: int


def read_saved(folder: Path, name: str) -> Saved:
    """What is in the file `name` of a folder.

    Raises IncompleteCheckpoint for a file that is not all there, CheckpointError for one that is refused.
    """
    with opened(folder, name) as (descriptor, stamp):
        archive = read_archive(descriptor, name, stamp.size)
        pickle = archive.content("data.pkl", MAX_PICKLE_BYTES)
        content = read_pickle(pickle, f"{name}: data.pkl")
        offsets = offsets_of(archive, content)
    return Saved(stamp, content.value, offsets, len(pickle))


def read_saved_model(folder: Path, name: str) -> SavedModel:
    """The model in the file `name` of a folder; raises as `read_saved` does."""
    saved = read_saved(folder, name)
    where, state = _state_dict(saved.value, f"{name}: data.pkl")
    views = views_of(state, saved.offsets, where)
    return SavedModel(saved.stamp, views, _step(saved.value), _settings(saved.value))


def views_of(state: Table, offsets: Mapping[str, int], where: str) -> dict[str, View]:
    """The tensors of a state dict; raises CheckpointError for anything else in it but `_extra_state`."""
    if state.unnamed:
        raise refused(where, f"has {state.unnamed:,} names that are no text")
    return {
        tensor: view_of(value, offsets, f"{where}: {shown(tensor)}")
        for tensor, value in state.items()
        if type(value) is Applied or not tensor.endswith(_EXTRA)
    }


def _settings(top: Table) -> Mapping[str, Any] | None:
    """What is plain data among the settings beside the weights."""
    table = next((top[key] for key in SETTINGS if type(top.get(key)) is Table), None)
    if table is None:
        return None
    return {key: value for key, value in table.items() if value is None or type(value) in (bool, int, float, str)}


def offsets_of(archive: Archive, content: Content) -> dict[str, int]:
    """Where the storages begin that a pickle mentions, by key; CheckpointError when one is not there or not whole."""
    return {key: _offset(archive, storage) for key, storage in content.storages.items()}


def _offset(archive: Archive, storage: Storage) -> int:
    member = f"data/{storage.key}"
    if member not in archive.members:
        raise refused(archive.name, f"has no {shown(member)}, a storage that its data.pkl uses")
    size = archive.members[member].size
    if size != storage.size:
        raise refused(archive.name, f"has {size:,} bytes of {shown(member)} where its data.pkl says {storage.size:,}")
    return archive.offset(member)


def _state_dict(top: Any, what: str) -> tuple[str, Table]:
    """The model's state dict and what to call it: the value itself, or what is under one of STATE_DICTS."""
    if type(top) is not Table:
        raise refused(
            what,
            f"holds {_kind(top)}, not a state dict",
            remedy="save model.state_dict(), or a dict with it under `model`, instead of the model itself",
        )
    under = [key for key in STATE_DICTS if type(top.get(key)) is Table and _has_tensors(top[key])]
    if len(under) > 1:
        raise refused(what, f"has tensors both under `{under[0]}` and under `{under[1]}`: which is the model?")
    if not under and not _has_tensors(top):
        opaque = [key for key in STATE_DICTS if type(top.get(key)) is Opaque]
        if opaque:
            raise refused(what, f"has {_kind(top[opaque[0]])} under `{opaque[0]}`, not a state dict")
        raise refused(what, f"has no state dict: neither itself nor under any of {', '.join(STATE_DICTS)}")
    return (f"{what}: {under[0]}", top[under[0]]) if under else (what, top)


def _has_tensors(table: Table) -> bool:
    return any(type(value) is Applied for value in table.values())


def _kind(value: Any) -> str:
    if type(value) in (Opaque, Word):
        return f"an object {shown(value.text)}"
    return "a tensor" if type(value) is Applied else f"a {type(value).__name__}"


def _step(top: Table) -> int | None:
    values = (top.get(key) for key in STEPS)
    return next((step for step in values if is_count(step)), None)


def view_of(value: Any, offsets: Mapping[str, int], what: str) -> View:
    """Where the tensor lies that a pickle describes; CheckpointError, about `what`, when it cannot be there."""
    if type(value) is not Applied:
        raise refused(what, f"is {_kind(value)}, not a tensor")
    typed = value.word.name.endswith("_v2")
    fixed = 6 if typed else 7
    if len(value.arguments) < fixed or type(value.arguments[0]) is not Storage:
        raise refused(what, "is a tensor without a storage")
    storage, start, shape, strides = value.arguments[:4]
    dtype = storage.dtype if typed else _dtype(value.arguments[6])
    if dtype is None:
        raise refused(what, f"has an unknown dtype; known are {', '.join(DTYPE_BYTES)}")
    if not _are_counts((start,)) or not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise refused(what, "has a shape or an offset that is no count of elements")
    if not _are_counts(strides) or len(strides) != len(shape):
        raise refused(what, "has strides that are no counts of elements, one a dimension")
    if any(value.arguments[fixed:]):
        raise refused(what, "is a conjugate or negative view, which is not read", remedy="save it with .resolve_conj()")
    item, count = DTYPE_BYTES[dtype], math.prod(shape)
    held = storage.size // item
    span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) if count else 0
    if start + span > held or count > held:
        raise refused(what, f"has {count:,} elements up to {start + span:,} in a storage of {held:,}")
    return View(dtype, shape, strides, offsets[storage.key] + start * item, span * item)


def _dtype(value: Any) -> str | None:
    return value.name if type(value) is Word and value.module == "torch" and value.name in DTYPE_BYTES else None


def _are_counts(value: Any) -> bool:
    return type(value) is tuple and all(map(is_count, value))
