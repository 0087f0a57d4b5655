"""DeepSpeed's folders: `global_stepN` in the watched folder, and those in a `checkpoint-N` of transformers' Trainer.

With ZeRO 0 to 2 the weights are in `mp_rank_00_model_states.pt` alone, in the dtype that the model runs in: they are
read as they are, and no optimizer states are opened. With ZeRO 3 they are put together, see deepspeed/zero3.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, Claim, FileStamp, Listing, LocalListing, Readiness, Weights

from ..files.checkpoint_folder import (
    CONFIG,
    WAIT,
    as_found,
    by_name,
    not_whole,
    opened,
    read_config,
    read_into,
    stamps_of,
)
from ..files.remembered import Remembered, check_seen
from ..files.shared_prefix import shared_prefix
from ..files.trainer import SENTINEL, STATE, awaited, check_written, is_trainer_folder, is_trainer_name, trainer_step
from ..pickles.torch_archive import read_saved, views_of
from ..pickles.torch_tensors import is_count
from .names import MODEL, Names, belongs, is_states, names_by_rank, refused
from .states import Split, Whole, check_parallelism, table_of, world_size
from .zero3 import Merged, merge

LATEST = "latest"
OTHERS_TAGS = ("checkpoint", "pytorch_model")
"""The folders that Lightning and Accelerate let DeepSpeed write to, in a checkpoint's own."""

_MAX_TAG_BYTES = 200
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*")
_NUMBERED = re.compile(r"global_step([0-9]{1,18})")
_WEIGHTS = re.compile(r"(?:pytorch_)?model(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")


@dataclass(frozen=True)
class RankedTensors:
    """A checkpoint found whole: its weights by the model's names, and the stamps of all files that were read."""

    folder: Path
    inside: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Whole | Split]
    files: tuple[FileStamp, ...]


class DeepSpeedFormat:
    """A folder of DeepSpeed's states, or a checkpoint's folder of Trainer, Lightning or Accelerate with one in it.

    It is complete when the files of every rank are there and whole, as many as the states themselves say, config.json
    is in the folder or in the one above, and Trainer, if the folder is its own, has written the rest. With ZeRO 0 to 2
    the optimizer states may all be missing: they hold nothing that is read. A folder with weights in other files too is
    left to their formats.
    """

    name = "deepspeed"

    def claim(self, listing: Listing) -> Claim | None:
        names = listing.names()
        if any(map(_WEIGHTS.fullmatch, names)):
            return None
        if any(map(is_states, names)):
            is_part = is_trainer_name(listing.parent.name) or listing.name in OTHERS_TAGS
            return None if is_part else _claim_of(names, frozenset(filter(belongs, names)))
        trainer_files = names & {STATE, SENTINEL, LATEST}
        if is_trainer_folder(listing) and (LATEST in names or any(map(_NUMBERED.fullmatch, names))):
            return Claim("specific", trainer_files | _states_below(listing), awaits=awaited(names))
        tag = _tag_of_others(names)
        states = listing.folder(tag).names() if tag is not None else frozenset()
        return _claim_of(states, trainer_files | _states_below(listing)) if any(map(is_states, states)) else None

    def inspect(self, listing: LocalListing) -> Readiness:
        path = listing.path
        try:
            location = _locate(listing)
            looked = _look(listing, location.inside)
            _, config = read_config(path, location.inside, above=True)
        except CheckpointError as error:
            return not_whole(error, _evidence(listing))
        files = by_name(looked.files, location.files, config)
        return Readiness("complete", f"{len(files)} files are whole", files)

    def step(self, listing: LocalListing) -> int | None:
        """Trainer's global_step, else the number in `global_stepN`, else DeepSpeed's own count beside the weights."""
        try:
            location = _locate(listing)
            named = _NUMBERED.fullmatch(listing.name)
            if location.step is not None or named is not None:
                return location.step if named is None else int(named[1])
            return _look(listing, location.inside).step
        except CheckpointError:
            return None

    def open(self, ref: CheckpointRef) -> Weights:
        from .weights import DeepSpeedWeights  # imports torch

        return DeepSpeedWeights(as_found(ref, lambda: _read(LocalListing(ref.path))))


