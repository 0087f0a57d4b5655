"""GPTQ's and AWQ's integers of few bits, packed in words of 32: a difference times a scale for each group of inputs.

Their libraries need an accelerator; the tensors are plain. Of `module`, `qweight` has the codes, `qzeros` the zero
points and `scales` the scales [groups, out]; GPTQ's `g_idx` says the group of each input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    text_of,
)
from peel_agent.load.packed.ways_out import PLAIN
from peel_agent.records import Weights

WORD = 32
GPTQ_BITS = (2, 4, 8)
AWQ_BITS = 4
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ has each of eight neighbouring outputs, counted from the lowest four bits."""

CONV1D = frozenset({"gpt2"})
"""Model types whose linear layers are transformers' Conv1D: their matrices are [in, out] in the model as well."""

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack_gptq(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:
    """The matrices of a GPTQ checkpoint, in the dtype of their scales."""
    bits = settings.get("bits")
    if type(bits) is not int or bits not in GPTQ_BITS:
        raise refused(f"{CONFIG} of gptq has bits {shown(bits)}; read are {', '.join(map(str, GPTQ_BITS))}")
    if settings.get("dynamic"):
        raise refused(f"{CONFIG} of gptq has dynamic {shown(settings['dynamic'])}: settings by module are not read")
    key = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
    form = text_of(settings, key, "gptq", ("gptq", "gptq_v2"))
    per_word = WORD // bits
    recipes = {}
    for module in _modules(weights):
        words, columns = _matrix(weights, f"{module}.qweight")
        rows = words * per_word
        size = _group_size(settings, rows)
        _check_parts(weights, module, math.ceil(rows / size), columns, per_word)
        indexed = f"{module}.g_idx" in weights.shapes()
        if indexed:
            require_shape(weights, f"{module}.g_idx", (rows,), f"{module}.weight")
        make = partial(_gptq_matrix, weights, module, bits=bits, size=size, less_one=form == "gptq", indexed=indexed)
        recipes[f"{module}.weight"] = _recipe(weights, module, (rows, columns), make)
    return _unpacked(weights, recipes, f"int{bits} packed by gptq, dequantised")


def unpack_awq(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:
    """The matrices of an AWQ checkpoint (version gemm), in the dtype of their scales."""
    bits = settings.get("bits", settings.get("w_bit", AWQ_BITS))
    if type(bits) is not int or bits != AWQ_BITS:
        raise refused(f"{CONFIG} of awq has bits {shown(bits)}; read are {AWQ_BITS}")
    key = "version" if settings.get("version") is not None else "format"
    text_of(settings, key, "gemm", ("gemm", "GEMM"))
    if settings.get("zero_point", True) is not True:
        raise refused(f"{CONFIG} of awq has zero_point {shown(settings['zero_point'])}; only true is read")
    per_word = WORD // bits
    recipes = {}
    for module in _modules(weights):
        rows, words = _matrix(weights, f"{module}.qweight")
        columns = words * per_word
        size = _group_size(settings, rows)
        _check_parts(weights, module, math.ceil(rows / size), columns, per_word)
        make = partial(_awq_matrix, weights, module, size=size)
        recipes[f"{module}.weight"] = _recipe(weights, module, (rows, columns), make)
    return _unpacked(weights, recipes, f"int{bits} packed by awq, dequantised")


def _modules(weights: Weights) -> list[str]:
    """The modules with codes. Raises CheckpointError for parts without them."""
    shapes = weights.shapes()
    for name in shapes:
        module, _, part = name.rpartition(".")
        if part in PARTS and f"{module}.qweight" not in shapes:
            raise refused(f"`{module}.qweight` is missing, where `{name}` is stored")
    modules = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    if not modules:
        raise refused(f"{CONFIG} says that weights are packed, but no tensor `...qweight` is stored", remedy=PLAIN)
    return modules


def _matrix(weights: Weights, name: str) -> tuple[int, int]:
    shape = weights.shapes()[name]
    if len(shape) != 2 or 0 in shape:
        raise refused(f"`{name}` is {list(shape)}, not a matrix of codes")
    return shape[0], shape[1]


def _group_size(settings: Mapping[str, Any], rows: int) -> int:
    """The inputs that share a scale; -1 says all of them."""
    size = settings.get("group_size", settings.get("q_group_size", 128))
    if type(size) is not int or size == 0 or size < -1:
        raise refused(f"{CONFIG} has group_size {shown(size)}, which is no number of inputs")
    return rows if size == -1 else min(size, rows)


def _check_parts(weights: Weights, module: str, groups: int, columns: int, per_word: int) -> None:
    if columns % per_word:
        raise refused(f"`{module}.qweight` has {columns} outputs, whose zero points fill no whole words of {WORD} bits")
    require_shape(weights, f"{module}.qzeros", (groups, columns // per_word), f"{module}.weight")
    require_shape(weights, f"{module}.scales", (groups, columns), f"{module}.weight")


def _recipe(weights: Weights, module: str, shape: tuple[int, int], make: Callable[[], Tensor]) -> Recipe:
    """`make` gives [in, out]; the model has [out, in], but for Conv1D."""
    stored = tuple(f"{module}.{part}" for part in PARTS if f"{module}.{part}" in weights.shapes())
    if str(weights.config().get("model_type")) in CONV1D:
        return Recipe(shape, stored, make)

    def turned() -> Tensor:
        return make().T.contiguous()

    return Recipe(shape[::-1], stored, turned)


def _unpacked(weights: Weights, recipes: Mapping[str, Recipe], note: str) -> Unpacked:
    return Unpacked(DequantisedWeights(weights, recipes), note)


def _gptq_matrix(weights: Weights, module: str, *, bits: int, size: int, less_one: bool, indexed: bool) -> Tensor:
    """[in, out]. In the older format zero points are stored less one, subtracted from whole words."""
    codes = _fields(read_codes(weights, f"{module}.qweight", torch.int32).T, bits).T
    words = read_codes(weights, f"{module}.qzeros", torch.int32).long()
    ones = sum(1 << shift for shift in range(0, WORD, bits))
    zeros = _fields(words + ones if less_one else words, bits)
    groups = torch.arange(len(codes)) // size
    if indexed:
        groups = read_codes(weights, f"{module}.g_idx", torch.int32, torch.int64).long()
        if bool(((groups < 0) | (groups >= len(zeros))).any()):
            raise refused(f"`{module}.g_idx` names a group that is none of the {len(zeros)}")
    return _scaled(weights, module, codes, zeros, groups)


def _awq_matrix(weights: Weights, module: str, *, size: int) -> Tensor:
    codes, zeros = (
        _fields(read_codes(weights, f"{module}.{part}", torch.int32), AWQ_BITS)
        .unflatten(1, (-1, len(AWQ_PLACES)))[..., AWQ_PLACES]
        .flatten(1)
        for part in ("qweight", "qzeros")
    )
    return _scaled(weights, module, codes, zeros, torch.arange(len(codes)) // size)


def _fields(words: Tensor, bits: int) -> Tensor:
    """The codes of each row of words [rows, words], the lowest bits first: [rows, words * 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, dtype=words.dtype)
    fields: Tensor = words[..., None] >> shifts & 2**bits - 1
    return fields.flatten(1)


def _scaled(weights: Weights, module: str, codes: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    scales = read_scales(weights, f"{module}.scales")
    matrix: Tensor = (codes - zeros[groups]).to(scales.dtype) * scales[groups]
    return matrix
