"""fp8 codes with a scale for each block of a matrix, as DeepSeek and transformers' FineGrainedFP8 save them.

`name` has the codes and `name_scale_inv` what they are multiplied by (it is the inverse of what the weights were
multiplied by); `mxfp8` is the same with blocks of 32 inputs and powers of two, stored as their exponents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peel_agent.load.packed.dequantised import (
    CONFIG,
    DequantisedWeights,
    Recipe,
    Unpacked,
    read_codes,
    read_scales,
    refused,
    require_shape,
    shown,
)
from peel_agent.load.packed.ways_out import WAYS_OUT
from peel_agent.records import Weights

SCALE = "_scale_inv"
ACTIVATION = ".activation_scale"
MX_BLOCK = (1, 32)
MX_BIAS = 127
"""What is added to an exponent where it is stored in a byte."""

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)

Block = tuple[int, int]


def unpack(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:
    """The matrices of an fp8 checkpoint, in float32."""
    method = "mxfp8" if settings.get("quant_method") == "mxfp8" else "fp8"
    block = MX_BLOCK if method == "mxfp8" else _block(settings)
    shapes = weights.shapes()
    recipes = {}
    for scale in (name for name in shapes if name.endswith(SCALE)):
        name = scale.removesuffix(SCALE)
        _check_shapes(weights, name, scale, block)
        make = partial(_matrix, weights, name, scale, block)
        recipes[name] = Recipe(shapes[name], (name, scale), make)
    if not recipes:
        raise refused(f"{CONFIG} is that of {method}, but no tensor `...{SCALE}` is stored", remedy=WAYS_OUT[method])
    dropped = [name for name in shapes if name.endswith(ACTIVATION)]
    unit = "matrix" if block is None else f"block of {block[0]} x {block[1]}"
    note = f"{method} with a scale for each {unit}, dequantised; the 8-bit activations of its layers are not simulated"
    return Unpacked(DequantisedWeights(weights, recipes, dropped), note)


def _block(settings: Mapping[str, Any]) -> Block | None:
    """Outputs and inputs that share a scale; None where a whole matrix does."""
    value = settings.get("weight_block_size", [128, 128])
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise refused(f"{CONFIG} of fp8 has weight_block_size {shown(value)}, not two numbers of weights")
    return value[0], value[1]


def _check_shapes(weights: Weights, name: str, scale: str, block: Block | None) -> None:
    shape = weights.shapes().get(name)
    if shape is None:
        raise refused(f"`{name}` is missing, where `{scale}` is stored")
    if len(shape) < 2:
        raise refused(f"`{name}` is {list(shape)}, not the matrix that `{scale}` is the scale of")
    if block is None:
        if math.prod(weights.shapes()[scale]) != math.prod(shape[:-2]):
            stored = list(weights.shapes()[scale])
            raise refused(f"`{scale}` is {stored}, where `{name}` needs one scale for each matrix")
        return
    rows, columns = (math.ceil(entries / size) for entries, size in zip(shape[-2:], block, strict=True))
    require_shape(weights, scale, (*shape[:-2], rows, columns), name)


def _matrix(weights: Weights, name: str, scale: str, block: Block | None) -> Tensor:
    codes = read_codes(weights, name, *CODES).float()
    scales = _scales(weights, scale)
    if block is None:
        return codes * scales.reshape(*codes.shape[:-2], 1, 1)
    for axis, size in zip((-2, -1), block, strict=True):
        entries = codes.shape[axis]
        scales = scales.repeat_interleave(min(size, entries), axis).narrow(axis, 0, entries)
    return codes * scales


def _scales(weights: Weights, name: str) -> Tensor:
    """In float32; a byte is an exponent, whether it is called a number of 8 bits or an integer."""
    stored = weights.read(name)
    if stored.dtype == torch.uint8:
        return (stored.float() - MX_BIAS).exp2()
    if stored.dtype == torch.float8_e8m0fnu:
        return stored.float()
    return read_scales(weights, name).float()
