"""Weights whose low-bit tensors are put together and dequantised one by one, as they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peel_agent.errors import CheckpointError
from peel_agent.load.packed.ways_out import BEFORE
from peel_agent.records import Weights, WeightSet

CONFIG = "quantization_config"


@dataclass(frozen=True)
class Unpacked:
    """The weights of the plain floating-point model, and what they were.

    `note` says in words what is stored and what the effective weights are; `sets` are globs over the names of weights
    that are latents of a quantiser.
    """

    weights: Weights
    note: str = ""
    sets: Mapping[str, WeightSet] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One tensor of the plain model: its shape, the stored tensors it takes the place of, and how it is made of them.

    `make` may raise CheckpointError.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[[], Tensor]


class DequantisedWeights:
    """See records.Weights: those of a plain model, made by recipes or passed on as they are stored.

    Raises CheckpointError when a recipe makes a tensor that is stored as well.
    """

    def __init__(self, stored: Weights, recipes: Mapping[str, Recipe], dropped: Collection[str] = ()) -> None:
        self._stored = stored
        self._recipes = recipes
        used = {source for recipe in recipes.values() for source in recipe.sources} | set(dropped)
        self._plain = {name: shape for name, shape in stored.shapes().items() if name not in used}
        clash = next((name for name in recipes if name in self._plain), None)
        if clash is not None:
            raise refused(f"`{clash}` is stored twice: as it is, and in parts ({', '.join(recipes[clash].sources)})")
        self._config = {key: value for key, value in stored.config().items() if key != CONFIG}

    def config(self) -> Mapping[str, Any]:
        return self._config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**self._plain, **{name: recipe.shape for name, recipe in self._recipes.items()}}

    def read(self, name: str) -> Tensor:
        if name in self._recipes:
            tensor = self._recipes[name].make()
            if not bool(tensor.isfinite().all()):
                raise refused(f"`{name}` is not finite once it is dequantised", remedy="save the checkpoint again")
            return tensor
        tensor = self._stored.read(name)
        if tensor.dim() > 1 and (not tensor.is_floating_point() or tensor.element_size() < 2):
            raise refused(
                f"`{name}` is stored as {dtype_name(tensor)}, and nothing beside it says how to dequantise it"
            )
        return tensor


def refused(what: str, *, remedy: str = BEFORE) -> CheckpointError:
    """The error of a low-bit checkpoint that is not read; `remedy` where there is more than one way out."""
    return CheckpointError(what, remedy=remedy)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def read_scales(stored: Weights, name: str) -> Tensor:
    """A tensor of floating-point scales. Raises CheckpointError for another dtype or values that are not finite."""
    scales = stored.read(name)
    if not scales.is_floating_point() or scales.element_size() < 2:
        raise refused(f"the scales `{name}` are {dtype_name(scales)}, not floating-point numbers")
    if not bool(scales.isfinite().all()):
        raise refused(f"the scales `{name}` hold a value that is not finite", remedy="save the checkpoint again")
    return scales


def read_codes(stored: Weights, name: str, *dtypes: torch.dtype) -> Tensor:
    """A tensor of codes. Raises CheckpointError when its dtype is none of `dtypes`."""
    codes = stored.read(name)
    if codes.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise refused(f"`{name}` is stored as {dtype_name(codes)} instead of {wanted}")
    return codes


def require_shape(stored: Weights, name: str, shape: tuple[int, ...], matrix: str) -> None:
    """Raises CheckpointError unless a tensor is there in the shape that its matrix needs."""
    stored_shape = stored.shapes().get(name)
    if stored_shape is None:
        raise refused(f"`{name}` is missing, without which `{matrix}` cannot be dequantised")
    if stored_shape != shape:
        raise refused(f"`{name}` is {list(stored_shape)} where `{matrix}` needs {list(shape)}")


def text_of(
    settings: Mapping[str, Any], key: str, default: str, allowed: Collection[str], *, remedy: str = BEFORE
) -> str:
    """A word of quantization_config. Raises CheckpointError for one that is not allowed."""
    value = settings.get(key, default)
    if not isinstance(value, str) or value not in allowed:
        raise refused(f"{CONFIG} has {key} {shown(value)}; read are {', '.join(sorted(allowed))}", remedy=remedy)
    return value


def shown(value: object) -> str:
    """A value of a configuration for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
