"""Distributed checkpoints of Megatron-core: `iter_0000100/` with metadata.json, common.pt, `.metadata`, `__R_K.distcp`.

common.pt is written first, metadata.json when all else is there. The tensors are those of torch.distributed.checkpoint,
under Megatron's names, and are handed on under those of the transformers model whose config.json lies beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, TornCheckpoint
from peel_agent.records import CheckpointRef, Claim, FileStamp, Listing, LocalListing, Readiness, Weights

from ..dcp.folder import ChunkedTensors, check_shards, read_metadata
from ..dcp.metadata import METADATA
from ..files.checkpoint_folder import (
    WAIT,
    as_found,
    by_name,
    not_whole,
    read_config,
    stamp_of,
    stamps_of,
)
from ..files.remembered import Remembered
from .metadata import (
    BACKEND,
    COMMON,
    check_backend,
    check_common,
    is_megatron_folder,
    iteration,
    read_contents,
)
from .names import ModelSizes, model_parts, model_sizes


class MegatronFormat:
    """A folder of megatron.core.dist_checkpointing with the backend torch_dist.

    It is complete when metadata.json and `.metadata` parse, common.pt and every file that `.metadata` names are there
    and as long as it says, and config.json of a model that is mapped is in the folder or in the one above. Optimizer
    and random states are never read; of common.pt only whether a switch is on that tensors do not show.
    """

    name = "megatron"

    def claim(self, listing: Listing) -> Claim | None:
        if not is_megatron_folder(listing):
            return None
        read = (BACKEND, COMMON, METADATA)
        return Claim("specific", frozenset(n for n in listing.names() if n in read or n.endswith(".distcp")))

    def inspect(self, listing: LocalListing) -> Readiness:
        try:
            whole = _look(listing.path)
        except CheckpointError as error:
            return not_whole(error, stamps_of(listing.path, listing.names()))
        return Readiness("complete", f"{len(whole.files)} files have their sizes", whole.files)

    def step(self, listing: LocalListing) -> int | None:
        """N of `iter_N`."""
        return iteration(listing.name)

    def open(self, ref: CheckpointRef) -> Weights:
        from ..dcp.weights import DcpWeights  # imports torch
        from .weights import MegatronWeights

        layout = as_found(ref, lambda: _read(ref.path))
        shapes = {name: tensor.shape for name, tensor in layout.tensors.items()}
        return MegatronWeights(DcpWeights(layout), model_parts(model_sizes(layout.config), shapes))


@dataclass(frozen=True)
class _WholeFolder:
    files: tuple[FileStamp, ...]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class _Summary:
    """What a look needs of `.metadata`."""

    ends: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def _look(path: Path) -> _WholeFolder:
    backend = check_backend(path)
    stamp = stamp_of(path, METADATA)
    folder = _files(path, backend, stamp, _summary(path, stamp).ends)
    _check_model(path, stamp, model_sizes(folder.config))
    return folder


def _read(path: Path) -> ChunkedTensors:
    backend = check_backend(path)
    pickle, stamp = read_metadata(path, "")
    contents = read_contents(pickle)
    folder = _files(path, backend, stamp, contents.ends)
    return ChunkedTensors(path, "", folder.config, contents.tensors, folder.files)


def _files(path: Path, backend: FileStamp, metadata: FileStamp, ends: Mapping[str, int]) -> _WholeFolder:
    shards = check_shards(path, "", ends)
    common = stamp_of(path, COMMON)
    _check_common(path, common)
    config, config_files = read_config(path, above=True)
    return _WholeFolder(by_name([backend, metadata, common], shards, config_files), config)


def _read_summary(path: Path, stamp: FileStamp) -> _Summary:
    contents = read_contents(read_metadata(path, "", stamp)[0])
    return _Summary(contents.ends, {name: tensor.shape for name, tensor in contents.tensors.items()})


def _fit_model(path: Path, stamp: FileStamp, model: ModelSizes) -> None:
    model_parts(model, _summary(path, stamp).shapes)


def _read_common(path: Path, stamp: FileStamp) -> None:
    if check_common(path) != stamp:
        raise TornCheckpoint(f"{COMMON} changed while it was read", remedy=WAIT)


_summary = Remembered(_read_summary, incomplete=True, most=256)
_check_model = Remembered(_fit_model, incomplete=True, most=256)
_check_common = Remembered(_read_common, incomplete=True, most=256)


FORMAT = MegatronFormat()
