"""fp8 with a scale for each block: read as transformers dequantises it, and refused by name where it does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig

from peel_agent import registry
from peel_agent.errors import CheckpointError
from peel_agent.load import open_snapshot
from peel_agent.load.packed import unpack
from peel_agent.pipeline import locate
from tests.rooms.test_packed import (
    JUNK,
    LLAMA,
    Q_PROJ,
    Change,
    Tensors,
    drop,
    fp8_of,
    leaves,
    opened,
    outcome,
    put,
    refuses,
    replaced,
    say,
)

MIXTURE = Qwen3MoeConfig(
    vocab_size=32,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
)
BLOCK = (32, 32)


def write(folder: Path, config: Any, method: str, block: tuple[int, int] | None) -> Path:
    """A tiny model's checkpoint in fp8, its experts one by one."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(folder)
    weights = opened(folder)
    tensors = fp8_of(weights.tensors, block) if block is not None else by_matrix(weights.tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": method, "weight_block_size": block, "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(weights.own_config | {"quantization_config": settings}))
    return folder


def by_matrix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as fp8 codes with one scale each, and one for their activations."""
    tensors = {}
    for name, tensor in state.items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.abs().max() / 448
            tensors |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
            tensors[name.replace(".weight", ".activation_scale")] = torch.tensor(1.0)
    return tensors


@pytest.mark.parametrize(
    ("config", "method", "block"),
    [
        (LLAMA, "fp8", BLOCK),
        (LLAMA, "fp8", (16, 64)),
        (LLAMA, "fp8", None),
        (LLAMA, "mxfp8", (1, 32)),
        (MIXTURE, "fp8", BLOCK),
    ],
    ids=["blocks", "other blocks", "matrices", "mxfp8", "experts"],
)
def test_fp8(config: Any, method: str, block: tuple[int, int] | None, tmp_path: Path) -> None:
    """Every weight is what transformers dequantises it to, bit for bit; the report says what was stored."""
    path = write(tmp_path, config, method, block)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    snapshot = open_snapshot(ref, form, registry.family)
    for name, tensor in model.state_dict().items():
        assert torch.equal(snapshot.weights.read(name), tensor), name
    unit = "matrix" if block is None else f"block of {block[0]} x {block[1]}"
    assert snapshot.precision.startswith(f"{method} with a scale for each {unit}, dequantised; the 8-bit activations")


def test_blocks_at_the_edge_may_be_cut(tmp_path: Path) -> None:
    """Where blocks do not divide a matrix, those at its edges are smaller: each entry has the scale of its block."""
    weights = opened(write(tmp_path, LLAMA, "fp8", BLOCK))
    weights.settings["weight_block_size"] = [48, 40]
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    for name in [name for name in weights.tensors if name.endswith("_scale_inv")]:
        rows, columns = weights.tensors[name.removesuffix("_scale_inv")].shape
        weights.tensors[name] = torch.ones(-(-rows // 48), -(-columns // 40))
    weights.tensors[f"{Q_PROJ}.weight_scale_inv"] = scales
    matrix, codes = unpack(weights).weights.read(f"{Q_PROJ}.weight"), weights.tensors[f"{Q_PROJ}.weight"].float()
    for row in range(64):
        for column in range(64):
            assert matrix[row, column] == codes[row, column] * scales[row // 48, column // 40]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return opened(write(tmp_path_factory.mktemp("fp8"), LLAMA, "fp8", BLOCK))


SCALE = ".weight_scale_inv"
HOSTILE: list[tuple[str, Change, str]] = [
    ("block", say(weight_block_size=[128]), r"weight_block_size \[128\], not two numbers"),
    ("zero", say(weight_block_size=[0, 32]), r"weight_block_size \[0, 32\], not two numbers"),
    ("other", say(weight_block_size=[16, 32]), r"scale_inv` is \[2, 4\] where .* needs \[4, 4\]"),
    ("huge", say(weight_block_size=[10**9, 10**9]), r"scale_inv` is \[2, 4\] where .* needs \[1, 1\]"),
    ("matrix", say(weight_block_size=None), r"scale_inv` is \[2, 4\], where .* needs one scale for each matrix"),
    ("scales", put(SCALE, lambda t: t[0]), r"scale_inv` is \[2\] where .* needs \[2, 2\]"),
    ("nan", put(SCALE, lambda t: t * torch.nan), "hold a value that is not finite"),
    ("byte", put(SCALE, lambda t: torch.full_like(t, 255, dtype=torch.uint8)), "is not finite once it is dequantised"),
    ("no-codes", drop(".weight"), "weight` is missing, where .*scale_inv` is stored"),
    ("no-scale", drop(SCALE), "stored as float8_e4m3fn, and nothing beside it says how to dequantise it"),
    ("vector", put(".weight", lambda t: t[0]), "not the matrix that .* is the scale of"),
    ("plain", put(".weight", lambda t: t.float()), "stored as float32 instead of float8_e4m3fn or float8_e5m2"),
    ("packed", put(".weight", lambda t: t.view(torch.int8)), "stored as int8 instead of float8_e4m3fn"),
]


@pytest.mark.parametrize(("change", "words"), [pytest.param(*rest, id=name) for name, *rest in HOSTILE])
def test_hostile_fp8(fp8: Tensors, change: Change, words: str) -> None:
    """Settings that are not read, and missing and misshapen parts, are refused by name."""
    refuses(copy.deepcopy(fp8), change, words)


def test_a_claim_without_scales(fp8: Tensors) -> None:
    """Weights under the name of fp8 without a scale are refused, with what transformers can do."""
    bare = {name: tensor for name, tensor in fp8.tensors.items() if not name.endswith(SCALE)}
    with pytest.raises(CheckpointError, match=r"no tensor `\.\.\._scale_inv` is stored") as caught:
        unpack(Tensors(fp8.own_config, bare))
    assert "FineGrainedFP8Config(dequantize=True)" in caught.value.remedy


def test_any_value_of_the_settings(fp8: Tensors) -> None:
    """Whatever one value of quantization_config is, the matrix is read or the checkpoint refused in few words."""
    outcomes = [
        outcome(Tensors(fp8.own_config | {"quantization_config": changed}, fp8.tensors))
        for path in leaves(fp8.settings)
        for changed in (replaced(fp8.settings, path, junk) for junk in JUNK)
    ]
    assert {shape_or_words for shape_or_words in outcomes if not isinstance(shape_or_words, str)} <= {(64, 64)}
    assert 0 < max(len(shape_or_words) for shape_or_words in outcomes if isinstance(shape_or_words, str)) < 1000
