"""Llama-like decoders: a norm before each part, rotary positions, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.errors import CheckpointError
from peel_agent.records import AdjacentPairs, Anatomy


class LlamaFamily:
    name = "llama"
    model_types = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "bitnet"})

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy:
        return Anatomy(
            blocks="model.layers",
            attention_output="self_attn.o_proj",
            mlp_path=("post_attention_layernorm", "mlp"),
            mlp_output="mlp.down_proj",
            final_norm="model.norm",
            head="lm_head",
            stored_as=_titan_names(config) if config.get("model_type") == "llama" else {},
        )


def _titan_names(config: Mapping[str, Any]) -> dict[str, str | AdjacentPairs]:
    """What torchtitan's checkpoints, and Meta's own, call the weights of a Llama; theirs turn adjacent rows."""
    heads = config.get("num_attention_heads", 32)
    key_heads = config.get("num_key_value_heads") or heads
    for count in (heads, key_heads):
        if type(count) is not int or count < 1:
            raise CheckpointError(
                f"config.json says that there are {count!r} attention heads", remedy="use the config.json of the model"
            )
    ours, theirs = "model.layers.{block}.", "layers.{block}."
    return {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
        f"{ours}self_attn.q_proj.weight": AdjacentPairs(f"{theirs}attention.wq.weight", heads),
        f"{ours}self_attn.k_proj.weight": AdjacentPairs(f"{theirs}attention.wk.weight", key_heads),
        f"{ours}self_attn.v_proj.weight": f"{theirs}attention.wv.weight",
        f"{ours}self_attn.o_proj.weight": f"{theirs}attention.wo.weight",
        f"{ours}mlp.gate_proj.weight": f"{theirs}feed_forward.w1.weight",
        f"{ours}mlp.up_proj.weight": f"{theirs}feed_forward.w3.weight",
        f"{ours}mlp.down_proj.weight": f"{theirs}feed_forward.w2.weight",
        f"{ours}input_layernorm.weight": f"{theirs}attention_norm.weight",
        f"{ours}post_attention_layernorm.weight": f"{theirs}ffn_norm.weight",
    }


FAMILY = LlamaFamily()
