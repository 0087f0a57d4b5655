"""Random decoders built in numpy alone, changes to their weights, and token ids for the oracles' own tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.oracles.decoder import Decoder
from tests.oracles.references import Streams

Weights = dict[str, Any]
Config = dict[str, Any]

VOCABULARY, WIDTH, BLOCKS = 13, 8, 3


def llama_weights(rng: np.random.Generator) -> tuple[Weights, Config]:
    d, d_ff = WIDTH, 14
    weights = {"model.embed_tokens.weight": rng.normal(size=(VOCABULARY, d))}
    for i in range(BLOCKS):
        name = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = rng.normal(1.0, 0.2, size=d)
        for projection, width in (("q_proj", d), ("k_proj", d // 2), ("v_proj", d // 2), ("o_proj", d)):
            weights[f"{name}.self_attn.{projection}.weight"] = rng.normal(size=(width, d)) / np.sqrt(d)
        for projection, shape in (("gate_proj", (d_ff, d)), ("up_proj", (d_ff, d)), ("down_proj", (d, d_ff))):
            weights[f"{name}.mlp.{projection}.weight"] = rng.normal(size=shape) / np.sqrt(shape[1])
    weights["model.norm.weight"] = rng.normal(1.0, 0.2, size=d)
    weights["lm_head.weight"] = 0.5 * rng.normal(size=(VOCABULARY, d))
    config = {
        "model_type": "llama",
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": d,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    return weights, config


def gpt2_weights(rng: np.random.Generator) -> tuple[Weights, Config]:
    d, d_ff = WIDTH, 14
    weights = {"transformer.wte.weight": 0.7 * rng.normal(size=(VOCABULARY, d))}
    weights["transformer.wpe.weight"] = 0.3 * rng.normal(size=(32, d))
    norms = [f"transformer.h.{i}.{norm}" for i in range(BLOCKS) for norm in ("ln_1", "ln_2")] + ["transformer.ln_f"]
    for norm in norms:
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = rng.normal(1.0, 0.2, size=d), 0.2 * rng.normal(size=d)
    for i in range(BLOCKS):
        for part, shape in (
            ("attn.c_attn", (d, 3 * d)),
            ("attn.c_proj", (d, d)),
            ("mlp.c_fc", (d, d_ff)),
            ("mlp.c_proj", (d_ff, d)),
        ):
            weights[f"transformer.h.{i}.{part}.weight"] = rng.normal(size=shape) / np.sqrt(shape[0])
            weights[f"transformer.h.{i}.{part}.bias"] = 0.3 * rng.normal(size=shape[1])
    config = {"model_type": "gpt2", "n_layer": BLOCKS, "n_head": 2, "layer_norm_epsilon": 1e-5}
    return weights, config


either_family = pytest.mark.parametrize(
    "model", [build(np.random.default_rng(3)) for build in (llama_weights, gpt2_weights)], ids=["llama", "gpt2"]
)
OUTPUTS = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
}


def probe_ids(sequences: int, seed: int) -> Any:
    """Tokens with a skewed distribution, so that a head has something to learn."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.25, size=(sequences, 10)) - 1, VOCABULARY - 1)


FIT, SELECT, CONFIRM = probe_ids(12, 1), probe_ids(6, 2), probe_ids(9, 3)


def streams_of(decoder: Decoder) -> Streams:
    return Streams(decoder.streams(FIT), decoder.streams(SELECT), decoder.streams(CONFIRM))


def store(weights: Weights, config: Config, i: int, part: int, weight: Any, bias: Any = None) -> Weights:
    """The state dict with another output projection [in, out] in block i (part 0: attention, 1: MLP)."""
    name = OUTPUTS[config["model_type"]][part].format(i)
    changed = weights | {f"{name}.weight": weight if config["model_type"] == "gpt2" else weight.T}
    return changed if bias is None else changed | {f"{name}.bias": bias}


def silence(weights: Weights, config: Config, i: int, part: int) -> Weights:
    """The state dict with a zero output projection."""
    weight, bias = Decoder(weights, config).projections(i)[part]
    return store(weights, config, i, part, np.zeros_like(weight), None if bias is None else np.zeros_like(bias))


def remove_block(weights: Weights, config: Config, i: int) -> Decoder:
    """The decoder without block i: later blocks move down by one number."""
    stem, count = {"llama": ("model.layers", "num_hidden_layers"), "gpt2": ("transformer.h", "n_layer")}[
        config["model_type"]
    ]
    kept = {}
    for name, value in weights.items():
        if not name.startswith(stem):
            kept[name] = value
            continue
        number, rest = name.removeprefix(f"{stem}.").split(".", 1)
        if int(number) != i:
            kept[f"{stem}.{int(number) - (int(number) > i)}.{rest}"] = value
    return Decoder(kept, config | {count: BLOCKS - 1})


def loss(decoder: Decoder, ids: Any) -> Any:
    return decoder.nll(decoder.streams(ids)[-1], ids)
