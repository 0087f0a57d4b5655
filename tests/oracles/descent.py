"""The paper's chain by descent, straight: transformers' modules in float64, one map at a time, all of fit at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def forward_of(model: Any) -> Any:
    """A function (layer, h) -> output for layers of this Llama or GPT-2, with positions from 0."""
    if model.config.model_type == "gpt2":
        return lambda layer, h: layer(h)

    def llama(layer: Any, h: Tensor) -> Tensor:
        positions = torch.arange(h.shape[1])[None]
        output: Tensor = layer(h, position_embeddings=model.model.rotary_emb(h, positions), position_ids=positions)
        return output

    return llama


def embeddings(model: Any, ids: Tensor) -> Tensor:
    if model.config.model_type == "gpt2":
        body = model.transformer
        return body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    return model.model.embed_tokens(ids)


def chain(model: Any, fit: Any, others: Sequence[Any], pi: Sequence[int]) -> list[Tensor]:
    """Last streams of the chain on fit and on each of `others` (token ids [N, S]); 6 AdamW steps at 1e-3 a block."""
    model = copy.deepcopy(model).double()
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    run = forward_of(model)
    with torch.no_grad():
        hidden = [embeddings(model, torch.from_numpy(fit))]
        for layer in layers:
            hidden.append(run(layer, hidden[-1]))
        streams = [embeddings(model, torch.from_numpy(ids)) for ids in (fit, *others)]
    for number, target in enumerate(pi):
        layer = copy.deepcopy(layers[number])
        optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0)
        for _ in range(6):
            optimiser.zero_grad()
            torch.nn.functional.mse_loss(run(layer, streams[0].detach()), hidden[target]).backward()
            optimiser.step()
        with torch.no_grad():
            streams = [run(layer, stream) for stream in streams]
    return streams
