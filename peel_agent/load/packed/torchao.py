"""torchao's integer and fp8 matrices as transformers saves them: parts `module._weight_qdata`, `module._weight_scale`.

What the parts mean is in the headers of the safetensors files (`__metadata__`, after
torchao/prototype/safetensors/safetensors_support.py). They are dequantised here: the arithmetic is a difference times a
scale, and the library would load native code for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from peel_agent.load.packed.dequantised import (
    DequantisedWeights,
    Recipe,
    Unpacked,
    read_codes,
    read_scales,
    refused,
    require_shape,
    shown,
)
from peel_agent.records import Weights

NAMES = "tensor_names"
MOST_ENTRY = 100_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_CODES: Mapping[str, tuple[torch.dtype, ...]] = {
    "Int8Tensor": (torch.int8,),
    "IntxUnpackedToInt8Tensor": (torch.int8,),
    "Float8Tensor": _FP8,
}
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")
_RESAVE = "save the model again with transformers' save_pretrained, as safetensors"


@runtime_checkable
class Described(Protocol):
    """Weights whose files have a text beside the tensors, as safetensors' `__metadata__` is."""

    def metadata(self) -> Mapping[str, str]:
        """These texts by their keys, those of all files together."""


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor: its class, its stored parts, the block that shares a scale, its dtype."""

    kind: str
    parts: frozenset[str]
    block: tuple[int, ...]
    dtype: torch.dtype
    bits: str
    activations: bool


def unpack(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:  # noqa: ARG001 (the header says it tensor by tensor)
    """The matrices of a torchao checkpoint, each in the dtype that it had before."""
    texts = weights.metadata() if isinstance(weights, Described) else {}
    if NAMES not in texts:
        raise refused(f"the weights' files have no `{NAMES}` in their headers, as torchao's do", remedy=_RESAVE)
    recipes, entries = {}, []
    for name in _names(texts[NAMES]):
        entry = _entry_of(name, texts.get(name))
        if entry is not None:
            entries.append(entry)
            recipes[name] = _recipe(weights, name, entry)
    if not entries:
        raise refused(f"the headers of the weights' files name no quantised tensor in `{NAMES}`", remedy=_RESAVE)
    used = {source for recipe in recipes.values() for source in recipe.sources}
    stray = next((name for name in weights.shapes() if _is_part(name) and name not in used), None)
    if stray is not None:
        raise refused(f"`{stray}` is stored, and the headers do not say which tensor it is a part of")
    note = f"{', '.join(sorted({entry.bits for entry in entries}))} by torchao, dequantised"
    if any(entry.activations for entry in entries):
        note += "; the 8-bit activations of its layers are not simulated"
    return Unpacked(DequantisedWeights(weights, recipes), note)


def _is_part(name: str) -> bool:
    return name.rpartition(".")[2].startswith("_")


def _names(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(f"`{NAMES}` in a header does not parse: {error}", remedy=_RESAVE) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise refused(f"`{NAMES}` in a header is {shown(names)}, not a list of names", remedy=_RESAVE)
    return names


def _entry_of(name: str, text: str | None) -> Entry | None:
    """The description of a tensor, None for a plain one. Raises CheckpointError for what is not understood."""
    try:
        entry = json.loads(text) if text is not None and len(text) <= MOST_ENTRY else None
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("_type"), str):
        raise refused(f"the header does not say what `{name}` is: {shown(text)}", remedy=_RESAVE)
    kind = entry["_type"]
    if kind == "Tensor":
        return None
    if kind not in _CODES:
        raise refused(
            f"`{name}` is a {kind[:60]} of torchao, which only kernels of an accelerator unpack; "
            f"read are {', '.join(_CODES)}"
        )
    data, parts = entry.get("_data"), entry.get("_tensor_data_names")
    if not isinstance(data, dict) or not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise refused(f"the header says of `{name}` {shown(entry)}, without its parts", remedy=_RESAVE)
    unknown = sorted(set(parts) - {"qdata", "scale", "zero_point"})
    if unknown:
        raise refused(f"`{name}` has a part {shown(unknown[0])}, which is not read")
    return Entry(
        kind=kind,
        parts=frozenset(parts),
        block=_block(name, data.get("block_size")),
        dtype=_dtype(name, data.get("dtype")),
        bits=_bits(kind, data),
        activations=any(data.get(key) is not None for key in _ACTIVATIONS),
    )


def _block(name: str, block: object) -> tuple[int, ...]:
    if not isinstance(block, list) or not all(type(size) is int and 0 < size < 2**31 for size in block):
        raise refused(f"`{name}` has a block_size of {shown(block)}, which is not a list of sizes")
    return tuple(block)


def _dtype(name: str, entry: object) -> torch.dtype:
    named = entry.get("_data") if isinstance(entry, dict) else None
    if not isinstance(named, str) or named not in _DTYPES:
        raise refused(f"`{name}` has a dtype of {shown(entry)}; read are {', '.join(_DTYPES)}")
    return _DTYPES[named]


def _bits(kind: str, data: Mapping[str, Any]) -> str:
    """In words, what the codes are."""
    if kind == "IntxUnpackedToInt8Tensor":
        target = data.get("target_dtype")
        named = target.get("_data") if isinstance(target, dict) else None
        return str(named) if named in [f"int{bits}" for bits in range(1, 9)] else "integers"
    return "int8" if kind == "Int8Tensor" else "fp8"


def _recipe(weights: Weights, name: str, entry: Entry) -> Recipe:
    module, _, weight = name.rpartition(".")
    prefix = f"{module}._{weight}_"
    shape = weights.shapes().get(f"{prefix}qdata")
    if shape is None or not {"qdata", "scale"} <= entry.parts:
        raise refused(f"`{prefix}qdata` or `{prefix}scale` is missing, without which `{name}` cannot be dequantised")
    if len(shape) != len(entry.block) or any(size % block for size, block in zip(shape, entry.block, strict=True)):
        raise refused(f"`{prefix}qdata` is {list(shape)}, which blocks of {list(entry.block)} do not divide")
    units = tuple(size // block for size, block in zip(shape, entry.block, strict=True))
    for part in entry.parts - {"qdata"}:
        scales = weights.shapes().get(f"{prefix}{part}")
        if scales is None or math.prod(scales) != math.prod(units):
            require_shape(weights, f"{prefix}{part}", units, name)
    sources = tuple(f"{prefix}{part}" for part in sorted(entry.parts))
    return Recipe(shape, sources, partial(_dequantised, weights, prefix, entry, units))


def _dequantised(weights: Weights, prefix: str, entry: Entry, units: tuple[int, ...]) -> Tensor:
    """As torchao's dequantize_affine: integers and zero points in the result's dtype, the scale in its own."""
    codes = read_codes(weights, f"{prefix}qdata", *_CODES[entry.kind])
    shape = codes.shape
    scale = _over_blocks(read_scales(weights, f"{prefix}scale"), units)
    blocks = [size for pair in zip(units, entry.block, strict=True) for size in pair]
    values = codes.reshape(blocks).to(torch.float32 if entry.kind == "Float8Tensor" else entry.dtype)
    if "zero_point" in entry.parts:
        values -= _over_blocks(_zero_points(weights, f"{prefix}zero_point"), units).to(entry.dtype)
    return (values * scale).to(entry.dtype).reshape(shape)


def _zero_points(weights: Weights, name: str) -> Tensor:
    points = weights.read(name)
    return read_scales(weights, name) if points.is_floating_point() else read_codes(weights, name, torch.int8)


def _over_blocks(scales: Tensor, units: tuple[int, ...]) -> Tensor:
    """One entry a block [u1, u2, ...] as [u1, 1, u2, 1, ...]."""
    return scales.reshape([size for unit in units for size in (unit, 1)])
