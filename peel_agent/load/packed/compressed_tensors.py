"""Checkpoints of compressed-tensors (llm-compressor), decompressed matrix by matrix by the library of that name.

Which matrices are quantised is told from the tensors; what their codes mean is said by config_groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peel_agent.errors import CheckpointError
from peel_agent.load.packed.config_groups import BY_TRANSFORMERS, Group, group_of, groups_of, library, units_of
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
    text_of,
)
from peel_agent.records import Weights

PACKED, SCALE, ZERO, SHAPE, PLAIN = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight"
LATENT = ("calibration", "frozen")
"""The states in which weights are stored as they are trained, and every forward pass quantises them."""

STATES = (*LATENT, "initialized", "compressed", "decompressed")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = tuple(
    f".{which}_{what}"
    for which in ("input", "output", "q", "k", "v")
    for what in ("scale", "zero_point", "global_scale")
)
_UNREAD = (".weight_g_idx", ".weight_global_scale")


def unpack(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:
    """The matrices of a compressed checkpoint; latents quantised with the scales that are stored beside them."""
    for key in ("sparsity_config", "transform_config"):
        if settings.get(key) not in (None, {}):
            raise refused(f"{CONFIG} has a {key} ({shown(settings[key])}), which is not read")
    state = text_of(settings, "quantization_status", "compressed", STATES)
    groups = groups_of(settings)
    recipes, used = {}, set()
    for module in _modules(weights):
        group = group_of(module, groups)
        recipe = _recipe(weights, module, group, state)
        recipes[f"{module}.{PLAIN}"] = recipe
        used.add(group.kind)
    dropped = _activation_scales(weights, recipes)
    if not recipes:
        raise refused(f"{CONFIG} is that of compressed-tensors, but no tensor `...{SCALE}` is stored")
    packed = all(source.endswith(f".{PACKED}") for source, *_ in (recipe.sources for recipe in recipes.values()))
    note = _note("compressed" if packed else state, sorted(used))
    if dropped or any(group.scheme.input_activations or group.scheme.output_activations for group in groups):
        note += "; the quantised activations of its layers are not simulated"
    if settings.get("kv_cache_scheme"):
        note += "; its quantised key-value cache is not simulated"
    return Unpacked(DequantisedWeights(weights, recipes, dropped), note)


def _note(state: str, kinds: list[str]) -> str:
    what = " and ".join(kinds)
    if state in LATENT:
        return f"latents of {what} (compressed-tensors, {state}), quantised with the scales stored beside them"
    return f"{what} packed by compressed-tensors, dequantised"


def _modules(weights: Weights) -> list[str]:
    """The modules with quantised weights. Raises CheckpointError for parts without the rest."""
    shapes = weights.shapes()
    for name in shapes:
        if name.endswith(_UNREAD):
            raise refused(f"`{name}` is stored, which is not read", remedy=BY_TRANSFORMERS)
        end = next((end for end in (PACKED, ZERO, SHAPE) if name.endswith(f".{end}")), None)
        if end is not None and f"{name.removesuffix(end)}{SCALE}" not in shapes:
            raise refused(f"`{name.removesuffix(end)}{SCALE}` is missing, where `{name}` is stored")
    return [name.removesuffix(f".{SCALE}") for name in shapes if name.endswith(f".{SCALE}")]


def _activation_scales(weights: Weights, recipes: Mapping[str, Recipe]) -> set[str]:
    """Scales of activations, which plain weights have no use for."""
    modules = {name.removesuffix(f".{PLAIN}") for name in recipes}
    parents = {module.rpartition(".")[0] for module in modules}
    return {
        name
        for name in weights.shapes()
        if name.endswith(_ACTIVATIONS) and name.rpartition(".")[0] in modules | parents
    }


def _recipe(weights: Weights, module: str, group: Group, state: str) -> Recipe:
    shapes = weights.shapes()
    packed = f"{module}.{PACKED}" in shapes
    code = f"{module}.{PACKED if packed else PLAIN}"
    if len(shapes.get(code, ())) != 2:
        raise refused(
            f"`{code}` is {list(shapes.get(code, ()))}, not the matrix that `{module}.{SCALE}` is the scale of"
        )
    shape = _unpacked_shape(weights, module, group) if packed else (shapes[code][0], shapes[code][1])
    _check_scales(weights, module, group, shape, packed=packed)
    ends = (SCALE, ZERO, SHAPE) if packed else (SCALE, ZERO)
    sources = (code, *(f"{module}.{end}" for end in ends if f"{module}.{end}" in shapes))
    if packed:
        make = partial(_decompressed, weights, sources, group, shape)
    elif state in LATENT:
        make = partial(_fake_quantised, weights, sources, group, shape)
    elif group.form == "dense" or state == "decompressed":
        make = partial(_as_stored, weights, code)
    elif state == "initialized":
        raise refused(f"`{code}` has scales that were never calibrated (quantization_status `{state}`)")
    else:
        make = partial(_decompressed, weights, sources, group, shape)
    return Recipe(shape, sources, make)


def _unpacked_shape(weights: Weights, module: str, group: Group) -> tuple[int, int]:
    """[out, in] as `weight_shape` says it. Raises CheckpointError unless the packed words are as many."""
    name, code = f"{module}.{SHAPE}", f"{module}.{PACKED}"
    require_shape(weights, name, (2,), f"{module}.{PLAIN}")
    rows, columns = (int(size) for size in read_codes(weights, name, torch.int64, torch.int32).tolist())
    rows_found, words = weights.shapes()[code]
    if rows != rows_found or columns <= 0 or math.ceil(columns * group.args.num_bits / 32) != words:
        raise refused(
            f"`{code}` is {[rows_found, words]}, which is not [{rows}, {columns}] of `{name}` "
            f"in {group.args.num_bits} bits, packed in words of 32"
        )
    if group.form != "pack-quantized" or group.args.type != "int":
        raise refused(f"`{code}` is packed, where config_groups says {group.form} of type {group.args.type}")
    return rows, columns


def _check_scales(weights: Weights, module: str, group: Group, shape: tuple[int, int], *, packed: bool) -> None:
    """Raises CheckpointError for scales or zero points in another shape than the strategy needs."""
    units, matrix, stored = units_of(group.args, shape, module), f"{module}.{PLAIN}", weights.shapes()
    if group.args.strategy != "tensor" or math.prod(stored[f"{module}.{SCALE}"]) != 1:
        require_shape(weights, f"{module}.{SCALE}", units, matrix)
    zero = f"{module}.{ZERO}"
    if zero not in stored and group.args.symmetric:
        return
    if packed and not group.args.symmetric and group.args.strategy in ("channel", "group"):
        units = (math.ceil(units[0] * group.args.num_bits / 32), units[1])
    if group.args.strategy != "tensor" or math.prod(stored.get(zero, ())) != 1:
        require_shape(weights, zero, units, matrix)


def _decompressed(weights: Weights, sources: tuple[str, ...], group: Group, shape: tuple[int, int]) -> Tensor:
    parts = _parts(weights, sources, _code_dtypes(sources[0], group))
    registry = library("compressors").BaseCompressor
    compressor = registry.get_value_from_registry(group.form)
    return _oflibrary(lambda: compressor.decompress(parts, group.scheme)[PLAIN], sources[0], shape)


def _fake_quantised(weights: Weights, sources: tuple[str, ...], group: Group, shape: tuple[int, int]) -> Tensor:
    parts = _parts(weights, sources, _FLOATS)
    forward = library("quantization.lifecycle.forward")
    fake_quantised = lambda: forward.fake_quantize(parts[PLAIN], parts[SCALE], parts.get(ZERO), group.args)  # noqa: E731
    return _oflibrary(fake_quantised, sources[0], shape)


def _as_stored(weights: Weights, name: str) -> Tensor:
    return read_codes(weights, name, *_FLOATS)


def _code_dtypes(name: str, group: Group) -> tuple[torch.dtype, ...]:
    if name.endswith(f".{PACKED}"):
        return (torch.int32,)
    return (torch.int8,) if group.args.type == "int" else (torch.float8_e4m3fn,)


def _parts(weights: Weights, sources: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> dict[str, Tensor]:
    """The tensors of one module by the library's local names."""
    parts = {}
    for name in sources:
        part = name.rpartition(".")[2]
        if part == SCALE:
            parts[part] = read_scales(weights, name)
        else:
            parts[part] = read_codes(weights, name, *dtypes) if name == sources[0] else weights.read(name)
    return parts


def _oflibrary(make: Callable[[], Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    try:
        matrix = make()
    except (ValueError, TypeError, IndexError, KeyError, AssertionError, NotImplementedError) as error:
        raise CheckpointError(
            f"compressed-tensors cannot decompress `{name}`: {error}", remedy="save the checkpoint again"
        ) from error
    if tuple(matrix.shape) != shape:
        raise refused(f"compressed-tensors made {list(matrix.shape)} of `{name}`, where {list(shape)} is needed")
    return matrix
