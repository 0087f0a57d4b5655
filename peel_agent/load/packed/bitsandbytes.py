"""bitsandbytes' 4-bit (nf4, fp4) and 8-bit weights, dequantised by the tables that the library's kernels hold.

Its file format is plain tensors and a small JSON text, and the arithmetic is a look-up times a scale: the library
itself would load native code and look for kernels on the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
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

CONV1D = frozenset({"gpt2"})
"""Model types whose linear layers are transformers' Conv1D: bitsandbytes stores these matrices turned."""

TABLE_TOLERANCE = 0.004
"""A stored table may have been cast to bfloat16; the kernels do not read it."""

MOST_STATE_BYTES = 4096
_BY_TRANSFORMERS = WAYS_OUT["bitsandbytes"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_SIZES = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
TABLES = {"nf4": _NF4, "fp4": (*_FP4_SIZES, *(-size for size in _FP4_SIZES))}
"""What the sixteen codes stand for; a checkpoint stores the table too, and it must be this one."""


def unpack(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:
    """The matrices of a 4-bit or an 8-bit checkpoint, each in the dtype that the library dequantises it to."""
    four, eight = (settings.get(f"load_in_{bits}bit", False) for bits in (4, 8))
    if not isinstance(four, bool) or not isinstance(eight, bool) or four == eight:
        raise refused(
            f"{CONFIG} of bitsandbytes has load_in_4bit {shown(four)} and load_in_8bit {shown(eight)}; "
            "one of the two must be true"
        )
    turned = str(weights.config().get("model_type")) in CONV1D
    return _four_bit(weights, turned=turned) if four else _eight_bit(weights, turned=turned)


@dataclass(frozen=True)
class QuantState:
    """What the JSON text beside a matrix says: its table, block size, dtype and shape, and how scales are quantised."""

    table: str
    block: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested_block: int | None
    offset: float


def _four_bit(weights: Weights, *, turned: bool) -> Unpacked:
    shapes = weights.shapes()
    recipes, kinds = {}, set()
    for key in (name for name in shapes if _STATE in name):
        name = key[: key.index(_STATE)]
        state = _state_of(weights, key)
        parts = _parts(weights, name, state)
        make = partial(_four_bit_matrix, weights, name, state, turned=turned)
        recipes[name] = Recipe(state.shape[::-1] if turned else state.shape, (name, key, *parts), make)
        kinds.add(state.table)
    _require_none_left(weights, recipes, _PARTS)
    if not recipes:
        raise refused(f"{CONFIG} has load_in_4bit, but no tensor `...{_STATE}nf4` or `fp4` is stored")
    note = f"{' and '.join(sorted(kinds))} packed by bitsandbytes, dequantised"
    return Unpacked(DequantisedWeights(weights, recipes), note)


def _require_none_left(weights: Weights, recipes: Mapping[str, Recipe], ends: tuple[str, ...]) -> None:
    used = {source for recipe in recipes.values() for source in recipe.sources}
    stray = next((name for name in weights.shapes() if name.endswith(ends) and name not in used), None)
    if stray is not None:
        raise refused(f"`{stray}` is stored without the other tensors of its matrix")


def _parts(weights: Weights, name: str, state: QuantState) -> tuple[str, ...]:
    """The names of what a matrix is made from beside its codes. Raises CheckpointError where one does not fit."""
    blocks = math.ceil(math.prod(state.shape) / state.block)
    wanted = {".absmax": (blocks,), ".quant_map": (16,)}
    if state.nested_block is not None:
        wanted |= {".nested_absmax": (math.ceil(blocks / state.nested_block),), ".nested_quant_map": (256,)}
    for end, shape in wanted.items():
        require_shape(weights, name + end, shape, name)
    if name not in weights.shapes():
        raise refused(f"`{name}` is missing, whose quant_state is stored")
    return tuple(name + end for end in wanted)


def _state_of(weights: Weights, key: str) -> QuantState:
    shape = weights.shapes()[key]
    if len(shape) != 1 or shape[0] > MOST_STATE_BYTES:
        raise refused(f"`{key}` is {list(shape)}, not a text of up to {MOST_STATE_BYTES:,} bytes")
    try:
        state = json.loads(bytes(read_codes(weights, key, torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        raise refused(f"`{key}` does not parse: {error}", remedy="save the checkpoint again") from error
    if not isinstance(state, dict) or state.get("quant_type") not in tuple(TABLES):
        raise refused(
            f"`{key}` says {shown(state)}; read is a quant_type of {' or '.join(TABLES)}", remedy=_BY_TRANSFORMERS
        )
    table, block, dtype, sizes = (state.get(item) for item in ("quant_type", "blocksize", "dtype", "shape"))
    if block not in BLOCK_SIZES or type(block) is not int or dtype not in tuple(_DTYPES):
        raise refused(
            f"`{key}` says a blocksize of {shown(block)} and a dtype of {shown(dtype)}, which are not read",
            remedy=_BY_TRANSFORMERS,
        )
    if (
        not isinstance(sizes, list)
        or len(sizes) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in sizes)
    ):
        raise refused(f"`{key}` says a shape of {shown(sizes)}, which is not that of a matrix")
    nested, offset = state.get("nested_blocksize"), state.get("nested_offset", 0.0)
    if nested is not None and (type(nested) is not int or not 0 < nested < 2**31):
        raise refused(f"`{key}` says a nested_blocksize of {shown(nested)}")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise refused(f"`{key}` says a nested_offset of {shown(offset)}")
    return QuantState(str(table), block, _DTYPES[str(dtype)], (sizes[0], sizes[1]), nested, float(offset))


def _four_bit_matrix(weights: Weights, name: str, state: QuantState, *, turned: bool) -> Tensor:
    table = torch.tensor(TABLES[state.table])
    stored = read_scales(weights, name + ".quant_map").float()
    if bool((stored - table).abs().max() > TABLE_TOLERANCE):
        raise refused(f"`{name}.quant_map` is not the table of {state.table} that the library's kernels hold")
    packed = read_codes(weights, name, *_STORAGE).reshape(-1).view(torch.uint8)
    count = math.prod(state.shape)
    if len(packed) != math.ceil(count / 2):
        raise refused(
            f"`{name}` has {len(packed):,} bytes where {list(state.shape)} in 4 bits needs {math.ceil(count / 2):,}"
        )
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:count]
    values = _scaled(table[codes.int()], _four_bit_scales(weights, name, state), state.block)
    matrix = values.to(state.dtype).reshape(state.shape)
    return matrix.T.contiguous() if turned else matrix


def _four_bit_scales(weights: Weights, name: str, state: QuantState) -> Tensor:
    """One scale a block; with double quantisation these are 8-bit codes themselves, with an offset."""
    if state.nested_block is None:
        return read_scales(weights, name + ".absmax").float()
    codes = read_codes(weights, name + ".absmax", torch.uint8)
    table = read_scales(weights, name + ".nested_quant_map").float()
    scales = read_scales(weights, name + ".nested_absmax").float()
    return _scaled(table[codes.int()], scales, state.nested_block) + state.offset


def _scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Values [n] times the scale of the block that each is in; the last block may be shorter."""
    whole = len(values) // block
    result = torch.empty_like(values)
    torch.mul(
        values[: whole * block].view(whole, block), scales[:whole, None], out=result[: whole * block].view(whole, block)
    )
    if len(values) > whole * block:
        result[whole * block :] = values[whole * block :] * scales[whole]
    return result


def _eight_bit(weights: Weights, *, turned: bool) -> Unpacked:
    shapes = weights.shapes()
    recipes = {}
    for scb in (name for name in shapes if name.endswith(".SCB")):
        module = scb.removesuffix(".SCB")
        name, form = f"{module}.weight", f"{module}.weight_format"
        shape = shapes.get(name, ())
        if len(shape) != 2:
            raise refused(f"`{name}` is {list(shape)}, not the matrix that `{scb}` is the scale of")
        require_shape(weights, scb, shape[:1], name)
        sources = (name, scb, form) if form in shapes else (name, scb)
        make = partial(_eight_bit_matrix, weights, *sources, turned=turned)
        recipes[name] = Recipe(shape[::-1] if turned else shape, sources, make)
    _require_none_left(weights, recipes, (".weight_format",))
    if not recipes:
        raise refused(f"{CONFIG} has load_in_8bit, but no scales `...SCB` are stored")
    note = "int8 by bitsandbytes, dequantised; the 8-bit activations of its layers are not simulated"
    return Unpacked(DequantisedWeights(weights, recipes), note)


def _eight_bit_matrix(weights: Weights, name: str, scb: str, form: str | None = None, *, turned: bool) -> Tensor:
    """Codes over 127 times the largest magnitude of their row; float32."""
    if form is not None and bool((read_codes(weights, form, torch.uint8) != 0).any()):
        raise refused(f"`{form}` says another layout than rows; only that is read", remedy=_BY_TRANSFORMERS)
    codes, scales = read_codes(weights, name, torch.int8), read_scales(weights, scb).float()
    matrix = codes * scales[:, None] * (1 / 127)
    return matrix.T.contiguous() if turned else matrix
