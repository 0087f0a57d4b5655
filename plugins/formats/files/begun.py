"""Folders with the name of a checkpoint in which there are no weights yet: what they hold, and what is missing."""

from __future__ import annotations

import re

from peel_agent.errors import IncompleteCheckpoint
from peel_agent.records import Listing

from .checkpoint_folder import WAIT
from .steps import marks_of_accelerate, step_in_name
from .trainer import marks_of_trainer

_OPTIMIZER = re.compile(
    r"(?:optim(?:izer)?|(?:lr[-_])?scheduler|scaler|sampler)(?:_\d+)?\.(?:bin|pt|pth|pkl)", re.IGNORECASE
)
_TOKENIZER = re.compile(
    r"tokenizer(?:_config)?\.json|tokenizer\.model|vocab\.(?:json|txt)|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.\w+"
)


def is_begun(listing: Listing) -> bool:
    """True for a folder named by its step, with a tokenizer or the state of a training in it."""
    if not listing.is_folder or step_in_name(listing.name) is None:
        return False
    names = listing.names()
    return bool(_states(names) or _tokenizer(names))


def without_weights(names: frozenset[str], missing: str) -> IncompleteCheckpoint:
    """The error of a folder with these names, in which `missing` are files of weights that a format looks for."""
    states, tokenizer = _states(names), _tokenizer(names)
    if states:
        return IncompleteCheckpoint(
            f"there is the state of a training ({', '.join(states[:3])}) and no weights: {missing}",
            remedy="save the model beside it too (model.save_pretrained(FOLDER)), or take the folder out of the "
            "watched one",
        )
    if tokenizer:
        return IncompleteCheckpoint(
            f"there is a tokenizer ({', '.join(tokenizer[:3])}) and no weights: {missing}",
            remedy="save the model beside it too: model.save_pretrained(FOLDER)",
        )
    return IncompleteCheckpoint(missing, remedy=WAIT)


def _states(names: frozenset[str]) -> list[str]:
    named = {name for name in names if _OPTIMIZER.fullmatch(name)}
    return sorted(named | marks_of_trainer(names) | marks_of_accelerate(names))


def _tokenizer(names: frozenset[str]) -> list[str]:
    return sorted(filter(_TOKENIZER.fullmatch, names))
