"""The factory by which peel-agent peels a training of nanoGPT.

Put nanoGPT's folder (the one with model.py) and the folder of this file into PYTHONPATH, and
`factory = "nanogpt:factory"` under `[model]` in peel.toml. A probe is `data/<dataset>/val.bin`. The checkpoint is
`out/ckpt.pt` as train.py writes it; what the factory gets is its `model_args`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peel_agent.records import Anatomy, CustomModel


def factory(config: dict[str, Any]) -> CustomModel:
    """The model of nanoGPT's own model.py, without its loss: blocks, head, and the stream after the last block."""
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(**config))
    parts = model.transformer

    def body(ids: Tensor) -> Tensor:
        """Token ids [B, S] to the stream after the last block [B, S, n_embd]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = parts.drop(parts.wte(ids) + parts.wpe(positions))
        for block in parts.h:
            x = block(x)
        return x

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
        context=int(config["block_size"]),
        body=body,
    )
