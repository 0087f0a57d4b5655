"""What the files of a DeepSpeed folder are by their names (deepspeed/runtime/engine.py); which layouts are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from peel_agent.errors import CheckpointError, IncompleteCheckpoint

from ..files import checkpoint_folder
from ..files.checkpoint_folder import WAIT

MODEL = "mp_rank_00_model_states.pt"
GATHER = (
    "save it gathered from the training (engine.save_16bit_model, with stage3_gather_16bit_weights_on_model_save), "
    "and point at that"
)
MERGE = (
    "run `python zero_to_fp32.py . merged --safe_serialization` in the folder above, where DeepSpeed put that script, "
    "copy the model's config.json into merged, and point at that"
)
EXPORT = "export the model with the conversion script of its training framework, and point at the export"
SAVE_AGAIN = "save the checkpoint again, into an empty folder"

refused = partial(checkpoint_folder.refused, remedy=SAVE_AGAIN)
"""The error of files of DeepSpeed."""

_RANK = "([0-9]{1,6})"
_WHOLE = re.compile(rf"mp_rank_{_RANK}_model_states\.pt")
_PARTITIONED = re.compile(rf"zero_pp_rank_{_RANK}_mp_rank_{_RANK}_model_states\.pt")
_OPTIMIZER = re.compile(rf"(?:bf16_|fp16_)?zero_pp_rank_{_RANK}_mp_rank_{_RANK}_optim_states\.pt")
_PIPELINE = re.compile(r"layer_[0-9]{1,6}-model_[0-9]{1,6}-model_states\.pt")
_EXPERT = re.compile(
    r"(?:layer_[0-9]{1,6}_)?expert_[0-9]{1,6}_mp_rank_.*_model_states\.pt|expp_rank_.*_optim_states\.pt"
)
_STATES = (_WHOLE, _PARTITIONED, _OPTIMIZER, _PIPELINE, _EXPERT)
_UNIVERSAL, _OFFLOADED = "zero", "offloaded_tensors"


@dataclass(frozen=True)
class Names:
    """The files of one saving by rank. `model` is empty unless the weights are partitioned, as in ZeRO 3."""

    partitioned: bool
    model: Mapping[int, str] = field(default_factory=dict)
    optimizer: Mapping[int, str] = field(default_factory=dict)


def is_states(name: str) -> bool:
    """True for a name that DeepSpeed gives to a file of states, read or refused."""
    return any(pattern.fullmatch(name) for pattern in _STATES)


def belongs(name: str) -> bool:
    """True for a name that decides how a folder is read."""
    return is_states(name) or name in (_UNIVERSAL, _OFFLOADED)


def names_by_rank(names: Iterable[str]) -> Names:
    """The files among the names of a folder.

    Raises CheckpointError for a layout that is not read, IncompleteCheckpoint while no file of model states is there.
    """
    names = sorted(names)
    _check_layout(names)
    model = _by_rank(_PARTITIONED, names)
    optimizer = _by_rank(_OPTIMIZER, names)
    if model and MODEL in names:
        raise CheckpointError(
            f"both {MODEL} (ZeRO 0 to 2) and {model[min(model)]} (ZeRO 3) are there: two savings in one folder",
            remedy=SAVE_AGAIN,
        )
    if not model and MODEL not in names:
        raise IncompleteCheckpoint(f"neither {MODEL} nor zero_pp_rank_0_{MODEL} is there", remedy=WAIT)
    return Names(bool(model), model, optimizer)


def _check_layout(names: list[str]) -> None:
    for name in names:
        if name == _UNIVERSAL:
            raise CheckpointError(
                f"there is a folder `{name}`: a universal checkpoint, which is not read",
                remedy="point at the checkpoint that ds_to_universal.py made it from",
            )
        if name == _OFFLOADED:
            raise CheckpointError(
                f"there is a folder `{name}`: parts of the state were on NVMe, which is not read", remedy=GATHER
            )
        if _PIPELINE.fullmatch(name):
            raise CheckpointError(f"{name} has the layers of one pipeline stage, which is not read", remedy=EXPORT)
        if _EXPERT.fullmatch(name):
            raise CheckpointError(f"{name} has the experts of a mixture (MoE), which is not read", remedy=EXPORT)
        match = _WHOLE.fullmatch(name) or _PARTITIONED.fullmatch(name) or _OPTIMIZER.fullmatch(name)
        if match is not None and int(match.groups()[-1]) != 0:
            raise CheckpointError(
                f"{name} is of another rank than mp_rank_00: weights cut by tensor parallelism are not read",
                remedy=EXPORT,
            )


def _by_rank(pattern: re.Pattern[str], names: list[str]) -> dict[int, str]:
    name_by_rank: dict[int, str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        rank = int(match[1])
        if rank in name_by_rank:
            raise CheckpointError(
                f"both {name_by_rank[rank]} and {name} are there: two savings in one folder", remedy=SAVE_AGAIN
            )
        name_by_rank[rank] = name
    return name_by_rank
