"""Weights written by torch.save: a folder with pytorch_model.bin or its shards, or one .pt, .pth, .bin or .ckpt file.

Nothing in such a file is ever executed, and torch.load is never called: see pickles/machine.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, Claim, FileStamp, Listing, LocalListing, Readiness, Weights

from ..files.checkpoint_folder import CONFIG, WAIT, not_whole, stamps_of
from ..files.remembered import Remembered, check_seen
from ..files.shared_prefix import shared_prefix
from ..files.steps import marks_of_accelerate, step_in_name, step_of_folder
from ..files.trainer import SENTINEL, STATE, awaited, check_written, is_trainer_name, marks_of_trainer, trainer_step
from ..pickles.torch_archive import View, read_saved_model
from ..pickles.torch_zip import refused
from ..safetensors.header import MAX_TENSORS, Extent
from ..safetensors.reader import (
    LocatedTensors,
    check_index,
    holds_pickles_only,
    is_pickle,
    not_read,
    open_weights,
    read_files,
    read_index,
    with_file,
)

WEIGHTS = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
"""The second is what Accelerate makes of FSDP's parts (FULL_STATE_DICT)."""

INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt"})
_SHARD = re.compile(r".*-\d+-of-\d+")
_ASIDE = re.compile(  # names that trainers give to what is no model, and data beside it
    r"(?:optim(?:izer)?|(?:lr[-_])?scheduler|scaler|sampler|dataloader|rng[-_]state|random[-_]states?|training[-_]args"
    r"|distrib[-_]optim|meta(?:data)?)(?:[-_.].*)?|.*[-_]optim[-_]states|(?:train|val(?:id)?|test|heldout)\d*",
    re.IGNORECASE,
)


class TorchFormat:
    """Files of torch.save; a folder with weights in safetensors too is left to their formats.

    A shard alone is no checkpoint, nor is a link to another file of its folder, such as Lightning's `last.ckpt`.
    """

    name = "torch"

    def claim(self, listing: Listing) -> Claim | None:
        if not listing.is_folder:
            return Claim("generic") if _is_file_of_weights(listing) else None
        names = listing.names()
        if not holds_pickles_only(names):
            return None
        needs = frozenset(name for name in _deciding(names) if name not in marks_of_trainer(names) or name == SENTINEL)
        return Claim("generic", needs, awaits=awaited(names) if is_trainer_name(listing.name) else ())

    def inspect(self, listing: LocalListing) -> Readiness:
        try:
            examined = _look(listing)
        except CheckpointError as error:
            return not_whole(error, stamps_of(_folder_of(listing), _names_of(listing)))
        files = examined.files
        return Readiness("complete", f"{len(files)} files have their sizes", files, beside=examined.beside)

    def step(self, listing: LocalListing) -> int | None:
        """The count beside the weights (iter_num, global_step, step, iteration), Trainer's, else that in the name."""
        try:
            step = _look(listing).step
        except CheckpointError:
            step = None
        if step is not None or _is_single(listing):
            return step_in_name(listing.path.stem) if step is None else step
        return step_of_folder(listing.name, listing.names())

    def open(self, ref: CheckpointRef) -> Weights:
        from .weights import TorchWeights  # imports torch

        read = functools.cache(lambda: _read(LocalListing(ref.path)))
        raw = open_weights(ref, lambda: read().layout)
        return TorchWeights(raw, read().views)


@dataclass(frozen=True)
class _LocatedViews:
    """A checkpoint found whole: its files and where each tensor's bytes lie, and what the bytes are."""

    layout: LocatedTensors
    views: Mapping[str, View]
    step: int | None


@dataclass(frozen=True)
class _Examined:
    files: tuple[FileStamp, ...]
    step: int | None
    beside: str


def _look(listing: LocalListing) -> _Examined:
    names = _names_of(listing)
    stamps = stamps_of(_folder_of(listing), names)
    # What has no stamp may go or come without a change of the stamps, so nothing is remembered of it.
    examine = _examine if len(stamps) == len(names) else _examine.anew
    return examine(listing.path, names, stamps, single=_is_single(listing))


def _read_files(path: Path, names: frozenset[str], stamps: tuple[FileStamp, ...], *, single: bool) -> _Examined:
    located = _read_single(path) if single else _read_named(path, names)
    check_seen(path, located.layout.files, stamps)
    return _Examined(located.layout.files, located.step, located.layout.beside)


_examine = Remembered(_read_files, incomplete=False)


def _read(listing: LocalListing) -> _LocatedViews:
    return _read_single(listing.path) if _is_single(listing) else _read_named(listing.path, _names_of(listing))


