"""Where each weight of a transformers model is among the tensors of a Megatron-core GPTModel, by name.

The names are those of megatron/core/models/gpt and megatron/core/transformer. Of two spellings of one, the first is
that of Transformer Engine's fused layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["whole", "vocabulary", "query", "key", "value", "query key value", "gate", "up"]
"""Which rows of a stored tensor a weight is."""

_QKV, _FC1 = "self_attention.linear_qkv.", "mlp.linear_fc1."


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight `weight` of the model may be: in the first of the tensors `among`, each with what of it."""

    weight: str
    among: tuple[tuple[str, Kind], ...]
    transposed: bool = False


def _both(module: str, stored: str, kind: Kind = "whole", *, transposed: bool = False) -> tuple[Place, Place]:
    """The places of a weight and of its bias."""
    return (
        Place(f"{module}.weight", ((f"{stored}weight", kind),), transposed),
        Place(f"{module}.bias", ((f"{stored}bias", kind),)),
    )


def _norm(module: str, fused: str, alone: str) -> tuple[Place, Place]:
    """The places of a norm, in the projection behind it (Transformer Engine) or by itself."""
    return (
        Place(f"{module}.weight", ((f"{fused}layer_norm_weight", "whole"), (f"{alone}.weight", "whole"))),
        Place(f"{module}.bias", ((f"{fused}layer_norm_bias", "whole"), (f"{alone}.bias", "whole"))),
    )


def _gated(module: str, kind: Kind, half: str) -> Iterator[Place]:
    """The places of a half of linear_fc1, which newer releases may store as tensors of their own."""
    for what in ("weight", "bias"):
        yield Place(f"{module}.{what}", ((f"{_FC1}{what}", kind), (f"{_FC1}{what}_{half}", "whole")))


_LLAMA_LAYER = (
    *_norm("input_layernorm", _QKV, "input_layernorm"),
    *_both("self_attn.q_proj", _QKV, "query"),
    *_both("self_attn.k_proj", _QKV, "key"),
    *_both("self_attn.v_proj", _QKV, "value"),
    *_both("self_attn.o_proj", "self_attention.linear_proj."),
    *_norm("post_attention_layernorm", _FC1, "pre_mlp_layernorm"),
    *_gated("mlp.gate_proj", "gate", "w"),
    *_gated("mlp.up_proj", "up", "v"),
    *_both("mlp.down_proj", "mlp.linear_fc2."),
)
_QWEN3_LAYER = (
    *_LLAMA_LAYER,
    Place("self_attn.q_norm.weight", (("self_attention.q_layernorm.weight", "whole"),)),
    Place("self_attn.k_norm.weight", (("self_attention.k_layernorm.weight", "whole"),)),
)
_GPT2_LAYER = (
    *_norm("ln_1", _QKV, "input_layernorm"),
    *_both("attn.c_attn", _QKV, "query key value", transposed=True),
    *_both("attn.c_proj", "self_attention.linear_proj.", transposed=True),
    *_norm("ln_2", _FC1, "pre_mlp_layernorm"),
    *_both("mlp.c_fc", _FC1, transposed=True),
    *_both("mlp.c_proj", "mlp.linear_fc2.", transposed=True),
)
_HEAD = Place("lm_head.weight", (("output_layer.weight", "vocabulary"),))
_LLAMA_TOP = (
    Place("model.embed_tokens.weight", (("embedding.word_embeddings.weight", "vocabulary"),)),
    *_both("model.norm", "decoder.final_layernorm."),
    _HEAD,
)
_GPT2_TOP = (
    Place("transformer.wte.weight", (("embedding.word_embeddings.weight", "vocabulary"),)),
    Place("transformer.wpe.weight", (("embedding.position_embeddings.weight", "whole"),)),
    *_both("transformer.ln_f", "decoder.final_layernorm."),
    _HEAD,
)
MODELS: Mapping[str, tuple[str, tuple[Place, ...], tuple[Place, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2"), ("model.layers.", _LLAMA_TOP, _LLAMA_LAYER)),
    "qwen3": ("model.layers.", _LLAMA_TOP, _QWEN3_LAYER),
    "gpt2": ("transformer.h.", _GPT2_TOP, _GPT2_LAYER),
}
"""By model_type: what comes before a block's number, and the places outside and inside the blocks."""

FOREIGN: Mapping[str, str] = {
    r"\.experts\b|\.router\.|shared_experts?\.": "a mixture of experts",
    r"linear_(?:q|kv)_(?:down|up)_proj|\.linear_q_proj|kv_layernorm": "multi-head latent attention (MLA)",
    r"^mtp\.": "multi-token prediction (MTP)",
    r"^(?:vision|image|audio|sound)_|^language_model\.|vision_projection": "a multi-modal model",
    r"\.mixer\.": "a state-space (Mamba) or hybrid model",
    r"^encoder\.|cross_attention|^binary_head|^lm_head\.|^pooler": "an encoder (BERT, T5)",
    r"adapter|lora": "an adapter (LoRA)",
    r"^model\d+\.": "chunks of a virtual pipeline saved one by one",
}
"""By a pattern in a stored name: the architecture that it belongs to, which is not mapped."""
