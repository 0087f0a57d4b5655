"""GPT-2: LayerNorm before each part, learned positions, projections stored as transformers' Conv1D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.errors import UnknownFamily
from peel_agent.records import Anatomy


class GPT2Family:
    name = "gpt2"
    model_types = frozenset({"gpt2"})

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy:
        if config.get("add_cross_attention"):
            raise UnknownFamily(
                "this GPT-2 has add_cross_attention=true; its blocks have three parts",
                remedy="peel decoder-only checkpoints; encoder-decoder models are not covered",
            )
        return Anatomy(
            blocks="transformer.h",
            attention_output="attn.c_proj",
            mlp_path=("ln_2", "mlp"),
            mlp_output="mlp.c_proj",
            final_norm="transformer.ln_f",
            head="lm_head",
            projection_layout="in_out",
        )


FAMILY = GPT2Family()
