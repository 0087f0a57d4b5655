"""Decoders that put a norm behind each part: OLMo 2, Gemma 2 and Gemma 3.

What a part adds to the stream is the norm's output, not a projection's: nothing here can be refitted in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.records import Anatomy


class PostNormFamily:
    name = "post_norm"
    model_types = frozenset({"olmo2", "gemma2", "gemma3_text"})

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy:
        before = () if config.get("model_type") == "olmo2" else ("pre_feedforward_layernorm",)
        return Anatomy(
            blocks="model.layers",
            attention_output=None,
            mlp_path=(*before, "mlp", "post_feedforward_layernorm"),
            mlp_output=None,
            final_norm="model.norm",
            head="lm_head",
            softcap=config.get("final_logit_softcapping"),
        )


FAMILY = PostNormFamily()
