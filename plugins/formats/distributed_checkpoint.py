"""Folders of torch.distributed.checkpoint (DCP): torchtitan's `step-N`, FSDP, Accelerate, Lightning, Composer.

Every rank writes its chunks of the tensors into `__R_K.distcp`; `.metadata` says where they are, and is renamed into
place when all are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peel_agent.errors import CheckpointError
from peel_agent.records import CheckpointRef, FileStamp, Readiness, Weights

from .checkpoint_folder import as_found, by_name, is_file, names_in, not_whole, read_config, stamp_of, stamps_of
from .dcp_folder import Layout, check_shards, read_metadata
from .dcp_metadata import METADATA, SHARD, read_contents
from .megatron_metadata import is_megatron_folder
from .remembered import Remembered
from .safetensors_files import COUNTED_SAVES
from .safetensors_files import FORMAT as SAFETENSORS
from .safetensors_reader import INDEX, WEIGHTS

ACCELERATE = "pytorch_model_fsdp_0"


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
        if any(SHARD.fullmatch(name) for name in names) or is_file(path / METADATA):
            return True
        return ACCELERATE in names and not names & {WEIGHTS, INDEX}

    def inspect(self, path: Path) -> Readiness:
        inside = _inside(path)
        try:
            stamp = stamp_of(path, inside + METADATA)
            files = [stamp, *check_shards(path, inside, _ends(path, inside, stamp))]
            _, config = read_config(path, inside, above=True)
        except CheckpointError as error:
            names = names_in(path) | {inside + name for name in names_in(path / inside)}
            return not_whole(error, stamps_of(path, names))
        return Readiness("complete", f"{len(files)} files have their sizes", by_name(files, config))

    def step(self, path: Path) -> int | None:
        """The number in a name such as `step-800`, `checkpoint-800`, `global_step800` or `epoch=1-step=800.ckpt`.

        Accelerate's own folder is named by the one it is in, but its `checkpoint_8` counts savings and not steps.
        """
        named = path.parent if path.name == ACCELERATE else path
        if (named != path or _inside(path)) and COUNTED_SAVES.fullmatch(named.name):
            return None
        return SAFETENSORS.step(named.with_name(named.name.removesuffix(".ckpt")))

    def open(self, ref: CheckpointRef) -> Weights:
        from .dcp_weights import DcpWeights  # imports torch

        return DcpWeights(as_found(ref, lambda: _read(ref.path)))


def _inside(path: Path) -> str:
    """Where in the folder the checkpoint is: directly, or in Accelerate's folder in it."""
    names = names_in(path)
    direct = METADATA in names or any(SHARD.fullmatch(name) for name in names)
    return "" if direct or ACCELERATE not in names else f"{ACCELERATE}/"


def _read(path: Path) -> Layout:
    inside = _inside(path)
    pickle, stamp = read_metadata(path, inside)
    contents = read_contents(pickle)
    shards = check_shards(path, inside, contents.ends)
    config, own = read_config(path, inside, above=True)
    return Layout(path, inside, config, contents.tensors, by_name([stamp], shards, own))


def _read_ends(path: Path, inside: str, stamp: FileStamp) -> Mapping[str, int]:
    pickle, _ = read_metadata(path, inside, stamp)
    return read_contents(pickle).ends


_ends = Remembered(_read_ends, incomplete=True, most=256)


FORMAT = DistributedFormat()
