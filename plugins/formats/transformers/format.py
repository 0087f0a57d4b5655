"""`checkpoint-N/` as transformers' Trainer writes it: the weights first, trainer_state.json last."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, Claim, FileStamp, Listing, LocalListing, Readiness, Weights

from ..files.checkpoint_folder import SAVE_AGAIN, WAIT, read_json, stamp_of
from ..safetensors.reader import (
    Layout,
    inspect_layout,
    open_weights,
    read_folder,
    weights_among,
    with_file,
)

STATE = "trainer_state.json"
SENTINEL = "checkpoint-is-incomplete.txt"
_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
_PICKLE = re.compile(r"pytorch_model(?:_fsdp)?\.bin|pytorch_model\.bin\.index\.json|pytorch_model.*-\d+-of-\d+\.bin")
_SAFETENSORS = re.compile(r"model\.safetensors(?:\.index\.json)?|.*-\d+-of-\d+\.safetensors")


def is_trainer_folder(listing: Listing) -> bool:
    """True for a folder of the name that Trainer gives its checkpoints."""
    return is_trainer_name(listing.name) and listing.is_folder


def is_trainer_name(name: str) -> bool:
    """True for the name that Trainer gives to a checkpoint's folder."""
    return _NAME.fullmatch(name) is not None


def holds_pickles_only(names: frozenset[str]) -> bool:
    """True for a folder with these names when its weights are in files of torch.save and none in safetensors."""
    return any(map(_PICKLE.fullmatch, names)) and not any(map(_SAFETENSORS.fullmatch, names))


class TransformersFormat:
    """A Trainer checkpoint.

    It is complete when trainer_state.json says step N, every weight file has the size its header says, every shard of
    the index is there and checkpoint-is-incomplete.txt is not. One whose weights are pickles only is left to `torch`.
    """

    name = "transformers"

    def claim(self, listing: Listing) -> Claim | None:
        if not is_trainer_folder(listing):
            return None
        names = listing.names()
        weights = weights_among(names)
        if weights:
            return Claim("generic", weights | names & {STATE, SENTINEL})
        return None if holds_pickles_only(names) else Claim("begun")

    def inspect(self, listing: LocalListing) -> Readiness:
        return inspect_layout(_read, listing.path, listing.path, listing.names())

    def step(self, listing: LocalListing) -> int | None:
        """`global_step` of trainer_state.json; None until that parses."""
        try:
            return _global_step(listing.path, stamp_of(listing.path, STATE))
        except CheckpointError:
            return None

    def open(self, ref: CheckpointRef) -> Weights:
        return open_weights(ref, lambda: _read(ref.path, LocalListing(ref.path).names()))


def _read(path: Path, names: frozenset[str]) -> Layout:
    check_written(path)
    layout = read_folder(path, names)
    _, stamp = trainer_step(path)
    return with_file(layout, stamp)


def check_written(path: Path) -> None:
    """Raises IncompleteCheckpoint while Trainer's sentinel is in the folder."""
    if os.path.lexists(path / SENTINEL):
        raise IncompleteCheckpoint(f"{SENTINEL} is there: Trainer is still writing, or was stopped", remedy=WAIT)


def trainer_step(path: Path) -> tuple[int, FileStamp]:
    """`global_step` of trainer_state.json and that file's stamp; CheckpointError when it is not the folder's own."""
    stamp = stamp_of(path, STATE)
    step = _global_step(path, stamp)
    named = _NAME.fullmatch(path.name)
    if named is not None and step != int(named[1]):
        raise CheckpointError(f"{STATE} says global_step {step:,} in {path.name}", remedy=SAVE_AGAIN)
    return step, stamp


# The log of a long run makes this file megabytes; the stamp is in the key so that each version is parsed once.
@lru_cache(maxsize=1024)
def _global_step(path: Path, _stamp: FileStamp) -> int:
    state, _ = read_json(path, STATE)
    step = state.get("global_step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{STATE} has global_step {step!r}, not a count of steps", remedy=SAVE_AGAIN)
    return step


FORMAT = TransformersFormat()
