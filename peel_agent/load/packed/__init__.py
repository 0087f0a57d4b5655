"""Low-bit contents of a checkpoint: what its `quantization_config` says, as the weights of the plain model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peel_agent.load.packed.bitnet import unpack as _bitnet
from peel_agent.load.packed.bitsandbytes import unpack as _bitsandbytes
from peel_agent.load.packed.compressed_tensors import unpack as _compressed_tensors
from peel_agent.load.packed.dequantised import CONFIG, Unpacked, refused, shown
from peel_agent.load.packed.fine_grained_fp8 import unpack as _fine_grained_fp8
from peel_agent.load.packed.named_quantiser import unpack as _named_quantiser
from peel_agent.load.packed.packed_words import unpack_awq, unpack_gptq
from peel_agent.load.packed.torchao import unpack as _torchao
from peel_agent.load.packed.ways_out import BEFORE, KNOWN, PLAIN, WAYS_OUT
from peel_agent.records import Weights

METHODS: Mapping[str, Callable[[Weights, Mapping[str, Any]], Unpacked]] = {
    "awq": unpack_awq,
    "bitnet": _bitnet,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fine_grained_fp8,
    "gptq": unpack_gptq,
    "mxfp8": _fine_grained_fp8,
    "peel-agent": _named_quantiser,
    "torchao": _torchao,
}
"""What is read, by `quant_method`."""

__all__ = ["METHODS", "Unpacked", "unpack"]


def unpack(weights: Weights) -> Unpacked:
    """The weights as those of the plain floating-point model; the very same without `quantization_config`.

    What is stored in few bits is dequantised one tensor at a time, as it is read. Raises CheckpointError for a method,
    a setting or a tensor that is not understood, by its name.
    """
    settings = weights.config().get(CONFIG)
    if settings is None or settings == {}:
        return Unpacked(weights)
    if not isinstance(settings, dict):
        raise refused(f"config.json has {CONFIG} {shown(settings)}, which is not an object")
    method = _method_of(settings)
    if not isinstance(method, str) or method not in METHODS:
        raise refused(
            f"config.json has {CONFIG} with quant_method {shown(method)}; read are {', '.join(METHODS)}",
            remedy=_way_out(method),
        )
    return METHODS[method](weights, settings)


def _method_of(settings: Mapping[str, Any]) -> object:
    """`quant_method`; early checkpoints of bitsandbytes say only how many bits they load in."""
    method = settings.get("quant_method")
    if method is None and True in (settings.get("load_in_4bit"), settings.get("load_in_8bit")):
        return "bitsandbytes"
    return method


def _way_out(method: object) -> str:
    if not isinstance(method, str) or method not in KNOWN:
        return PLAIN
    return WAYS_OUT.get(method, BEFORE)
