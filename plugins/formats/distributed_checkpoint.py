"""Folders of torch.distributed.checkpoint (DCP): torchtitan's `step-N`, FSDP, Accelerate, Lightning, Composer.

Every rank writes its chunks of the tensors into `__R_K.distcp`; `.metadata` says where they are, and is renamed into
place when all are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.records import CheckpointRef, FileStamp, Readiness, Weights

from .checkpoint_folder import (
    SAVE_AGAIN,
    WAIT,
    as_found,
    is_file,
    names_in,
    opened,
    read_config,
    read_into,
    stamp_of,
    stamps_of,
)
from .dcp_metadata import METADATA, StoredTensor, read_contents
from .megatron_metadata import is_megatron_folder
from .safetensors_files import FORMAT as SAFETENSORS
from .safetensors_reader import CONFIG, INDEX, WEIGHTS
from .transformers_checkpoint import SENTINEL

MAX_METADATA_BYTES = 64 * 2**20
ACCELERATE = "pytorch_model_fsdp_0"
_SHARD = re.compile(r"__\d+_\d+\.distcp")
_COUNTED_SAVES = re.compile(r"checkpoint_\d+")


@dataclass(frozen=True)
class Layout:
    """A checkpoint found whole. The files of `tensors` are in `folder` under `inside` + their name."""

    folder: Path
    inside: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[FileStamp, ...]


class DistributedFormat:
    """A folder with `.metadata` and `__R_K.distcp`, or a folder of Accelerate with that in `pytorch_model_fsdp_0`.

    It is complete when `.metadata` parses, every file that it names is there and as long as it says, and config.json
    is in the folder or in the one above. The optimizer's entries are never read.
    """

    name = "dcp"

    def recognise(self, path: Path) -> bool:
        if is_megatron_folder(path):
            return False
        names = names_in(path)
        if any(_SHARD.fullmatch(name) for name in names) or is_file(path / METADATA):
            return True
        return ACCELERATE in names and not names & {WEIGHTS, INDEX}

    def inspect(self, path: Path) -> Readiness:
        inside = _inside(path)
        try:
            stamp = stamp_of(path, inside + METADATA)
            ends = _ends(path, inside, stamp)
            if isinstance(ends, CheckpointError):
                raise _again(ends)
            files = [stamp, *_check_files(path, inside, ends)]
            _, config = _read_config(path, inside)
        except CheckpointError as error:
            names = names_in(path) | {inside + name for name in names_in(path / inside)}
            unfinished = isinstance(error, IncompleteCheckpoint | TornCheckpoint)
            return Readiness("incomplete" if unfinished else "damaged", error.what, stamps_of(path, names))
        return Readiness("complete", f"{len(files)} files have their sizes", _by_name(files, config))

    def step(self, path: Path) -> int | None:
        """The number in a name such as `step-800`, `checkpoint-800`, `global_step800` or `epoch=1-step=800.ckpt`.

        Accelerate's own folder is named by the one it is in, but its `checkpoint_8` counts savings and not steps.
        """
        named = path.parent if path.name == ACCELERATE else path
        if (named != path or _inside(path)) and _COUNTED_SAVES.fullmatch(named.name):
            return None
        return SAFETENSORS.step(named.with_name(named.name.removesuffix(".ckpt")))

    def open(self, ref: CheckpointRef) -> Weights:
        from .dcp_weights import DcpWeights  # imports torch

        return DcpWeights(as_found(ref, lambda: _read(ref.path)))


def _inside(path: Path) -> str:
    """Where in the folder the checkpoint is: directly, or in Accelerate's folder in it."""
    names = names_in(path)
    direct = METADATA in names or any(_SHARD.fullmatch(name) for name in names)
    return "" if direct or ACCELERATE not in names else f"{ACCELERATE}/"


def _read(path: Path) -> Layout:
    inside = _inside(path)
    pickle, stamp = _read_metadata(path, inside)
    contents = read_contents(pickle)
    files = [stamp, *_check_files(path, inside, contents.ends)]
    config, config_stamps = _read_config(path, inside)
    return Layout(path, inside, config, contents.tensors, _by_name(files, config_stamps))


# Parsed once for each version, to the little that a look needs. What is refused is kept too, or else a large file that
# is refused would be parsed at every look; a disk that failed is not.
@lru_cache(maxsize=256)
def _ends(path: Path, inside: str, stamp: FileStamp) -> Mapping[str, int] | CheckpointError:
    pickle, read = _read_metadata(path, inside)
    if read != stamp:
        raise TornCheckpoint(f"{METADATA} changed while it was read", remedy=WAIT)
    try:
        return read_contents(pickle).ends
    except CheckpointError as error:
        return _again(error)


def _again(error: CheckpointError) -> CheckpointError:
    """The same error without what hangs on one that was raised: the frames, and in them the whole file."""
    return type(error)(error.what, remedy=error.remedy)


def _read_metadata(path: Path, inside: str) -> tuple[bytearray, FileStamp]:
    with opened(path, inside + METADATA) as (descriptor, stamp):
        if stamp.size > MAX_METADATA_BYTES:
            raise CheckpointError(
                f"{METADATA} has {stamp.size:,} bytes, more than the {MAX_METADATA_BYTES:,} that are read",
                remedy=SAVE_AGAIN,
            )
        data = bytearray(stamp.size)
        read_into(descriptor, memoryview(data), 0, METADATA)
    return data, stamp


def _check_files(path: Path, inside: str, ends: Mapping[str, int]) -> list[FileStamp]:
    if SENTINEL in names_in(path):
        raise IncompleteCheckpoint(f"{SENTINEL} is there: Trainer is still writing, or was stopped", remedy=WAIT)
    stamps = []
    for file in sorted(ends):
        stamp = stamp_of(path, inside + file)
        if stamp.size < ends[file]:
            raise IncompleteCheckpoint(f"{file} has {stamp.size:,} of {ends[file]:,} bytes", remedy=WAIT)
        stamps.append(stamp)
    return stamps


def _read_config(path: Path, inside: str) -> tuple[dict[str, Any], list[FileStamp]]:
    """config.json, and its stamp if it is the checkpoint's own.

    One in the folder above belongs to several checkpoints: writing it again with the next does not change this one.
    """
    for name in dict.fromkeys((inside + CONFIG, CONFIG)):
        if CONFIG in names_in((path / name).parent):
            config, stamp = read_config(path, name)
            return config, [stamp]
    try:
        return read_config(path.parent)[0], []
    except IncompleteCheckpoint as error:
        raise IncompleteCheckpoint(
            f"{error.what}: the model cannot be built without it",
            remedy=f"put the model's {CONFIG} beside {METADATA} in {path / inside} (model.config.save_pretrained "
            "writes it), or in the folder above for all checkpoints of the run",
        ) from error


def _by_name(*stamps: Iterable[FileStamp]) -> tuple[FileStamp, ...]:
    return tuple(sorted((stamp for some in stamps for stamp in some), key=lambda stamp: stamp.name))


FORMAT = DistributedFormat()
