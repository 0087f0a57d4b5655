"""A decoder of one's own, in nanoGPT's style, and the factory by which peel-agent peels it.

Put the folder of this file into PYTHONPATH and `factory = "own_model:factory"` under `[model]` in peel.toml. A checkpoint
is what nanoGPT's training loop saves: `torch.save({"model": model.state_dict(), "model_args": {...}, ...}, "ckpt.pt")`.
For nanoGPT itself there is nanogpt.py beside this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peel_agent.records import Anatomy, CustomModel


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.n_head, width // self.n_head)
        q, k, v = (own.reshape(heads).transpose(1, 2) for own in self.c_attn(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), Attention(n_embd, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), MLP(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    def __init__(self, *, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight  # tied

    def body(self, ids: Tensor) -> Tensor:
        """Token ids [B, S] to the stream after the last block [B, S, n_embd]."""
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1], device=ids.device))
        for block in self.transformer["h"]:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, S] to logits [B, S, vocab_size]."""
        return self.lm_head(self.transformer["ln_f"](self.body(ids)))


def factory(config: dict[str, Any]) -> CustomModel:
    """`config` is what stands beside the weights: config.json, or `model_args` in the file."""
    model = Decoder(**config)
    return CustomModel(
        module=model,
        anatomy=Anatomy(
            blocks="transformer.h",
            attention_output="attn.c_proj",
            mlp_path=("ln_2", "mlp"),
            mlp_output="mlp.c_proj",
            final_norm="transformer.ln_f",
            head="lm_head",
        ),
        context=config["block_size"],
        body=model.body,
    )
