"""BitNet b1.58 as transformers/integrations/bitnet.py defines it: latents (online), or codes of two bits (offline).

`bitlinear` divides by its `weight_scale`, `autobitlinear` multiplies with it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peel_agent.load.architecture import build_model
from peel_agent.load.packed.dequantised import (
    CONFIG,
    DequantisedWeights,
    Recipe,
    Unpacked,
    dtype_name,
    read_codes,
    read_scales,
    refused,
    require_shape,
    shown,
    text_of,
)
from peel_agent.load.packed.patterns import NotConverted, check_patterns
from peel_agent.records import Weights, WeightSet

CODES_PER_BYTE = 4
SCALE = "weight_scale"
_ACTIVATIONS = "the 8-bit activations of its layers are not simulated"


def unpack(weights: Weights, settings: Mapping[str, Any]) -> Unpacked:
    """Latents of `ternary` when quantised online, else ternary matrices times their scale."""
    linear_class = text_of(settings, "linear_class", "bitlinear", ("bitlinear", "autobitlinear"))
    mode = text_of(settings, "quantization_mode", "offline", ("offline", "online"))
    if settings.get("use_rms_norm", False) is not False:
        raise refused(
            f"{CONFIG} has use_rms_norm {shown(settings['use_rms_norm'])}: the layers then hold norms that the plain "
            "model lacks",
            remedy="only BitNet without use_rms_norm is read",
        )
    linears = _quantised_linears(
        weights, check_patterns(settings.get("modules_to_not_convert"), "modules_to_not_convert")
    )
    if linear_class == "autobitlinear" and mode == "online":
        return _latents(weights, linears)
    return _offline(weights, linears, divides=linear_class == "bitlinear")


def _quantised_linears(weights: Weights, patterns: Collection[str]) -> dict[str, tuple[int, int]]:
    """[out, in] of the linear layers that transformers replaces in this model, by module name."""
    model: Any = build_model(DequantisedWeights(weights, {}).config())
    skipped = [*patterns, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    if not patterns:
        skipped += _kept_by_default(model)
    kept = NotConverted(skipped, "modules_to_not_convert")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (module.out_features, module.in_features) for name, module in linears.items() if name not in kept}
    if not shapes:
        raise refused(
            f"{CONFIG} is bitnet's, and this model has no linear layer that it would quantise",
            remedy=f"take {CONFIG} out of config.json if the weights are plain",
        )
    return shapes


def _kept_by_default(model: Any) -> list[str]:
    """As transformers.quantizers.base.get_keys_to_not_convert: tied weights, the last module, the head."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    head = model.get_output_embeddings()
    names = {*ties, *ties.values(), [name for name, _ in model.named_parameters()][-1]}
    names |= {name for name, module in model.named_modules() if head is not None and module is head}
    return [re.escape(name.removesuffix(".weight")) for name in names]


def _latents(weights: Weights, linears: Mapping[str, tuple[int, int]]) -> Unpacked:
    shapes = weights.shapes()
    names = [f"{module}.weight" for module in linears if f"{module}.weight" in shapes]
    scale = next((name for name in shapes if name.endswith(f".{SCALE}")), None)
    if scale is not None or not names:
        what = f"`{scale}` is stored" if scale else "no weight of a quantised layer is stored"
        raise refused(f"{CONFIG} has quantization_mode `online`, whose weights are latents, but {what}")
    example = dtype_name(weights.read(names[0]))
    note = f"{example} latents of ternary (bitnet, online); {_ACTIVATIONS}"
    ternary = WeightSet.named("ternary")
    return Unpacked(DequantisedWeights(weights, {}), note, dict.fromkeys(globs_of(names, shapes), ternary))


def globs_of(names: Collection[str], every: Collection[str]) -> list[str]:
    """Globs that fit these names and no other of `every`: one for all layers where that can be."""
    chosen = set(names)
    general = {name: re.sub(r"(?<=\.)\d+(?=\.)", "*", glob.escape(name)) for name in names}
    fitting: dict[str, bool] = {}
    for other in every:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", glob.escape(other))
        fitting[key] = fitting.get(key, True) and other in chosen
    return list(dict.fromkeys(wide if fitting.get(wide) else glob.escape(name) for name, wide in general.items()))


def _offline(weights: Weights, linears: Mapping[str, tuple[int, int]], *, divides: bool) -> Unpacked:
    shapes = weights.shapes()
    recipes = {}
    for module, shape in linears.items():
        name, scale = f"{module}.weight", f"{module}.{SCALE}"
        if name in shapes:
            require_shape(weights, scale, (1,), name)
            packed = _is_packed(weights, name, shape, may_be_plain=not divides)
            make = partial(_dequantised, weights, name, scale, packed=packed, divides=divides)
            recipes[name] = Recipe(shape, (name, scale), make)
    used = {source for recipe in recipes.values() for source in recipe.sources}
    stray = next((name for name in shapes if name.endswith(f".{SCALE}") and name not in used), None)
    if stray is not None:
        raise refused(f"`{stray}` is stored, but {CONFIG} leaves its layer as it is, or the model has no such layer")
    note = f"ternary packed by bitnet (offline), dequantised; {_ACTIVATIONS}"
    return Unpacked(DequantisedWeights(weights, recipes), note)


def _is_packed(weights: Weights, name: str, shape: tuple[int, int], *, may_be_plain: bool) -> bool:
    """Whether the rows hold four codes a byte. Raises CheckpointError for a shape that is neither form."""
    stored = weights.shapes()[name]
    rows, columns = shape
    if len(stored) == 2 and stored[1] == columns and stored[0] * CODES_PER_BYTE == rows:
        return True
    if stored == shape and may_be_plain:
        return False
    raise refused(f"`{name}` is packed as {list(stored)}: four codes a byte along the rows, it cannot be {list(shape)}")


def _dequantised(weights: Weights, name: str, scale_name: str, *, packed: bool, divides: bool) -> Tensor:
    scale = read_scales(weights, scale_name)
    if divides and not bool((scale != 0).all()):
        raise refused(f"the scale `{scale_name}` is 0, and weights are divided by it")
    if packed:
        matrix = _ternary(read_codes(weights, name, torch.uint8), name).to(scale.dtype)
    else:
        matrix = read_codes(weights, name, torch.float32, torch.bfloat16, torch.float16)
    return matrix.float() / scale.float() if divides else matrix * scale


def _ternary(packed: Tensor, name: str) -> Tensor:
    """-1, 0 and 1 [out, in] from bytes [out / 4, in]: the lowest two bits are the first quarter of the rows."""
    codes = torch.cat([packed >> 2 * place & 3 for place in range(CODES_PER_BYTE)])
    if bool((codes == 3).any()):
        raise refused(f"`{name}` holds the code 3, where ternary weights have 0, 1 and 2")
    return codes.to(torch.int8) - 1
