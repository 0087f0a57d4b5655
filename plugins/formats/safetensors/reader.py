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

from ..files.begun import without_weights
from ..files.checkpoint_folder import (
    CONFIG,
    as_found,
    by_name,
    not_whole,
    opened,
    read_config,
    read_json,
    refused,
    stamp_of,
    stamps_of,
)
from ..files.remembered import Remembered, check_seen
from ..files.steps import marks_of_accelerate
from .header import MAX_TENSORS, Extent, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_PICKLE = re.compile(r"pytorch_model(?:_fsdp)?\.bin|pytorch_model\.bin\.index\.json|pytorch_model.*-\d+-of-\d+\.bin")
_RELEVANT = re.compile(r".*\.safetensors|.*\.json|.*\.txt")


@dataclass(frozen=True)
class LocatedTensors:
    """The weights of one checkpoint found whole: for each tensor its file and its place in it, and all stamps.

    `texts` are what the files' headers say beside the tensors, `beside` what is said of weights that are not read.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, Extent]]
    files: tuple[FileStamp, ...]
    texts: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""


def is_pickle(name: str) -> bool:
    """True for a name that transformers gives to a file of torch.save with weights, or to the index of such."""
    return _PICKLE.fullmatch(name) is not None


def holds_pickles_only(names: frozenset[str]) -> bool:
    """True for a folder with these names when its weights are in files of torch.save and none in safetensors."""
    return any(map(is_pickle, names)) and not weights_among(names)


def weights_among(names: frozenset[str]) -> frozenset[str]:
    """The names that transformers gives to files of safetensors, among those of a folder."""
    return frozenset(name for name in names if name in (WEIGHTS, INDEX) or _SHARD.fullmatch(name))


def read_folder(folder: Path, names: frozenset[str]) -> LocatedTensors:
    """The layout of a folder with these names, written by save_pretrained, in one file or in shards.

    Accelerate saves no config.json: a folder with its marks may have that above, and its mark is a file of the
    checkpoint then. Raises IncompleteCheckpoint for what may still be written, CheckpointError for what is refused.
    """
    mark = min(marks_of_accelerate(names), default=None)
    if WEIGHTS in names:  # transformers too prefers it to an index
        layout = read_files(folder, (WEIGHTS,), mark=mark)
    elif INDEX in names:
        layout = _read_shards(folder, mark=mark)
    else:
        missing = f"neither {WEIGHTS} nor {INDEX} is there"
        if weights_among(names):
            raise IncompleteCheckpoint(
                f"{missing}, which says what is in the shards",
                remedy=f"wait until the trainer has written {INDEX}; a folder that was saved without one is to be "
                "saved again with save_pretrained",
            )
        raise without_weights(names, missing)
    return dataclasses.replace(layout, beside=_beside(folder, names))


def _beside(folder: Path, names: frozenset[str]) -> str:
    """What is said of weights in the folder that are not read."""
    said = []
    if WEIGHTS in names and (shards := weights_among(names) - {WEIGHTS}):
        said.append(not_read(folder, WEIGHTS, shards))
    if pickles := sorted(filter(is_pickle, names)):
        said.append(f"{pickles[0]} is there too and is not read: the weights in safetensors are, as in transformers")
    return "; ".join(said)


def not_read(folder: Path, read: str, shards: frozenset[str]) -> str:
    """What is said of shards and their index beside the whole weights in the file `read`."""
    named = next((name for name in sorted(shards) if name.endswith(".json")), min(shards))
    if max(_time_of(folder, name) for name in shards) <= _time_of(folder, read):
        return f"{named} is there too and is not read: {read} is, as in transformers"
    return (
        f"{named} is there too, newer, and is not read: {read} is, as in transformers; remove {read} if the shards "
        "are the checkpoint"
    )


def _time_of(folder: Path, name: str) -> int:
    try:
        return (folder / name).stat().st_mtime_ns
    except OSError:
        return 0


def read_files(
    folder: Path, weight_files: Sequence[str], *, own_config: bool = True, mark: str | None = None
) -> LocatedTensors:
    """The layout of config.json and the named weight files; raises as `read_folder` does.

    Without `own_config` the folder's config.json belongs to several checkpoints: writing it again with the next one
    does not change this one, so it is no part of its stamps. With a `mark` it may be above, and the file of that name
    is one of the checkpoint's; any other folder without its own config.json is half removed.
    """
    config, config_files = read_config(folder, above=mark is not None)
    if mark is not None and not config_files:
        config_files = (stamp_of(folder, mark),)
    tensors: dict[str, tuple[str, Extent]] = {}
    texts: dict[str, str] = {}
    stamps = [*config_files] if own_config else []
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
    return LocatedTensors(folder, config, tensors, by_name(stamps), texts)


def with_file(layout: LocatedTensors, stamp: FileStamp) -> LocatedTensors:
    """The same layout with one more file that belongs to the checkpoint."""
    return dataclasses.replace(layout, files=by_name(layout.files, [stamp]))


Read = Callable[[Path, frozenset[str]], LocatedTensors]
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
        files, beside = look(read, path, names, (*stamps, *shared))
        check_seen(path, files, stamps)
    except CheckpointError as error:
        return not_whole(error, stamps)
    return Readiness("complete", f"{len(files)} files have their sizes", files, beside=beside)


def _read_files(
    read: Read, path: Path, names: frozenset[str], _stamps: tuple[FileStamp, ...]
) -> tuple[tuple[FileStamp, ...], str]:
    layout = read(path, names)
    return layout.files, layout.beside


_files = Remembered(_read_files, incomplete=True)


def open_weights(ref: CheckpointRef, read: Callable[[], LocatedTensors]) -> Weights:
    """The weights of a checkpoint, its files held open; raises as `as_found` does."""
    from .weights import SafetensorsWeights  # imports torch

    return SafetensorsWeights(as_found(ref, read))


def _read_shards(folder: Path, *, mark: str | None) -> LocatedTensors:
    weight_map, stamp = read_index(folder, INDEX, ".safetensors")
    layout = read_files(folder, sorted(set(weight_map.values())), mark=mark)
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
