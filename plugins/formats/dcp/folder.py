"""The files of a torch.distributed.checkpoint folder: `.metadata`, and the shards that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.errors import IncompleteCheckpoint, TornCheckpoint
from peel_agent.records import FileStamp

from ..files.checkpoint_folder import WAIT, opened, read_into, refused, stamp_of
from ..files.trainer import check_written
from .metadata import METADATA, StoredTensor

MAX_METADATA_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ChunkedTensors:
    """A checkpoint found whole. The files of `tensors` are in `folder` under `inside` + their name."""

    folder: Path
    inside: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[FileStamp, ...]


def read_metadata(path: Path, inside: str, stamp: FileStamp | None = None) -> tuple[bytearray, FileStamp]:
    """The pickle in `.metadata` and the file's stamp.

    Raises TornCheckpoint when it is not the file of `stamp`, CheckpointError when it is too long.
    """
    with opened(path, inside + METADATA) as (descriptor, read):
        if stamp not in (None, read):
            raise TornCheckpoint(f"{METADATA} changed while it was read", remedy=WAIT)
        if read.size > MAX_METADATA_BYTES:
            raise refused(METADATA, f"has {read.size:,} bytes, more than the {MAX_METADATA_BYTES:,} that are read")
        data = bytearray(read.size)
        read_into(descriptor, memoryview(data), 0, METADATA)
    return data, read


def check_shards(path: Path, inside: str, ends: Mapping[str, int]) -> list[FileStamp]:
    """Stamps of the shards in the order of their names, by which `ends` says where the last item of each ends.

    Raises IncompleteCheckpoint when one is shorter or not there, and while Trainer is writing.
    """
    check_written(path)
    stamps = []
    for file in sorted(ends):
        stamp = stamp_of(path, inside + file)
        if stamp.size < ends[file]:
            raise IncompleteCheckpoint(f"{file} has {stamp.size:,} of {ends[file]:,} bytes", remedy=WAIT)
        stamps.append(stamp)
    return stamps
