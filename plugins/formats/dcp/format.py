"""Folders of torch.distributed.checkpoint (DCP): torchtitan's `step-N`, FSDP, Accelerate, Lightning, Composer.

Every rank writes its chunks of the tensors into `__R_K.distcp`; `.metadata` says where they are, and is renamed into
place when all are there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from peel_agent.errors import CheckpointError
from peel_agent.records import CheckpointRef, Claim, FileStamp, Listing, LocalListing, Readiness, Weights

from ..files.checkpoint_folder import CONFIG, as_found, by_name, not_whole, read_config, stamp_of, stamps_of
from ..files.remembered import Remembered
from ..files.steps import counts_savings, marks_of_accelerate, step_in_name
from ..megatron.metadata import is_megatron_folder
from ..safetensors.reader import INDEX, WEIGHTS
from .folder import ChunkedTensors, check_shards, read_metadata
from .metadata import METADATA, SHARD, read_contents

ACCELERATE = "pytorch_model_fsdp_0"
_OPTIMIZER = re.compile(r"optim(?:izer)?(?:_\d+)?")  # Accelerate's optimizer_0, beside that


class DistributedFormat:
    """A folder with `.metadata` and `__R_K.distcp`, or a folder of Accelerate with that in `pytorch_model_fsdp_0`.

    It is complete when `.metadata` parses, every file that it names is there and as long as it says, and config.json
    is in the folder or in the one above. The optimizer's entries are never read.
    """

    name = "dcp"

    def claim(self, listing: Listing) -> Claim | None:
        if is_megatron_folder(listing) or _OPTIMIZER.fullmatch(listing.name):
            return None
        names = listing.names()
        if any(map(SHARD.fullmatch, names)) or listing.is_file(METADATA):
            return Claim("generic", _parts_of(names, ""))
        if ACCELERATE not in names or names & {WEIGHTS, INDEX}:
            return None
        return Claim("generic", _parts_of(listing.folder(ACCELERATE).names(), f"{ACCELERATE}/"))

    def inspect(self, listing: LocalListing) -> Readiness:
        path, inside = listing.path, _inside(listing.names())
        try:
            stamp = stamp_of(path, inside + METADATA)
            files = [stamp, *check_shards(path, inside, _ends(path, inside, stamp))]
            _, config = read_config(path, inside, above=True)
        except CheckpointError as error:
            below = {inside + name for name in listing.folder(ACCELERATE).names()} if inside else set()
            return not_whole(error, stamps_of(path, listing.names() | below))
        return Readiness("complete", f"{len(files)} files have their sizes", by_name(files, config))

    def step(self, listing: LocalListing) -> int | None:
        """The number in a name such as `step-800`, `checkpoint-800`, `global_step800` or `epoch=1-step=800.ckpt`.

        Accelerate's own folder is named by the one it is in, but its `checkpoint_8` counts savings and not steps.
        """
        named = listing.parent if listing.name == ACCELERATE else listing
        names = listing.names()
        is_accelerate = named is not listing or _inside(names) or marks_of_accelerate(names)
        if is_accelerate and counts_savings(named.name):
            return None
        return step_in_name(named.name.removesuffix(".ckpt"))

    def open(self, ref: CheckpointRef) -> Weights:
        from .weights import DcpWeights  # imports torch

        return DcpWeights(as_found(ref, lambda: _read(ref.path, _inside(LocalListing(ref.path).names()))))


def _parts_of(names: frozenset[str], inside: str) -> frozenset[str]:
    """What is read among the names of the folder `inside`."""
    return frozenset(inside + name for name in names if name in (METADATA, CONFIG) or name.endswith(".distcp"))


def _inside(names: frozenset[str]) -> str:
    """Where in a folder with these names the checkpoint is: directly, or in Accelerate's folder in it."""
    direct = METADATA in names or any(SHARD.fullmatch(name) for name in names)
    return "" if direct or ACCELERATE not in names else f"{ACCELERATE}/"


def _read(path: Path, inside: str) -> ChunkedTensors:
    pickle, stamp = read_metadata(path, inside)
    contents = read_contents(pickle)
    shards = check_shards(path, inside, contents.ends)
    config, config_files = read_config(path, inside, above=True)
    return ChunkedTensors(path, inside, config, contents.tensors, by_name([stamp], shards, config_files))


def _read_ends(path: Path, inside: str, stamp: FileStamp) -> Mapping[str, int]:
    pickle, _ = read_metadata(path, inside, stamp)
    return read_contents(pickle).ends


_ends = Remembered(_read_ends, incomplete=True, most=256)


FORMAT = DistributedFormat()