@dataclass(frozen=True)
class _Location:
    """Where in a checkpoint's folder the states are (`inside` is empty or ends in /), and what Trainer says beside."""

    inside: str
    files: tuple[FileStamp, ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class _Looked:
    """What is kept of a look at the states: little."""

    files: tuple[FileStamp, ...]
    step: int | None


def _read(listing: LocalListing) -> RankedTensors:
    path, location = listing.path, _locate(listing)
    merged = _read_states(path, location.inside, _names(listing, location.inside))
    config, config_files = read_config(path, location.inside, above=True)
    skip = len(shared_prefix(tuple(merged.tensors)))
    tensors = {name[skip:]: tensor for name, tensor in merged.tensors.items()}
    return RankedTensors(path, location.inside, config, tensors, by_name(merged.files, location.files, config_files))


def _locate(listing: LocalListing) -> _Location:
    path, names = listing.path, listing.names()
    if any(map(is_states, names)):
        return _Location("")
    others = _tag_of_others(names)
    if not is_trainer_folder(listing):
        return _Location(f"{others}/" if others else "")
    check_written(path)
    if others and LATEST not in names:
        return _Location(f"{others}/", step=trainer_step(path, names))
    tag, latest = _read_latest(path)
    if tag not in names:
        raise IncompleteCheckpoint(f"{LATEST} names the folder {tag}, which is not there", remedy=WAIT)
    return _Location(f"{tag}/", (latest,), trainer_step(path, names))


def _read_latest(path: Path) -> tuple[str, FileStamp]:
    with opened(path, LATEST) as (descriptor, stamp):
        text = bytearray(min(stamp.size, _MAX_TAG_BYTES + 1))
        read_into(descriptor, memoryview(text), 0, LATEST)
    tag = text.decode("latin-1").strip()
    if not tag:
        raise IncompleteCheckpoint(f"{LATEST} is empty", remedy=WAIT)
    if len(text) > _MAX_TAG_BYTES or not _TAG.fullmatch(tag):
        raise refused(LATEST, f"holds {tag[:80]!r}, which is not the name of a folder beside it")
    return tag, stamp


def _tag_of_others(names: frozenset[str]) -> str | None:
    return next((tag for tag in OTHERS_TAGS if tag in names), None)


def _below(listing: LocalListing, inside: str) -> LocalListing:
    return listing.folder(inside.removesuffix("/")) if inside else listing


def _names(listing: LocalListing, inside: str) -> frozenset[str]:
    return frozenset(filter(belongs, _below(listing, inside).names()))


def _look(listing: LocalListing, inside: str) -> _Looked:
    path, names = listing.path, _names(listing, inside)
    read = {MODEL} if MODEL in names else set(filter(is_states, names))
    stamps = stamps_of(path, (inside + name for name in read))
    # What has no stamp may go or come without a change of the stamps, so nothing is remembered of it.
    look = _look_at if len(stamps) == len(read) else _look_at.anew
    return look(path, inside, names, stamps)


def _summarise(path: Path, inside: str, names: frozenset[str], stamps: tuple[FileStamp, ...]) -> _Looked:
    merged = _read_states(path, inside, names)
    check_seen(path, merged.files, stamps)
    step = merged.step if is_count(merged.step) else None
    return _Looked(merged.files, step)


_look_at = Remembered(_summarise, incomplete=False)


def _read_states(path: Path, inside: str, names: frozenset[str]) -> Merged:
    by_rank = names_by_rank(names)
    return merge(path, inside, by_rank) if by_rank.partitioned else _read_module(path, inside, by_rank)


def _read_module(path: Path, inside: str, names: Names) -> Merged:
    """The weights of ZeRO 0 to 2, all in one file."""
    saved = read_saved(path, inside + MODEL)
    what = f"{MODEL}: data.pkl"
    states = table_of(saved.value, what)
    check_parallelism(states, what)
    # They are not read, and need not be there at all: they are what is deleted first. But some without the others are
    # a saving that goes on.
    for rank in range(world_size(states, what)) if names.optimizer else ():
        if rank not in names.optimizer:
            raise IncompleteCheckpoint(
                f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt is not there, as that of rank "
                f"{min(names.optimizer)} is",
                remedy=WAIT,
            )
    module = table_of(states.get("module"), f"{MODEL}: module")
    tensors = views_of(module, saved.offsets, f"{MODEL}: module")
    return Merged(
        {name: Whole(MODEL, view) for name, view in tensors.items()}, (saved.stamp,), states.get("global_steps")
    )


def _claim_of(states: frozenset[str], needs: frozenset[str]) -> Claim:
    try:
        names_by_rank(filter(belongs, states))
    except IncompleteCheckpoint:
        return Claim("specific", needs)
    except CheckpointError as error:
        return Claim("specific", needs, error.what, error.remedy)
    return Claim("specific", needs)


def _evidence(listing: LocalListing) -> tuple[FileStamp, ...]:
    """Stamps of what is there of a checkpoint that is not whole: they say whether somebody is still writing."""
    present = {name for name in listing.names() if is_states(name) or name in (CONFIG, STATE, SENTINEL, LATEST)}
    return stamps_of(listing.path, present | _states_below(listing))


def _states_below(listing: Listing) -> frozenset[str]:
    """Names below a folder of the states in DeepSpeed's folders in it."""
    folders = [name for name in listing.names() if _TAG.fullmatch(name) and listing.is_folder_at(name)]
    return frozenset(
        f"{folder}/{name}" for folder in folders for name in listing.folder(folder).names() if belongs(name)
    )


FORMAT = DeepSpeedFormat()
