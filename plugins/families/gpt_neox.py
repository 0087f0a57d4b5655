"""GPT-NeoX and Pythia: both parts read the same stream and are added at once, unless use_parallel_residual is false."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.records import Anatomy


class GPTNeoXFamily:
    name = "gpt_neox"
    model_types = frozenset({"gpt_neox"})

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy:
        parallel = config.get("use_parallel_residual", True)
        return Anatomy(
            blocks="gpt_neox.layers",
            attention_output=None if parallel else "attention.dense",
            mlp_path=() if parallel else ("post_attention_layernorm", "mlp"),
            mlp_output=None if parallel else "mlp.dense_4h_to_h",
            final_norm="gpt_neox.final_layer_norm",
            head="lm_head",
            stored_as={"lm_head.weight": "embed_out.weight"},
        )


FAMILY = GPTNeoXFamily()
