"""OPT: LayerNorm before each part, learned positions, the MLP's layers directly in the block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.errors import UnknownFamily
from peel_agent.records import Anatomy


class OPTFamily:
    name = "opt"
    model_types = frozenset({"opt"})

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy:
        narrow = config.get("word_embed_proj_dim", config.get("hidden_size")) != config.get("hidden_size")
        if narrow or not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
            raise UnknownFamily(
                "this OPT has its norms behind the parts, or embeddings narrower than its stream (as OPT-350m)",
                remedy="peel an OPT with do_layer_norm_before=true and word_embed_proj_dim equal to hidden_size",
            )
        return Anatomy(
            blocks="model.decoder.layers",
            attention_output="self_attn.out_proj",
            mlp_path=("final_layer_norm", "fc1", "activation_fn", "fc2"),
            mlp_output="fc2",
            final_norm="model.decoder.final_layer_norm",
            head="lm_head",
        )


FAMILY = OPTFamily()
