"""`make bench`: what a peel costs, as ratios measured in one run, printed and written to bench.json.

The unit is one plain forward pass of the same model over the whole probe, on the same device and dtype.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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
from peel_agent.peel import peel
from peel_agent.pipeline import locate
from peel_agent.records import Plan, Probe

SEQUENCE = 64

PLANS = {
    "quick margins (skip, affine)": Plan(frozenset({"margin"}), ("skip", "affine"), "ends"),
    "margins of all blocks and parts": Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends"),
    "default suite of bounds": Plan(frozenset({"bounds"}), (), "ends"),
}


def model_at(folder: Path, *, width: int, blocks: int, vocabulary: int) -> Path:
    """A Llama of this shape with random weights, saved."""
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
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def probe_of(tokens: int, vocabulary: int) -> Probe:
    """Random token ids in the contract's proportions, sequences of SEQUENCE."""
    rng = np.random.default_rng(0)
    count = tokens // SEQUENCE
    ids = rng.integers(0, vocabulary, size=(count, SEQUENCE))
    select, confirm = count // 11, 2 * count // 11
    return Probe(ids[select + confirm :], ids[:select], ids[select : select + confirm], "bench")


def trace_at(path: Path, probe: Probe, device: str) -> BlockwiseTrace:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_trace(open_snapshot(ref, form, registry.family), probe, device=device)


def forward_seconds(path: Path, probe: Probe, device: str) -> float:
    """One plain forward pass over the whole probe, logits included, with every weight resident."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    ids = torch.from_numpy(np.concatenate([probe.fit, probe.select, probe.confirm])).to(device)
    with torch.no_grad():
        model(ids[:4])
        start = time.perf_counter()
        for batch in ids.split(4096 // SEQUENCE):
            model(batch)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=22_528)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    results: dict[str, Any] = {"width": options.width, "blocks": options.blocks, "device": options.device}
    with tempfile.TemporaryDirectory() as folder:
        path = model_at(Path(folder), width=options.width, blocks=options.blocks, vocabulary=4096)
        probe = probe_of(options.tokens, 4096)
        forward = forward_seconds(path, probe, options.device)
        results["forward_seconds"] = forward
        print(f"{options.blocks} blocks, width {options.width}, {options.tokens:,} tokens: forward {forward:.1f} s")
        for name, plan in PLANS.items():
            trace = trace_at(path, probe, options.device)
            start = time.perf_counter()
            findings = peel(trace, plan, time.perf_counter)
            ratio = (time.perf_counter() - start) / forward
            results[name] = {"forwards": ratio, "skipped": [entry.what for entry in findings.skipped]}
            print(f"  {name}: {ratio:.1f} forward passes", *(f"(left out: {s.what})" for s in findings.skipped))
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
