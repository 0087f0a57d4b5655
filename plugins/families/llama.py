"""Llama-like decoders: a norm before each part, rotary positions, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.records import Anatomy


class LlamaFamily:
    name = "llama"
    model_types = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "bitnet"})

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy:  # noqa: ARG002 - one anatomy for the whole family
        return Anatomy(
            blocks="model.layers",
            attention_output="self_attn.o_proj",
            mlp_path=("post_attention_layernorm", "mlp"),
            mlp_output="mlp.down_proj",
            final_norm="model.norm",
            head="lm_head",
        )


FAMILY = LlamaFamily()
