"""What the safetensors formats share: which files a checkpoint's weights are in, whether they are whole, opening them.

Torch is imported by `open_weights` alone: everything else runs in the parent daemon.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.records import CheckpointRef, FileStamp, Readiness, Weights

from .checkpoint_folder import SAVE_AGAIN, WAIT, as_found, names_in, opened, read_config, read_json, stamps_of
from .safetensors_header import MAX_TENSORS, Extent, read_header

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_RELEVANT = re.compile(r".*\.safetensors|.*\.json|.*\.txt")


@dataclass(frozen=True)
class Layout:
    """The weights of one checkpoint found whole: for each tensor its file and its place in it, and all stamps.

    `texts` are what the files' headers say beside the tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, Extent]]
    files: tuple[FileStamp, ...]
    texts: Mapping[str, str] = field(default_factory=dict)


def read_folder(folder: Path) -> Layout:
    """The layout of a folder written by save_pretrained, in one file or in shards.

    Raises IncompleteCheckpoint for what may still be written, CheckpointError for what is refused.
    """
    names = names_in(folder)
    if WEIGHTS in names:  # transformers too prefers it to an index
        return read_files(folder, (WEIGHTS,))
    if INDEX in names:
        return _read_shards(folder)
    raise IncompleteCheckpoint(f"neither {WEIGHTS} nor {INDEX} is there", remedy=WAIT)


def read_files(folder: Path, weight_files: Sequence[str], *, own_config: bool = True) -> Layout:
    """The layout of config.json and the named weight files; raises as `read_folder` does.

    Without `own_config` the folder's config.json belongs to several checkpoints: writing it again with the next one
    does not change this one, so it is no part of its stamps.
    """
    config, config_stamp = _read_config(folder)
    tensors: dict[str, tuple[str, Extent]] = {}
    texts: dict[str, str] = {}
    stamps = [config_stamp] if own_config else []
    for name in weight_files:
        with opened(folder, name) as (descriptor, stamp):
            header = read_header(descriptor, name, stamp.size)
        for key, text in header.texts.items():
            if texts.setdefault(key, text) != text:
                raise CheckpointError(f"the headers say two things of `{key}` up to {name}", remedy=SAVE_AGAIN)
        for tensor, extent in header.tensors.items():
            if tensor in tensors:
                raise CheckpointError(
                    f"tensor `{tensor}` is both in {tensors[tensor][0]} and in {name}", remedy=SAVE_AGAIN
                )
            tensors[tensor] = (name, extent)
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"there are more than {MAX_TENSORS:,} tensors up to {name}", remedy=SAVE_AGAIN)
        stamps.append(stamp)
    return Layout(folder, config, tensors, _by_name(stamps), texts)


def with_file(layout: Layout, stamp: FileStamp) -> Layout:
    """The same layout with one more file that belongs to the checkpoint."""
    return dataclasses.replace(layout, files=_by_name([*layout.files, stamp]))


def inspect_layout(read: Callable[[Path], Layout], path: Path, folder: Path, names: frozenset[str]) -> Readiness:
    """What `read` says about the checkpoint at `path` as a Readiness.

    Its files are those that make up a whole checkpoint, or, for one that is not, all of `names` in `folder`: the
    evidence that somebody is still writing.
    """
    stamps = stamps_of(folder, names)
    # What has no stamp may go or come without a change of the stamps, so nothing is remembered of it.
    known = {stamp.name for stamp in stamps}
    look = _look if all(name in known for name in names if _RELEVANT.fullmatch(name)) else _look.__wrapped__
    found = look(read, path, stamps)
    if found.state == "complete" and not set(found.files) <= set(stamps):
        return Readiness("incomplete", f"{path.name} changed while it was looked at", stamps)
    return found


# Reading a long header takes seconds, and every scan asks: each version of the files is read once.
@lru_cache(maxsize=1024)
def _look(read: Callable[[Path], Layout], path: Path, stamps: tuple[FileStamp, ...]) -> Readiness:
    try:
        layout = read(path)
    except (IncompleteCheckpoint, TornCheckpoint) as error:
        return Readiness("incomplete", error.what, stamps)
    except CheckpointError as error:
        return Readiness("damaged", error.what, stamps)
    return Readiness("complete", f"{len(layout.files)} files have their sizes", layout.files)


def open_weights(ref: CheckpointRef, read: Callable[[], Layout]) -> Weights:
    """The weights of a checkpoint, its files held open; raises as `as_found` does."""
    from .safetensors_weights import SafetensorsWeights  # imports torch

    return SafetensorsWeights(as_found(ref, read))


def _by_name(stamps: Sequence[FileStamp]) -> tuple[FileStamp, ...]:
    return tuple(sorted(stamps, key=lambda stamp: stamp.name))


def _read_config(folder: Path) -> tuple[dict[str, Any], FileStamp]:
    try:
        return read_config(folder)
    except IncompleteCheckpoint as error:
        raise IncompleteCheckpoint(
            f"{error.what}: the model cannot be built without it",
            remedy=f"put the model's {CONFIG} into {folder} (model.config.save_pretrained writes it)",
        ) from error


def _read_shards(folder: Path) -> Layout:
    index, stamp = read_json(folder, INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{INDEX} has no weight_map from tensors to shards", remedy=SAVE_AGAIN)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not shard.endswith(".safetensors") or any(part in shard for part in ("/", "\\", "..", "\0")):
            raise CheckpointError(
                f"{INDEX} names the shard {shard!r}, which is not the name of a safetensors file beside it",
                remedy=SAVE_AGAIN,
            )
    layout = read_files(folder, shards)
    for tensor, shard in weight_map.items():
        if tensor not in layout.tensors or layout.tensors[tensor][0] != shard:
            raise CheckpointError(f"{INDEX} says that {shard} holds `{tensor}`; it does not", remedy=SAVE_AGAIN)
    return with_file(layout, stamp)
