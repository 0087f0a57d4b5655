"""Weights written by torch.save: a folder with pytorch_model.bin or its shards, or one .pt, .pth, .bin or .ckpt file.

Nothing in such a file is ever executed, and torch.load is never called: see pickle_machine.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, FileStamp, Readiness, Weights

from .checkpoint_folder import CONFIG, WAIT, is_file, is_folder, names_in, not_whole, stamps_of
from .remembered import Remembered, check_seen
from .safetensors_files import FORMAT as SAFETENSORS
from .safetensors_header import MAX_TENSORS, Extent
from .safetensors_reader import Layout, check_index, open_weights, read_files, read_index, with_file
from .shared_prefix import shared_prefix
from .torch_archive import View, read_saved_model
from .torch_zip import refused
from .transformers_checkpoint import SENTINEL, STATE, check_written, holds_pickles_only, is_trainer_folder, trainer_step

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

    def recognise(self, path: Path) -> bool:
        if path.suffix in _SUFFIXES and is_file(path):
            if _SHARD.fullmatch(path.stem) or _ASIDE.fullmatch(path.stem) or _is_second_name(path):
                return False
            return path.suffix != ".bin" or is_file(path.parent / CONFIG)  # data is kept in .bin files too
        return holds_pickles_only(names_in(path))

    def inspect(self, path: Path) -> Readiness:
        try:
            files = _look(path).files
        except CheckpointError as error:
            return not_whole(error, stamps_of(_folder_of(path), _names_of(path)))
        return Readiness("complete", f"{len(files)} files have their sizes", files)

    def step(self, path: Path) -> int | None:
        """The count beside the weights (iter_num, global_step, step, iteration), Trainer's, else that in the name."""
        try:
            step = _look(path).step
        except CheckpointError:
            step = None
        return SAFETENSORS.step(path.with_suffix("") if _is_single(path) else path) if step is None else step

    def open(self, ref: CheckpointRef) -> Weights:
        from .torch_weights import TorchWeights  # imports torch

        read = functools.cache(lambda: _read(ref.path))
        raw = open_weights(ref, lambda: read().layout)
        return TorchWeights(raw, read().views)


@dataclass(frozen=True)
class _Found:
    """A checkpoint found whole: its files and where each tensor's bytes lie, and what the bytes are."""

    layout: Layout
    views: Mapping[str, View]
    step: int | None


@dataclass(frozen=True)
class _Examined:
    files: tuple[FileStamp, ...]
    step: int | None


def _look(path: Path) -> _Examined:
    names = _names_of(path)
    stamps = stamps_of(_folder_of(path), names)
    # What has no stamp may go or come without a change of the stamps, so nothing is remembered of it.
    examine = _examine if len(stamps) == len(names) else _examine.anew
    return examine(path, stamps)


def _read_files(path: Path, stamps: tuple[FileStamp, ...]) -> _Examined:
    found = _read(path)
    check_seen(path, found.layout.files, stamps)
    return _Examined(found.layout.files, found.step)


_examine = Remembered(_read_files, incomplete=False)


def _read(path: Path) -> _Found:
    if _is_single(path):
        return _read_pickles(path.parent, (path.name,), own_config=False)
    if is_trainer_folder(path):
        check_written(path)
        found = _read_folder(path)
        step, stamp = trainer_step(path)
        return dataclasses.replace(found, layout=with_file(found.layout, stamp), step=step)
    return _read_folder(path)


def _read_folder(folder: Path) -> _Found:
    names = names_in(folder)
    for name in WEIGHTS:  # transformers too prefers it to an index
        if name in names:
            return _read_pickles(folder, (name,))
    if INDEX not in names:
        raise IncompleteCheckpoint(f"neither {WEIGHTS[0]} nor {INDEX} is there", remedy=WAIT)
    weight_map, stamp = read_index(folder, INDEX, ".bin")
    found = _read_pickles(folder, tuple(sorted(set(weight_map.values()))), weight_map=weight_map)
    return dataclasses.replace(found, layout=with_file(found.layout, stamp))


def _read_pickles(
    folder: Path, names: tuple[str, ...], *, weight_map: Mapping[str, str] | None = None, own_config: bool = True
) -> _Found:
    """config.json and the named files; raises IncompleteCheckpoint or CheckpointError.

    Where there is no config.json, the settings that a single file has of its model take its place.
    """
    first = read_saved_model(folder, names[0]) if len(names) == 1 and not is_file(folder / CONFIG) else None
    if first is not None and first.settings is not None:
        layout = Layout(folder, first.settings, {}, ())
    else:
        layout = read_files(folder, (), own_config=own_config)
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
    return _Found(dataclasses.replace(layout, tensors=extents), views, step)


def _is_single(path: Path) -> bool:
    # By name, not by what is there now: a file that vanished is still a file that is missing.
    return path.suffix in _SUFFIXES and not is_folder(path)


def _folder_of(path: Path) -> Path:
    return path.parent if _is_single(path) else path


def _names_of(path: Path) -> frozenset[str]:
    """The names of the files that decide about a checkpoint."""
    if _is_single(path):
        return frozenset({path.name, CONFIG} if is_file(path.parent / CONFIG) else {path.name})
    return frozenset(name for name in names_in(path) if name in (CONFIG, STATE, SENTINEL) or _is_weights(name))


def _is_weights(name: str) -> bool:
    return name in (*WEIGHTS, INDEX) or (name.endswith(".bin") and name.startswith("pytorch_model"))


def _is_second_name(path: Path) -> bool:
    try:
        return path.is_symlink() and path.resolve().parent == path.parent.resolve()
    except (OSError, RuntimeError):
        return False


FORMAT = TorchFormat()
