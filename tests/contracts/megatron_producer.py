"""Real checkpoints of Megatron-core, written by two processes on the CPU; run by test_megatron_format.

Megatron's own code builds the models, runs them and saves them. What it does on a GPU only is stood in for here, and
nothing else: torch.cuda.current_device and synchronize, Tensor.cuda, and the random state of dropout (there is none).
The weights come from a transformers model; `fill` puts them into Megatron's modules, by code that shares nothing with
the plug-in. Heavy imports are in functions: Megatron's writer starts a process that imports this module.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = 8  # mistral of the zoo looks no further back
STEP = 7
ITERATION = "iter_0000007"
REFERENCE = "transformers"


@dataclass(frozen=True)
class Case:
    """A model of the zoo, and how Megatron shares it out and stores it."""

    kind: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    tied: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    optimizer: bool = False
    experts: int | None = None


CASES = {
    "llama": Case("llama", tensor_parallel=2, optimizer=True),
    "llama-bfloat16": Case("llama", tensor_parallel=2, dtype="bfloat16"),
    "mistral": Case("mistral", tensor_parallel=2, metadata={"singleton_local_shards": True}),
    "qwen2": Case("qwen2", pipeline_parallel=2, tied=True),
    "qwen3": Case("qwen3", metadata={"non_homogeneous_layers": True}),
    "gpt2": Case("gpt2", tensor_parallel=2, tied=True),
    "experts": Case("llama", experts=2),
}
READABLE = tuple(name for name, case in CASES.items() if case.experts is None)


def token_ids() -> Any:
    """int64 [3, TOKENS]."""
    import torch

    return torch.arange(3 * TOKENS).reshape(3, TOKENS) * 5 % 19


def write_reference(case: Case, folder: Path) -> None:
    """A transformers model of the zoo in which no weight is what it was initialised to."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests import zoo

    config = copy.deepcopy(zoo.CONFIGS[case.kind])
    config.tie_word_embeddings = case.tied
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(getattr(torch, case.dtype)).save_pretrained(folder)


def write(rank: int, port: int, root: Path) -> None:
    """One of two ranks: every case, from the transformers model that is beside it."""
    import torch

    warnings.simplefilter("ignore")  # Megatron's, of Apex and Transformer Engine
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign, assignment]
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    try:
        for name, case in CASES.items():
            parallel_state.initialize_model_parallel(case.tensor_parallel, case.pipeline_parallel)
            _write_case(case, root / name, rank)
            parallel_state.destroy_model_parallel()
    finally:
        torch.distributed.destroy_process_group()


def _write_case(case: Case, folder: Path, rank: int) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file, save_file

    config = argparse.Namespace(**json.loads((folder / REFERENCE / "config.json").read_text()))
    model = _model(case, config).eval()
    logits = None
    with torch.no_grad():
        if case.experts is None:
            fill(model, load_file(folder / REFERENCE / "model.safetensors"), config)
        if case.experts is None and case.dtype == "float32":
            logits = _logits(model, case)
    state = {**model.sharded_state_dict(metadata=dict(case.metadata))}
    state["args"] = argparse.Namespace(apply_layernorm_1p=False, rotary_interleaved=False, num_layers=4)
    state["iteration"] = STEP
    if case.optimizer:
        state["optimizer"] = _moments(model, state)
    if rank == 0:
        (folder / ITERATION).mkdir()
        (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    if logits is not None and rank == 1:
        save_file({"logits": logits}, folder / "logits.safetensors")
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder / ITERATION))


