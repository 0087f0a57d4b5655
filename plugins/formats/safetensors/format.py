"""Weights in safetensors outside transformers' Trainer: one file, or a folder written by save_pretrained."""

from __future__ import annotations

import re
from pathlib import Path

from peel_agent.records import CheckpointRef, Claim, Listing, LocalListing, Readiness, Weights

from ..files.checkpoint_folder import CONFIG
from ..transformers.format import is_trainer_folder
from .reader import (
    Layout,
    inspect_layout,
    marks_of_accelerate,
    open_weights,
    read_files,
    read_folder,
    saved_by_accelerate,
    weights_among,
)

_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_STEP = re.compile(
    r"(?:.*[-_.=])?(?:checkpoint|ckpt|global[-_]?step|step|iteration|iter)[-_.=]?([0-9]{1,18})|([0-9]{1,18})",
    re.IGNORECASE,
)


SUFFIX = ".safetensors"
COUNTED_SAVES = re.compile(r"checkpoint_\d+")


class SafetensorsFormat:
    """A `*.safetensors` file with config.json beside it, or config.json with model.safetensors or its shards.

    A folder named `checkpoint-N` is left to the `transformers` format; a shard alone is no checkpoint.
    """

    name = "safetensors"

    def claim(self, listing: Listing) -> Claim | None:
        if is_trainer_folder(listing):
            return None
        if not listing.is_folder:
            is_whole = listing.name.endswith(SUFFIX) and not _SHARD.fullmatch(listing.name)
            return Claim("generic") if is_whole and listing.parent.is_file(listing.name) else None
        names = listing.names()
        weights = weights_among(names)
        return Claim("generic", weights | marks_of_accelerate(names)) if weights else None

    def inspect(self, listing: LocalListing) -> Readiness:
        path = listing.path
        if path.suffix == SUFFIX:
            return inspect_layout(_read, path, path.parent, frozenset({CONFIG, path.name}))
        return inspect_layout(_read, path, path, listing.names())

    def step(self, listing: LocalListing) -> int | None:
        """The number in the name, as `step_in_name`. Accelerate's `checkpoint_8` counts savings and not steps."""
        if COUNTED_SAVES.fullmatch(listing.name) and saved_by_accelerate(listing.names()):
            return None
        return step_in_name(listing.name.removesuffix(SUFFIX))

    def open(self, ref: CheckpointRef) -> Weights:
        return open_weights(ref, lambda: _read(ref.path, LocalListing(ref.path).names()))


def step_in_name(name: str) -> int | None:
    """The number in a name such as `checkpoint-800`, `step_800`, `iter800`, `global_step800` or `800`."""
    found = _STEP.fullmatch(name)
    return int(found[1] or found[2]) if found else None


def _read(path: Path, names: frozenset[str]) -> Layout:
    # By name, not by what is there now: a file that vanished is still a file that is missing.
    if path.suffix == SUFFIX:
        return read_files(path.parent, (path.name,), own_config=False)
    return read_folder(path, names)


FORMAT = SafetensorsFormat()
