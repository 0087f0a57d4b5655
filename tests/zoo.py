"""Tiny decoders from configuration, trained for a moment so that nothing in them is tied or dead, saved to disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from peel_agent import registry
from peel_agent.capture import open_trace
from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.load import open_snapshot
from peel_agent.pipeline import locate
from peel_agent.records import Probe, Snapshot
from tests.oracles.decoder import Decoder

VOCABULARY, WIDTH, BLOCKS, CONTEXT = 19, 16, 4, 32
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GATED = _SHARED | {"intermediate_size": 24, "num_key_value_heads": 2}
_MIXED = _GATED | {"num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": LlamaConfig(**_GATED),
    "mistral": MistralConfig(**_GATED, head_dim=4, sliding_window=8),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_GATED, head_dim=4),
    "gpt2": GPT2Config(**_SHARED, n_inner=24, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "phi3": Phi3Config(**_GATED, pad_token_id=0),
    "bitnet": BitNetConfig(**_GATED, pad_token_id=0),
    "olmo2": Olmo2Config(**_GATED, pad_token_id=0),
    "gemma": GemmaConfig(**_GATED, head_dim=4, pad_token_id=0),
    "gemma2": Gemma2Config(**_GATED, head_dim=4, pad_token_id=0, sliding_window=8, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**_GATED, head_dim=4, pad_token_id=0, sliding_window=8),
    "gpt_neox": GPTNeoXConfig(**_SHARED, intermediate_size=24, attention_dropout=0.0, hidden_dropout=0.0),
    "gpt_neox_sequential": GPTNeoXConfig(
        **_SHARED, intermediate_size=24, attention_dropout=0.0, hidden_dropout=0.0, use_parallel_residual=False
    ),
    "opt": OPTConfig(**_SHARED, ffn_dim=24, word_embed_proj_dim=WIDTH, dropout=0.0, attention_dropout=0.0),
    "mixtral": MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2, head_dim=4),
    "qwen2_moe": Qwen2MoeConfig(
        **_MIXED, moe_intermediate_size=12, shared_expert_intermediate_size=20, decoder_sparse_step=2
    ),
    "qwen3_moe": Qwen3MoeConfig(**_MIXED, moe_intermediate_size=12, head_dim=4, mlp_only_layers=[1]),
    "olmoe": OlmoeConfig(**_MIXED, pad_token_id=0, clip_qkv=3.0),
}


def token_ids(sequences: int, seed: int) -> Any:
    """int64 [sequences, 12]: a noisy cycle through a part of the vocabulary, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, VOCABULARY, size=(sequences, 1))
    stride = rng.integers(1, 4, size=(sequences, 1))
    ids = (start + stride * np.arange(12)) % VOCABULARY
    noise = rng.random(ids.shape) < 0.2
    return np.where(noise, rng.integers(0, VOCABULARY, size=ids.shape), ids)


def probe(fit: int = 40, select: int = 10, confirm: int = 15) -> Probe:
    return Probe(token_ids(fit, 1), token_ids(select, 2), token_ids(confirm, 3), fingerprint="zoo")


def build(kind: str, steps: int = 80, idle: Sequence[str] = ()) -> Any:
    """A model of the zoo after a few optimiser steps, in float32 on the CPU; `idle` parameters stay 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))
    for name in idle:
        model.get_parameter(name).requires_grad_(False).zero_()
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=5e-3)
    ids = torch.from_numpy(token_ids(64, 0))
    for _ in range(steps):
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    return model.eval()


def save(model: Any, folder: Path, *, step: int | None = None) -> Path:
    """Saves with transformers; with `step`, as a Trainer's checkpoint folder."""
    if step is None:
        model.save_pretrained(folder)
        return folder
    path = folder / f"checkpoint-{step}"
    model.save_pretrained(path)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def trace_of(path: Path, tokens: Probe | None = None) -> BlockwiseTrace:
    """The checkpoint at `path` as the peel room sees it."""
    return open_trace(snapshot_of(path), tokens or probe())


def snapshot_of(path: Path) -> Snapshot:
    """The checkpoint at `path`, opened."""
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_snapshot(ref, form, registry.family)


def decoder_of(model: Any) -> Decoder:
    """The float64 oracle with the same weights."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return Decoder(weights, model.config.to_dict())
