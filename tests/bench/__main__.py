"""`make bench`: what a peel costs, as ratios measured in one run, printed and written to bench.json.

The unit is one plain forward pass of the same model over the whole probe, on the same device and dtype. On shared
machines only the ratios mean anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peel_agent.peel import peel
from peel_agent.peel.chains import chain_ends, hidden_states_of
from peel_agent.peel.least_squares import Gram
from peel_agent.peel.maps import PAPER_26_BLOCKS
from peel_agent.peel.race import first_heat
from peel_agent.peel.solvers import SOLVERS
from peel_agent.peel.stopwatch import Stopwatch
from peel_agent.peel.sweep import sweep
from peel_agent.records import Plan
from tests.bench.naive import naive_chain
from tests.bench.shapes import forward_seconds, model_at, probe_of, synchronise, trace_at

VOCABULARY = 1024
MARGINS = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")
BOUNDS = Plan(frozenset({"bounds"}), (), "ends")
PLANS = {
    "quick margins (skip, affine)": Plan(frozenset({"margin"}), ("skip", "affine"), "ends"),
    "margins of all blocks and parts": MARGINS,
    "default suite of bounds": BOUNDS,
}


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def costs(device: str, *, width: int, blocks: int, tokens: int, plans: dict[str, Plan], steps: int) -> dict[str, float]:
    """Forward passes that each plan costs, for one shape."""
    with tempfile.TemporaryDirectory() as folder:
        path = model_at(Path(folder), width=width, blocks=blocks, vocabulary=VOCABULARY, steps=steps)
        probe = probe_of(tokens, VOCABULARY)
        forward = forward_seconds(path, probe, device)
        found = {"forward_seconds": forward}
        for name, plan in plans.items():
            trace = trace_at(path, probe, device)
            found[name] = seconds(lambda t=trace, p=plan: peel(t, p, time.perf_counter), device) / forward
    return found


def gram_rate(device: str, width: int) -> float:
    """Multiplications a second of Gram accumulation over those of a float32 matmul of the same size."""
    rows = torch.randn(8192, width, device=device)
    weight = torch.randn(width, width, device=device)
    gram = Gram(width, 1, intercept=False, device=rows.device)
    targets = torch.randn(8192, 1, device=device)
    times = [
        min(seconds(work, device) for _ in range(5))
        for work in (lambda: rows @ weight, lambda: gram.update(rows, targets))
    ]
    return times[0] / times[1]


def trie_against_naive(device: str) -> dict[str, float]:
    """Seconds of the naive implementation over those of the trie sweep, for the paper's eight 5-of-26 maps."""
    maps = PAPER_26_BLOCKS[:8]
    with tempfile.TemporaryDirectory() as folder:
        path = model_at(Path(folder), width=128, blocks=26, vocabulary=VOCABULARY)
        trace = trace_at(path, probe_of(11_264, VOCABULARY), device)
        solver = SOLVERS["closed_form"]

        def trie() -> None:
            rows = first_heat(trace.probe)
            stopwatch = Stopwatch(time.perf_counter)
            swept = sweep(trace, BOUNDS, rows, hidden_states_of(maps, solver), stopwatch)
            chain_ends(trace, maps, swept.hidden, solver, stopwatch)

        ours = seconds(trie, device)
        naive = seconds(lambda: [naive_chain(trace, own) for own in maps], device)
    return {"trie_seconds": ours, "naive_seconds": naive, "ratio": naive / ours}


def peak_memory(blocks: int) -> float:
    """Peak resident MiB that margins add to a process which has imported everything (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        model_at(Path(folder), width=256, blocks=blocks, vocabulary=VOCABULARY)
        command = [sys.executable, "-m", "tests.bench.memory", folder]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(finished.stdout.split()[-1])


def scaling(device: str) -> dict[str, dict[str, float]]:
    """Forward passes that margins cost, as tokens, width and depth double from one shape."""
    base = {"width": 128, "blocks": 6, "tokens": 11_264}
    found = {}
    for name, change in {
        "base": {},
        "tokens x2": {"tokens": 22_528},
        "width x2": {"width": 256},
        "depth x2": {"blocks": 12},
    }.items():
        found[name] = costs(device, **{**base, **change}, plans={"margins": MARGINS}, steps=60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=22_528)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    device = options.device
    results: dict[str, Any] = {}

    def told(name: str, value: Any) -> None:
        results[name] = value
        print(f"{name}: {json.dumps(value, default=float)}", flush=True)

    shape = {"width": options.width, "blocks": options.blocks, "tokens": options.tokens}
    told("shape", shape)
    told("cost in forward passes", costs(device, **shape, plans=PLANS, steps=60))
    told("Gram rate / matmul rate", gram_rate(device, options.width))
    told("eight 5-of-26 maps, naive / trie", trie_against_naive(device))
    if device == "cpu":
        peaks = {blocks: peak_memory(blocks) for blocks in (4, 8, 16)}
        told("peak MiB by blocks", peaks)
        told("peak memory, 16 blocks / 4 blocks", peaks[16] / peaks[4])
    told("cost of margins as a shape doubles", scaling(device))
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
