"""Models and probes of given shapes: weights trained for a moment, random tokens that can be learned."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from peel_agent import registry
from peel_agent.capture import open_trace
from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.load import open_snapshot
from peel_agent.pipeline import locate
from peel_agent.records import Probe

SEQUENCE = 64
BATCH = 4096 // SEQUENCE


def token_ids(sequences: int, vocabulary: int, seed: int) -> Any:
    """int64 [sequences, SEQUENCE]: noisy arithmetic progressions, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    start, stride = rng.integers(0, vocabulary, size=(sequences, 1)), rng.integers(1, 4, size=(sequences, 1))
    ids = (start + stride * np.arange(SEQUENCE)) % vocabulary
    return np.where(rng.random(ids.shape) < 0.2, rng.integers(0, vocabulary, size=ids.shape), ids)


def model_at(folder: Path, *, width: int, blocks: int, vocabulary: int, steps: int = 0) -> Path:
    """A Llama of this shape, trained for so many steps, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=SEQUENCE,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        ids = torch.from_numpy(token_ids(16, vocabulary, 1000 + step))
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return folder


def probe_of(tokens: int, vocabulary: int) -> Probe:
    """A probe of so many tokens in the contract's proportions."""
    ids = token_ids(tokens // SEQUENCE, vocabulary, 0)
    select, confirm = len(ids) // 11, 2 * len(ids) // 11
    return Probe(ids[select + confirm :], ids[:select], ids[select : select + confirm], "bench")


def trace_at(path: Path, probe: Probe, device: str) -> BlockwiseTrace:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_trace(open_snapshot(ref, form, registry.family), probe, device=device)


def forward_seconds(path: Path, probe: Probe, device: str) -> float:
    """One plain forward pass of transformers over the whole probe, loss included, with every weight resident."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    ids = torch.from_numpy(np.concatenate([probe.fit, probe.select, probe.confirm])).to(device)
    with torch.no_grad():
        model(ids[:BATCH], labels=ids[:BATCH])
        synchronise(device)
        start = time.perf_counter()
        for batch in ids.split(BATCH):
            model(batch, labels=batch)
        synchronise(device)
        return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
