"""Weights in safetensors outside transformers' Trainer: one file, or a folder written by save_pretrained."""

from __future__ import annotations

import re
from pathlib import Path

from peel_agent.records import CheckpointRef, Claim, Listing, LocalListing, Readiness, Weights

from ..files.begun import is_begun
from ..files.checkpoint_folder import CONFIG
from ..files.steps import marks_of_accelerate, step_in_name, step_of_folder
from ..files.trainer import is_trainer_folder
from .reader import LocatedTensors, inspect_layout, open_weights, read_files, read_folder, weights_among

SUFFIX = ".safetensors"
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")


class SafetensorsFormat:
    """A `*.safetensors` file with config.json beside it, or config.json with model.safetensors or its shards.

    A folder named `checkpoint-N` is left to the `transformers` format; a shard alone is no checkpoint. A folder named
    by its step in which there are a tokenizer or the state of an optimizer, and no weights, is one that is begun.
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
        if weights:
            return Claim("generic", weights | marks_of_accelerate(names))
        return Claim("begun") if is_begun(listing) else None

    def inspect(self, listing: LocalListing) -> Readiness:
        path = listing.path
        if path.suffix == SUFFIX:
            return inspect_layout(_read, path, path.parent, frozenset({CONFIG, path.name}))
        return inspect_layout(_read, path, path, listing.names())

    def step(self, listing: LocalListing) -> int | None:
        """The number in the name. Accelerate's `checkpoint_8` counts savings and not steps."""
        if listing.name.endswith(SUFFIX):
            return step_in_name(listing.name.removesuffix(SUFFIX))
        return step_of_folder(listing.name, listing.names())

    def open(self, ref: CheckpointRef) -> Weights:
        return open_weights(ref, lambda: _read(ref.path, LocalListing(ref.path).names()))


def _read(path: Path, names: frozenset[str]) -> LocatedTensors:
    # By name, not by what is there now: a file that vanished is still a file that is missing.
    if path.suffix == SUFFIX:
        return read_files(path.parent, (path.name,), own_config=False)
    return read_folder(path, names)


FORMAT = SafetensorsFormat()
