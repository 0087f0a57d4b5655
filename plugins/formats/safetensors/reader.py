"""What the safetensors formats share: which files a checkpoint's weights are in, whether they are whole, opening them.

Torch is imported by `open_weights` alone: everything else runs in the parent daemon.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, FileStamp, Readiness, Weights

from ..files.checkpoint_folder import (
    CONFIG,
    WAIT,
    as_found,
    by_name,
    not_whole,
    opened,
    read_config,
    read_json,
    refused,
    stamps_of,
)
from ..files.remembered import Remembered, check_seen
from .header import MAX_TENSORS, Extent, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_RANDOM_STATES = re.compile(r"random_states_\d+\.pkl")
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


def weights_among(names: frozenset[str]) -> frozenset[str]:
    """The names that transformers gives to files of safetensors, among those of a folder."""
    return frozenset(name for name in names if name in (WEIGHTS, INDEX) or _SHARD.fullmatch(name))


def read_folder(folder: Path, names: frozenset[str]) -> Layout:
    """The layout of a folder with these names, written by save_pretrained, in one file or in shards.

    Raises IncompleteCheckpoint for what may still be written, CheckpointError for what is refused.
    """
    above = saved_by_accelerate(names)
    if WEIGHTS in names:  # transformers too prefers it to an index
        return read_files(folder, (WEIGHTS,), config_above=above)
    if INDEX in names:
        return _read_shards(folder, config_above=above)
    raise IncompleteCheckpoint(f"neither {WEIGHTS} nor {INDEX} is there", remedy=WAIT)


def read_files(
    folder: Path, weight_files: Sequence[str], *, own_config: bool = True, config_above: bool = False
) -> Layout:
    """The layout of config.json and the named weight files; raises as `read_folder` does.

    Without `own_config` the folder's config.json belongs to several checkpoints: writing it again with the next one
    does not change this one, so it is no part of its stamps. Accelerate saves none, so its folders may have it above;
    any other folder without its own is half removed.
    """
    config, own = read_config(folder, above=config_above)
    tensors: dict[str, tuple[str, Extent]] = {}
    texts: dict[str, str] = {}
    stamps = [*own] if own_config else []
    for name in weight_files:
        with opened(folder, name) as (descriptor, stamp):
            header = read_header(descriptor, name, stamp.size)
        for key, text in header.texts.items():
            if texts.setdefault(key, text) != text:
                raise refused("the headers", f"say two things of `{key}` up to {name}")
        for tensor, extent in header.tensors.items():
            if tensor in tensors:
                raise refused(f"tensor `{tensor}`", f"is both in {tensors[tensor][0]} and in {name}")
            tensors[tensor] = (name, extent)
        if len(tensors) > MAX_TENSORS:
            raise refused("there", f"are more than {MAX_TENSORS:,} tensors up to {name}")
        stamps.append(stamp)
    return Layout(folder, config, tensors, by_name(stamps), texts)


def saved_by_accelerate(names: frozenset[str]) -> bool:
    """Whether a folder with these names was written by Accelerate's save_state."""
    return bool(marks_of_accelerate(names))


def marks_of_accelerate(names: frozenset[str]) -> frozenset[str]:
    """The names by which a folder of Accelerate's save_state is known."""
    return frozenset(filter(_RANDOM_STATES.fullmatch, names))


def with_file(layout: Layout, stamp: FileStamp) -> Layout:
    """The same layout with one more file that belongs to the checkpoint."""
    return dataclasses.replace(layout, files=by_name(layout.files, [stamp]))


Read = Callable[[Path, frozenset[str]], Layout]
"""Reads the checkpoint at a path, of which there are files of these names."""


def inspect_layout(read: Read, path: Path, folder: Path, names: frozenset[str]) -> Readiness:
    """What `read` says about the checkpoint at `path` as a Readiness.

    Its files are those that make up a whole checkpoint, or, for one that is not, all of `names` in `folder`: the
    evidence that somebody is still writing.
    """
    stamps = stamps_of(folder, names)
    # What has no stamp may go or come without a change of the stamps, so nothing is remembered of it.
    known = {stamp.name for stamp in stamps}
    look = _files if all(name in known for name in names if _RELEVANT.fullmatch(name)) else _files.anew
    try:
        # A config.json above is no stamp of the checkpoint, but what comes of the look may hang on it.
        shared = () if CONFIG in known else stamps_of(folder.parent, {CONFIG})
        files = look(read, path, names, (*stamps, *shared))
        check_seen(path, files, stamps)
    except CheckpointError as error:
        return not_whole(error, stamps)
    return Readiness("complete", f"{len(files)} files have their sizes", files)


def _read_files(read: Read, path: Path, names: frozenset[str], _stamps: tuple[FileStamp, ...]) -> tuple[FileStamp, ...]:
    return read(path, names).files


_files = Remembered(_read_files, incomplete=True)


def open_weights(ref: CheckpointRef, read: Callable[[], Layout]) -> Weights:
    """The weights of a checkpoint, its files held open; raises as `as_found` does."""
    from .weights import SafetensorsWeights  # imports torch

    return SafetensorsWeights(as_found(ref, read))


def _read_shards(folder: Path, *, config_above: bool) -> Layout:
    weight_map, stamp = read_index(folder, INDEX, ".safetensors")
    layout = read_files(folder, sorted(set(weight_map.values())), config_above=config_above)
    check_index(INDEX, weight_map, layout.tensors)
    return with_file(layout, stamp)


def read_index(folder: Path, name: str, suffix: str) -> tuple[dict[str, str], FileStamp]:
    """The shard of each tensor by transformers' index `name`, and the stamp of that file; shards end in `suffix`."""
    index, stamp = read_json(folder, name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise refused(name, "has no weight_map from tensors to shards")
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(suffix) or any(part in shard for part in ("/", "\\", "..", "\0")):
            raise refused(name, f"names the shard {shard!r}, which is not the name of a {suffix} file beside it")
    return weight_map, stamp


def check_index(name: str, weight_map: Mapping[str, str], tensors: Mapping[str, tuple[str, object]]) -> None:
    """Raises CheckpointError when a tensor is not in the shard that the index `name` says."""
    for tensor, shard in weight_map.items():
        if tensor not in tensors or tensors[tensor][0] != shard:
            raise refused(name, f"says that {shard} holds `{tensor}`; it does not")
