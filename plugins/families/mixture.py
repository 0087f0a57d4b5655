"""Mixtures of experts: Mixtral, Qwen-MoE and OLMoE, whose MLP part is a router and its experts.

What the MLP part adds is a choice of experts for each token, which no single projection can be refitted to give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.errors import CheckpointError
from peel_agent.records import Anatomy, Experts

_MODEL = "model.layers.{block}.mlp."
_MIXTRAL = "model.layers.{block}.block_sparse_moe."


class MixtureFamily:
    name = "mixture"
    model_types = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"})

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy:
        _check_routing(config)
        return Anatomy(
            blocks="model.layers",
            attention_output="self_attn.o_proj",
            mlp_path=("post_attention_layernorm", "mlp"),
            mlp_output=None,
            final_norm="model.norm",
            head="lm_head",
            stored_as=_MIXTRAL_NAMES if config["model_type"] == "mixtral" else _QWEN_NAMES,
        )


def _experts(prefix: str, gate: str, up: str, down: str) -> dict[str, str | Experts]:
    def named(part: str) -> str:
        return f"{prefix}experts.{{expert}}.{part}.weight"

    return {
        f"{_MODEL}experts.gate_up_proj": Experts((named(gate), named(up))),
        f"{_MODEL}experts.down_proj": Experts((named(down),)),
    }


_MIXTRAL_NAMES = _experts(_MIXTRAL, "w1", "w3", "w2") | {f"{_MODEL}gate.weight": f"{_MIXTRAL}gate.weight"}
_QWEN_NAMES = _experts(_MODEL, "gate_proj", "up_proj", "down_proj")


def _check_routing(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for routing that cannot be run, or that config.json would hand to code from elsewhere."""
    experts = config.get("num_local_experts", config.get("num_experts"))
    chosen = config.get("num_experts_per_tok")
    if isinstance(experts, int) and isinstance(chosen, int) and not 1 <= chosen <= experts:
        raise CheckpointError(
            f"config.json sends each token to {chosen} of {experts} experts",
            remedy="num_experts_per_tok must be from 1 to the number of experts; use the config.json of the training",
        )
    for key in ("experts_implementation", "_experts_implementation"):
        if config.get(key) is not None:
            raise CheckpointError(
                f"config.json has `{key}`, by which transformers runs experts with code from outside the checkpoint",
                remedy=f"take `{key}` out of config.json; transformers itself does not save it",
            )


FAMILY = MixtureFamily()
