"""deploy/examples/nanogpt.py over a model with nanoGPT's public names: peeled, its loss the model's own.

The model below is written for this test; it has the classes, arguments and parameter names that nanoGPT's model.py has.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import peel_agent
from peel_agent.load.architecture import of_factory
from tests import zoo

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "nanogpt.py"
ARGUMENTS = {"n_layer": 4, "n_head": 4, "n_embd": 16, "block_size": 32, "bias": False, "vocab_size": 32, "dropout": 0.0}

MODEL = '''
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class LayerNorm(nn.Module):
    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """With the triangle that nanoGPT keeps as a buffer where torch has no fused attention."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.heads = config.n_head
        size = config.block_size
        self.register_buffer("bias", torch.ones(size, size).tril().view(1, 1, size, size))

    def forward(self, x):
        B, S, D = x.shape
        q, k, v = (t.view(B, S, self.heads, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / (D // self.heads) ** 0.5
        weights = scores.masked_fill(self.bias[:, :, :S, :S] == 0, float("-inf")).softmax(dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, S, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.n_embd, config.bias), Attention(config)
        self.ln_2, self.mlp = LayerNorm(config.n_embd, config.bias), MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": LayerNorm(config.n_embd, config.bias),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        print(f"number of parameters: {sum(p.numel() for p in self.parameters())}")

    def forward(self, idx, targets=None):
        """Only the last position's logits without targets, as nanoGPT does for sampling."""
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1])))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for PYTHONPATH with the model and the example; what was imported of it is forgotten afterwards."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    shutil.copy(EXAMPLE, folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("model", "nanogpt"):
        sys.modules.pop(name, None)


def trained(module: ModuleType, steps: int) -> Any:
    """Block 2 adds nothing, from the first step to the last."""
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**ARGUMENTS))
    for projection in (model.transformer.h[2].attn.c_proj, model.transformer.h[2].mlp.c_proj):
        torch.nn.init.zeros_(projection.weight).requires_grad_(False)
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=5e-3)
    ids = torch.from_numpy(zoo.token_ids(64, 0))
    for _ in range(steps):
        optimiser.zero_grad()
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimiser.step()
    return model.eval()


def test_nanogpt_is_peeled(code: Path, tmp_path: Path) -> None:
    """A scan of its ckpt.pt, compiled as train.py does, finds the block that does nothing, and the model's own loss."""
    model = trained(importlib.import_module("model"), steps=80)
    state = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}
    torch.save({"model": state, "model_args": ARGUMENTS, "iter_num": 70, "config": {}}, tmp_path / "ckpt.pt")
    ids = zoo.token_ids(400, 9)
    np.save(tmp_path / "probe.npy", ids)
    report = peel_agent.scan(tmp_path / "ckpt.pt", probe=tmp_path / "probe.npy", factory="nanogpt:factory")
    assert report.checkpoint.step == 70
    assert [layer.name for layer in report.layers] == [f"transformer.h.{index}" for index in range(4)]
    idle = report.layers[2]
    assert idle.status == "below"
    assert idle.margin is not None
    assert idle.margin.value == pytest.approx(0.0, abs=1e-3)
    assert report.bound is not None
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        loss = float(model(tokens[:, :-1], tokens[:, 1:])[1])
    assert report.loss.low - 0.05 < loss < report.loss.high + 0.05


def test_its_parts_are_where_the_factory_says(code: Path) -> None:
    """Parameters take no memory, head and embedding are one, and the body is the whole stream, not the last of it."""
    built = of_factory("nanogpt:factory", ARGUMENTS)
    assert {parameter.device.type for parameter in built.module.parameters()} == {"meta"}
    assert built.tied == {"transformer.wte.weight": "lm_head.weight", "lm_head.weight": "transformer.wte.weight"}
    assert built.context == ARGUMENTS["block_size"]
    nanogpt = importlib.import_module("nanogpt")
    made = nanogpt.factory(ARGUMENTS)
    ids = torch.from_numpy(zoo.token_ids(3, 5))
    with torch.no_grad():
        logits = made.module.lm_head(made.module.transformer.ln_f(made.body(ids)))
        assert torch.equal(logits, made.module(ids, ids)[0])