def _read_single(path: Path) -> _LocatedViews:
    return _read_pickles(path.parent, (path.name,), own_config=False)


def _read_named(folder: Path, names: frozenset[str]) -> _LocatedViews:
    """The checkpoint in a folder in which there are files of these names."""
    if not is_trainer_name(folder.name):
        return _read_folder(folder, names)
    check_written(folder)
    located = _read_folder(folder, names)
    return dataclasses.replace(located, step=trainer_step(folder, names))


def _read_folder(folder: Path, names: frozenset[str]) -> _LocatedViews:
    mark = min(marks_of_accelerate(names), default=None)
    for name in WEIGHTS:  # transformers too prefers it to an index
        if name in names:
            located = _read_pickles(folder, (name,), mark=mark)
            others = frozenset(filter(is_pickle, names)) - {*WEIGHTS}
            beside = not_read(folder, name, others) if others else ""
            return dataclasses.replace(located, layout=dataclasses.replace(located.layout, beside=beside))
    if INDEX not in names:
        raise IncompleteCheckpoint(f"neither {WEIGHTS[0]} nor {INDEX} is there", remedy=WAIT)
    weight_map, stamp = read_index(folder, INDEX, ".bin")
    located = _read_pickles(folder, tuple(sorted(set(weight_map.values()))), weight_map=weight_map, mark=mark)
    return dataclasses.replace(located, layout=with_file(located.layout, stamp))


def _read_pickles(
    folder: Path,
    names: tuple[str, ...],
    *,
    weight_map: Mapping[str, str] | None = None,
    own_config: bool = True,
    mark: str | None = None,
) -> _LocatedViews:
    """config.json and the named files; raises IncompleteCheckpoint or CheckpointError.

    Where there is no config.json, the settings that a single file has of its model take its place.
    """
    alone = len(names) == 1 and not LocalListing(folder).is_file(CONFIG)
    first = read_saved_model(folder, names[0]) if alone else None
    if first is not None and first.settings is not None:
        layout = LocatedTensors(folder, first.settings, {}, ())
    else:
        layout = read_files(folder, (), own_config=own_config, mark=mark)
    places: dict[str, tuple[str, View]] = {}
    step = None
    for name in names:
        saved = first if first is not None else read_saved_model(folder, name)
        for tensor, view in saved.tensors.items():
            if tensor in places:
                raise refused(f"tensor `{tensor}`", f"is both in {places[tensor][0]} and in {name}")
            places[tensor] = (name, view)
        if len(places) > MAX_TENSORS:
            raise refused(name, f"is one of several with more than {MAX_TENSORS:,} tensors")
        layout, step = with_file(layout, saved.stamp), saved.step if len(names) == 1 else None
    check_index(INDEX, weight_map or {}, places)
    skip = len(shared_prefix(tuple(places)))
    views = {tensor[skip:]: view for tensor, (_, view) in places.items()}
    # As bytes: torch_weights makes dtype, shape and strides of them.
    extents = {
        tensor[skip:]: (name, Extent("uint8", (view.size,), view.offset, view.size))
        for tensor, (name, view) in places.items()
    }
    return _LocatedViews(dataclasses.replace(layout, tensors=extents), views, step)


def _is_file_of_weights(listing: Listing) -> bool:
    path = PurePath(listing.name)
    if path.suffix not in _SUFFIXES or _SHARD.fullmatch(path.stem) or _ASIDE.fullmatch(path.stem) or listing.is_alias:
        return False
    # Data is kept in .bin files too.
    is_model = path.suffix != ".bin" or listing.parent.is_file(CONFIG)
    return is_model and listing.parent.is_file(listing.name)


def _is_single(listing: LocalListing) -> bool:
    # By name, not by what is there now: a file that vanished is still a file that is missing.
    return listing.path.suffix in _SUFFIXES and not listing.is_folder


def _folder_of(listing: LocalListing) -> Path:
    return listing.path.parent if _is_single(listing) else listing.path


def _names_of(listing: LocalListing) -> frozenset[str]:
    """The names of the files that decide about a checkpoint."""
    if _is_single(listing):
        return frozenset({listing.name, CONFIG} if listing.parent.is_file(CONFIG) else {listing.name})
    return _deciding(listing.names())


def _deciding(names: frozenset[str]) -> frozenset[str]:
    marks = marks_of_trainer(names) | marks_of_accelerate(names)
    return frozenset(name for name in names if name in (CONFIG, STATE) or _is_weights(name)) | marks


def _is_weights(name: str) -> bool:
    return name in (*WEIGHTS, INDEX) or (name.endswith(".bin") and name.startswith("pytorch_model"))


FORMAT = TorchFormat()
