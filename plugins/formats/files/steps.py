"""The training step in the name of a checkpoint."""

from __future__ import annotations

import re

_STEP = re.compile(
    r"(?:.*[-_.=])?(?:checkpoint|ckpt|global[-_]?step|step|iteration|iter)[-_.=]?([0-9]{1,18})|([0-9]{1,18})",
    re.IGNORECASE,
)
_COUNTED_SAVES = re.compile(r"checkpoint_\d+")
_RANDOM_STATES = re.compile(r"random_states_\d+\.pkl")


def step_in_name(name: str) -> int | None:
    """The number in a name such as `checkpoint-800`, `step_800`, `iter800`, `global_step800` or `800`."""
    match = _STEP.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def counts_savings(name: str) -> bool:
    """True for the name that Accelerate gives: its `checkpoint_8` counts savings and not steps."""
    return _COUNTED_SAVES.fullmatch(name) is not None


def marks_of_accelerate(names: frozenset[str]) -> frozenset[str]:
    """The names by which a folder of Accelerate's save_state is known."""
    return frozenset(filter(_RANDOM_STATES.fullmatch, names))


def step_of_folder(name: str, names: frozenset[str]) -> int | None:
    """The step in the name of a folder with these names in it; None for one of Accelerate's counts."""
    return None if counts_savings(name) and marks_of_accelerate(names) else step_in_name(name)
