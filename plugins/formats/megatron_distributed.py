"""Distributed checkpoints of Megatron-core: `iter_0000100/` with metadata.json, common.pt, `.metadata`, `__R_K.distcp`.

common.pt is written first, metadata.json when all else is there. The tensors are those of torch.distributed.checkpoint,
under Megatron's names, and are handed on under those of the transformers model whose config.json lies beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.records import CheckpointRef, FileStamp, Readiness, Weights

from .checkpoint_folder import WAIT, as_found, names_in, stamp_of, stamps_of
from .dcp_metadata import METADATA
from .distributed_checkpoint import Layout, _again, _by_name, _check_files, _read_config, _read_metadata
from .megatron_metadata import (
    COMMON,
    check_backend,
    check_common,
    is_megatron_folder,
    iteration,
    read_contents,
)
from .megatron_names import ModelSizes, model_parts, model_sizes


class MegatronFormat:
    """A folder of megatron.core.dist_checkpointing with the backend torch_dist.

    It is complete when metadata.json and `.metadata` parse, common.pt and every file that `.metadata` names are there
    and as long as it says, and config.json of a model that is mapped is in the folder or in the one above. Optimizer
    and random states are never read; of common.pt only whether a switch is on that tensors do not show.
    """

    name = "megatron"

    def recognise(self, path: Path) -> bool:
        return is_megatron_folder(path)

    def inspect(self, path: Path) -> Readiness:
        try:
            found = _look(path)
        except CheckpointError as error:
            files = stamps_of(path, names_in(path))
            if isinstance(error, IncompleteCheckpoint | TornCheckpoint):
                return Readiness("incomplete", error.what, files)
            return Readiness("damaged", f"{error.what}; {error.remedy}", files)
        return Readiness("complete", f"{len(found.files)} files have their sizes", found.files)

    def step(self, path: Path) -> int | None:
        """N of `iter_N`."""
        return iteration(path)

    def open(self, ref: CheckpointRef) -> Weights:
        from .dcp_weights import DcpWeights  # imports torch
        from .megatron_weights import MegatronWeights

        layout = as_found(ref, lambda: _read(ref.path))
        shapes = {name: tensor.shape for name, tensor in layout.tensors.items()}
        return MegatronWeights(DcpWeights(layout), model_parts(model_sizes(layout.config), shapes))


@dataclass(frozen=True)
class _Found:
    files: tuple[FileStamp, ...]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class _Summary:
    """What a look needs of `.metadata`."""

    ends: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def _look(path: Path) -> _Found:
    backend = check_backend(path)
    stamp = stamp_of(path, METADATA)
    summary = _summary(path, stamp)
    if isinstance(summary, CheckpointError):
        raise _again(summary)
    found = _files(path, backend, stamp, summary.ends)
    fault = _misfit(path, stamp, model_sizes(found.config))
    if fault is not None:
        raise _again(fault)
    return found


def _read(path: Path) -> Layout:
    backend = check_backend(path)
    pickle, stamp = _read_metadata(path, "")
    contents = read_contents(pickle)
    found = _files(path, backend, stamp, contents.ends)
    return Layout(path, "", found.config, contents.tensors, found.files)


def _files(path: Path, backend: FileStamp, metadata: FileStamp, ends: Mapping[str, int]) -> _Found:
    shards = _check_files(path, "", ends)
    common = stamp_of(path, COMMON)
    fault = _common_fault(path, common)
    if fault is not None:
        raise _again(fault)
    config, own = _read_config(path, "")
    return _Found(_by_name([backend, metadata, common, *shards], own), config)


# As for `dcp`: parsed once for each version of the file, and what is refused is kept too.
@lru_cache(maxsize=256)
def _summary(path: Path, stamp: FileStamp) -> _Summary | CheckpointError:
    pickle, read = _read_metadata(path, "")
    if read != stamp:
        raise TornCheckpoint(f"{METADATA} changed while it was read", remedy=WAIT)
    try:
        contents = read_contents(pickle)
    except CheckpointError as error:
        return _again(error)
    return _Summary(contents.ends, {name: tensor.shape for name, tensor in contents.tensors.items()})


@lru_cache(maxsize=256)
def _misfit(path: Path, stamp: FileStamp, model: ModelSizes) -> CheckpointError | None:
    summary = _summary(path, stamp)
    try:
        model_parts(model, {} if isinstance(summary, CheckpointError) else summary.shapes)
    except CheckpointError as error:
        return _again(error)
    return None


@lru_cache(maxsize=256)
def _common_fault(path: Path, stamp: FileStamp) -> CheckpointError | None:
    try:
        if check_common(path) != stamp:
            raise TornCheckpoint(f"{COMMON} changed while it was read", remedy=WAIT)
    except TornCheckpoint:
        raise
    except CheckpointError as error:
        return _again(error)
    return None


FORMAT = MegatronFormat()
