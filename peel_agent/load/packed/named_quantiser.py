"""Latents whose quantiser the checkpoint names itself, in the words of `--precision`.

`{"quant_method": "peel-agent", "weights": {"model.layers.*_proj.weight": "ternary"}}`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.load.packed.dequantised import CONFIG, DequantisedWeights, Unpacked, refused, shown
from peel_agent.records import SETS, Weights, WeightSet, glob_fits

MOST_GLOBS = 100
LONGEST = 400

_REMEDY = f"name globs over weights and their sets, such as {SETS.split(', ')[2]}, in {CONFIG}.weights"


def unpack(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:
    """The weights as they are, with the sets that the checkpoint gives to them."""
    named = settings.get("weights")
    if not isinstance(named, dict) or not named or len(named) > MOST_GLOBS:
        raise refused(
            f"{CONFIG}.weights is {shown(named)}, not 1 to {MOST_GLOBS} globs with their sets", remedy=_REMEDY
        )
    matrices = [name for name, shape in weights.shapes().items() if len(shape) == 2]
    sets = {}
    for glob, set_name in named.items():
        if len(glob) > LONGEST or not any(glob_fits(glob, name) for name in matrices):
            raise refused(f"{CONFIG}.weights names {shown(glob)}, which fits no matrix", remedy=_REMEDY)
        sets[glob] = _set_of(glob, set_name)
    kinds = ", ".join(sorted({weight_set.name for weight_set in sets.values()}))
    return Unpacked(DequantisedWeights(weights, {}), f"latents of {kinds}, as config.json names them", sets)


def _set_of(glob: str, name: object) -> WeightSet:
    try:
        if not isinstance(name, str) or len(name) > LONGEST:
            raise ValueError(name)
        return WeightSet.named(name)
    except ValueError as error:
        raise refused(
            f"{CONFIG}.weights gives {shown(glob)} the set {shown(name)}; sets are {SETS}", remedy=_REMEDY
        ) from error