def _model(case: Case, config: Any) -> Any:
    """Megatron's GPTModel of the same architecture, of local layers (those without Transformer Engine)."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig
    from torch.nn import functional

    gpt2 = case.kind == "gpt2"
    width, heads = (config.n_embd, config.n_head) if gpt2 else (config.hidden_size, config.num_attention_heads)
    norm = "LayerNorm" if gpt2 else "RMSNorm"
    settings = TransformerConfig(
        num_layers=config.n_layer if gpt2 else config.num_hidden_layers,
        hidden_size=width,
        ffn_hidden_size=config.n_inner if gpt2 else config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=heads if gpt2 else config.num_key_value_heads,
        kv_channels=width // heads,
        normalization=norm,
        layernorm_epsilon=config.layer_norm_epsilon if gpt2 else config.rms_norm_eps,
        gated_linear_unit=not gpt2,
        activation_func=_gelu if gpt2 else functional.silu,
        add_bias_linear=gpt2,
        add_qkv_bias=case.kind == "qwen2",
        qk_layernorm=case.kind == "qwen3",
        tensor_model_parallel_size=case.tensor_parallel,
        pipeline_model_parallel_size=case.pipeline_parallel,
        pipeline_dtype=getattr(torch, case.dtype),
        params_dtype=getattr(torch, case.dtype),
        use_cpu_initialization=True,
        num_moe_experts=case.experts,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(case.experts, normalization=norm, qk_layernorm=case.kind == "qwen3")
    return GPTModel(
        settings,
        spec,
        vocab_size=24,  # padded from 19
        max_sequence_length=config.n_positions if gpt2 else config.max_position_embeddings,
        position_embedding_type="learned_absolute" if gpt2 else "rope",
        share_embeddings_and_output_weights=case.tied,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).to(getattr(torch, case.dtype))


def _gelu(x: Any) -> Any:
    from torch.nn import functional

    return functional.gelu(x, approximate="tanh")


def fill(model: Any, weights: Mapping[str, Any], config: Any) -> None:
    """Puts transformers' weights into this rank's share of a Megatron model."""
    import torch

    gpt2 = config.model_type == "gpt2"
    for name, parameter in model.named_parameters():
        whole, axis = _gpt2_source(name, model, weights) if gpt2 else _llama_source(name, model, weights, config)
        if axis is None:
            share = whole
        else:
            from megatron.core import parallel_state

            size = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
            halves = whole.chunk(2) if "linear_fc1" in name and not gpt2 else (whole,)
            share = torch.cat([half.chunk(size, dim=axis)[rank] for half in halves])
        parameter.copy_(share)


def _padded(matrix: Any) -> Any:
    """The vocabulary padded to 24 rows of something that must not be read."""
    import torch

    return torch.cat([matrix, torch.full((24 - len(matrix), matrix.shape[1]), 1e3, dtype=matrix.dtype)])


def _layer(name: str, model: Any) -> tuple[int, str]:
    _, _, index, rest = name.split(".", 3)
    return model.decoder.layers[int(index)].layer_number - 1, rest


def _interleaved(query: Any, key: Any, value: Any, groups: int) -> Any:
    """Group by group: the group's queries, its key, its value."""
    import torch

    parts = [part.unflatten(0, (groups, -1)) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _llama_source(name: str, model: Any, weights: Mapping[str, Any], config: Any) -> tuple[Any, int | None]:
    """The whole tensor behind a parameter, and the axis along which ranks share it."""
    import torch

    if name == "embedding.word_embeddings.weight":
        return _padded(weights["model.embed_tokens.weight"]), 0
    if name == "output_layer.weight":
        return _padded(weights.get("lm_head.weight", weights["model.embed_tokens.weight"])), 0
    if name == "decoder.final_layernorm.weight":
        return weights["model.norm.weight"], None
    number, rest = _layer(name, model)
    block = f"model.layers.{number}."
    plain = {
        "input_layernorm.weight": ("input_layernorm.weight", None),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", None),
        "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", None),
        "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", None),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", 1),
        "mlp.linear_fc2.weight": ("mlp.down_proj.weight", 1),
    }
    if rest in plain:
        return weights[block + plain[rest][0]], plain[rest][1]
    what = rest.rsplit(".", 1)[1]
    if rest.startswith("self_attention.linear_qkv."):
        parts = [weights[f"{block}self_attn.{part}_proj.{what}"] for part in "qkv"]
        return _interleaved(*parts, config.num_key_value_heads), 0
    assert rest == "mlp.linear_fc1.weight"
    return torch.cat([weights[f"{block}mlp.{part}_proj.weight"] for part in ("gate", "up")]), 0


def _gpt2_source(name: str, model: Any, weights: Mapping[str, Any]) -> tuple[Any, int | None]:
    top = {
        "embedding.position_embeddings.weight": "transformer.wpe.weight",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    }
    if name in top:
        return weights[top[name]], None
    if name == "embedding.word_embeddings.weight":
        return _padded(weights["transformer.wte.weight"]), 0
    number, rest = _layer(name, model)
    module, what = rest.rsplit(".", 1)
    local, axis = {
        "input_layernorm": ("ln_1", None),
        "pre_mlp_layernorm": ("ln_2", None),
        "self_attention.linear_qkv": ("attn.c_attn", 0),
        "self_attention.linear_proj": ("attn.c_proj", 1),
        "mlp.linear_fc1": ("mlp.c_fc", 0),
        "mlp.linear_fc2": ("mlp.c_proj", 1),
    }[module]
    stored = weights[f"transformer.h.{number}.{local}.{what}"]
    stored = stored.t() if stored.ndim == 2 else stored
    if local == "attn.c_attn":
        stored = _interleaved(*stored.chunk(3), 4)
    return stored, axis if axis != 1 or what == "weight" else None


def _logits(model: Any, case: Case) -> Any:
    """float32 [3, TOKENS, 24] on the last rank, through the pipeline and gathered over the vocabulary."""
    import torch
    from megatron.core import parallel_state

    ids = token_ids()
    positions = torch.arange(TOKENS).expand_as(ids)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)[None, None]
    if not parallel_state.is_pipeline_first_stage():
        received = torch.empty(TOKENS, len(ids), model.config.hidden_size)
        torch.distributed.recv(received, 0)
        model.set_input_tensor(received)
    output = model(ids, positions, mask)
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(output.contiguous(), 1)
        return None
    if case.tensor_parallel == 1:
        return output
    shares = [torch.empty_like(output) for _ in range(case.tensor_parallel)]
    torch.distributed.all_gather(shares, output.contiguous())
    return torch.cat(shares, dim=-1)


def _moments(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Adam's first moments as Megatron's optimizer stores them: the sharding of the weight, another name."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    moments = {
        f"exp_avg.{name}": make_sharded_optimizer_tensor(
            sharded, torch.ones_like(sharded.data), "optimizer.state.exp_avg"
        )
        for name, sharded in state.items()
        if isinstance(sharded, ShardedTensor)
    }
    return {"state": moments, "param_groups": [{"params": [0, 1], "lr": 0.0}]}
