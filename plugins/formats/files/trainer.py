"""What transformers' Trainer writes in a `checkpoint-N` beside the weights, and how far it has come.

The name is not Trainer's alone: Accelerate's users and training loops of one's own choose it too, and write no
trainer_state.json. What Trainer writes besides tells its folders from theirs.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import FileStamp, Listing

from .checkpoint_folder import SAVE_AGAIN, WAIT, read_json, stamp_of
from .steps import step_in_name

STATE = "trainer_state.json"
SENTINEL = "checkpoint-is-incomplete.txt"
_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
_MARK = re.compile(r"training_args\.bin|(?:optimizer|scheduler|scaler)\.pt|rng_state(?:_\d+)?\.pth")


def is_trainer_folder(listing: Listing) -> bool:
    """True for a folder of the name that Trainer gives its checkpoints."""
    return is_trainer_name(listing.name) and listing.is_folder


def is_trainer_name(name: str) -> bool:
    """True for the name that Trainer gives to a checkpoint's folder."""
    return _NAME.fullmatch(name) is not None


def marks_of_trainer(names: frozenset[str]) -> frozenset[str]:
    """The names that tell a folder of Trainer from one that is only called so."""
    return frozenset(name for name in names if name == SENTINEL or _MARK.fullmatch(name))


def awaited(names: frozenset[str]) -> tuple[str, ...]:
    """What Trainer has yet to write in a `checkpoint-N` with these names."""
    return (STATE,) if STATE not in names and marks_of_trainer(names) else ()


def check_written(path: Path) -> None:
    """Raises IncompleteCheckpoint while Trainer's sentinel is in the folder."""
    if os.path.lexists(path / SENTINEL):
        raise IncompleteCheckpoint(f"{SENTINEL} is there: Trainer is still writing, or was stopped", remedy=WAIT)


def trainer_step(path: Path, names: frozenset[str]) -> int | None:
    """The step of a `checkpoint-N` with these names: `global_step` of trainer_state.json, else N.

    trainer_state.json is no file of the checkpoint: it may come after the weights were read, and changes nothing of
    them. Raises IncompleteCheckpoint while Trainer has yet to write it, CheckpointError when it is of another folder.
    """
    if awaited(names):
        mark = min(marks_of_trainer(names))
        raise IncompleteCheckpoint(
            f"{STATE} is not there, which Trainer writes last ({mark} is there)",
            remedy=f"wait until Trainer has written it; if it was stopped before and the weights are to be read all "
            f'the same, write {{"global_step": {step_in_name(path.name) or 0}}} into {path / STATE}',
        )
    if STATE not in names:
        return step_in_name(path.name)
    step = global_step(path)
    named = _NAME.fullmatch(path.name)
    if named is not None and step != int(named[1]):
        raise CheckpointError(f"{STATE} says global_step {step:,} in {path.name}", remedy=SAVE_AGAIN)
    return step


def global_step(path: Path) -> int:
    """`global_step` of a folder's trainer_state.json; raises CheckpointError when there is none."""
    return _global_step(path, stamp_of(path, STATE))


# The log of a long run makes this file megabytes; the stamp is in the key so that each version is parsed once.
@lru_cache(maxsize=1024)
def _global_step(path: Path, _stamp: FileStamp) -> int:
    state, _ = read_json(path, STATE)
    step = state.get("global_step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{STATE} has global_step {step!r}, not a count of steps", remedy=SAVE_AGAIN)
    return step
