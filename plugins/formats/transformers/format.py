"""`checkpoint-N/` with weights in safetensors: transformers' Trainer, Accelerate, and training loops of one's own."""

from __future__ import annotations

from pathlib import Path

from peel_agent.errors import CheckpointError
from peel_agent.records import CheckpointRef, Claim, Listing, LocalListing, Readiness, Weights

from ..files.steps import marks_of_accelerate, step_in_name
from ..files.trainer import (
    SENTINEL,
    STATE,
    awaited,
    check_written,
    global_step,
    is_trainer_folder,
    marks_of_trainer,
    trainer_step,
)
from ..safetensors.reader import (
    LocatedTensors,
    holds_pickles_only,
    inspect_layout,
    open_weights,
    read_folder,
    weights_among,
)


class TransformersFormat:
    """A folder named `checkpoint-N`, whoever wrote it.

    It is complete when every weight file has the size its header says, every shard of the index is there and
    checkpoint-is-incomplete.txt is not. Where there is anything else of Trainer's (training_args.bin, optimizer.pt,
    scheduler.pt, rng_state.pth), trainer_state.json must say step N. One whose weights are pickles only is left to
    `torch`.
    """

    name = "transformers"

    def claim(self, listing: Listing) -> Claim | None:
        if not is_trainer_folder(listing):
            return None
        names = listing.names()
        weights = weights_among(names)
        if weights:
            needs = weights | marks_of_accelerate(names) | (names & {STATE, SENTINEL})
            is_trainers = STATE in names or bool(marks_of_trainer(names))
            return Claim("specific" if is_trainers else "generic", needs, awaits=awaited(names))
        return None if holds_pickles_only(names) else Claim("begun")

    def inspect(self, listing: LocalListing) -> Readiness:
        return inspect_layout(_read, listing.path, listing.path, listing.names())

    def step(self, listing: LocalListing) -> int | None:
        """`global_step` of trainer_state.json, None until that parses; without that file the N of the name."""
        if STATE not in listing.names():
            return step_in_name(listing.name)
        try:
            return global_step(listing.path)
        except CheckpointError:
            return None

    def open(self, ref: CheckpointRef) -> Weights:
        return open_weights(ref, lambda: _read(ref.path, LocalListing(ref.path).names()))


def _read(path: Path, names: frozenset[str]) -> LocatedTensors:
    check_written(path)
    layout = read_folder(path, names)
    trainer_step(path, names)
    return layout


FORMAT = TransformersFormat()
