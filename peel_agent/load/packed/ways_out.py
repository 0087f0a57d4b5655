"""What to do with a checkpoint whose low-bit weights are not read: only what the pinned transformers can do."""

from __future__ import annotations

BEFORE = "peel the checkpoint as it was before it was quantised"
"""Always there, for it is what was quantised."""


def _at_load(setting: str, arguments: str = "") -> str:
    """`save_original_format`, left at its default, would quantise again what was dequantised."""
    return (
        "with transformers and accelerate, model = AutoModelForCausalLM.from_pretrained(FOLDER, "
        f"quantization_config={setting}{arguments}) and model.save_pretrained(OUT, save_original_format=False), "
        f"and peel OUT; or {BEFORE}"
    )


def _once_loaded(where: str = "") -> str:
    return (
        f"with transformers{where}, model = AutoModelForCausalLM.from_pretrained(FOLDER), model.dequantize() and "
        f"model.save_pretrained(OUT, save_original_format=False), and peel OUT; or {BEFORE}"
    )


WAYS_OUT = {
    "bitsandbytes": _once_loaded(" and bitsandbytes"),
    "compressed-tensors": _at_load("CompressedTensorsConfig(dequantize=True)"),
    "fp8": _at_load("FineGrainedFP8Config(dequantize=True)"),
    "higgs": _once_loaded(" on a GPU, and flute-kernel"),
    "metal": _at_load("MetalConfig(dequantize=True)", ', device_map="cpu"'),
    "mxfp4": _at_load("Mxfp4Config(dequantize=True)"),
    "mxfp8": _at_load("FineGrainedFP8Config(dequantize=True)"),
}
"""The methods, by `quant_method`, whose weights transformers itself turns back into plain ones."""

KNOWN = frozenset(
    {
        *WAYS_OUT,
        *("aqlm", "auto-round", "awq", "bitnet", "eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "gemma", "gguf"),
        *("gptq", "hqq", "nvfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"),
    }
)
"""Every method that transformers knows."""

PLAIN = f"take quantization_config out of config.json if the weights are plain; otherwise {BEFORE}"
"""For a method that transformers does not know: it loads such a checkpoint as if nothing were said."""
