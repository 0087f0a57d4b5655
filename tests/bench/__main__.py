"""`make bench`: what a peel costs, as ratios measured in one run, printed beside those of costs.json, and written to
bench.json.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peel_agent.peel import peel
from peel_agent.peel.bounds.chains import chain_ends, hidden_states_of
from peel_agent.peel.bounds.maps import PAPER_26_BLOCKS
from peel_agent.peel.bounds.solvers import SOLVERS
from peel_agent.peel.numerics.least_squares import Gram
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.sweep.forward import sweep
from peel_agent.peel.sweep.heats import nowhere
from peel_agent.pipeline import scan
from peel_agent.records import PeelSettings, Plan, Probe, ProbeSettings
from tests.bench import device as device_bench
from tests.bench.naive import naive_chain
from tests.bench.shapes import (
    Shape,
    compared,
    earning,
    forward_seconds,
    idle,
    step_back,
    synchronise,
    trace_at,
)
from tests.bench.stored import over_stored

STORED = Path(__file__).with_name("costs.json")
MARGINS = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends", passes=PeelSettings().budget_passes)
HEADROOM = Plan(frozenset({"headroom"}), (), "ends")
REDUNDANCY = Plan(frozenset({"redundancy"}), (), "ends")
BOUNDS = Plan(frozenset({"bounds"}), (), "ends")
WIDTH = 256
"""Ratios hardly hang on it, and the time does: twice the width takes four times as long."""
SMALL = Shape(width=128, blocks=6, tokens=45_056)


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def peel_seconds(path: Path, probe: Probe, plan: Plan, device: str) -> float:
    return seconds(lambda: peel(trace_at(path, probe, device), plan, time.perf_counter), device)


def costs(device: str, shape: Shape, plans: dict[str, Plan]) -> dict[str, float]:
    """Forward passes that each plan costs when every block earns, and margins when none does."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        probe = earning(path, shape, device)
        forward = found["forward_seconds"] = forward_seconds(path, probe, device)
        for name, plan in plans.items():
            found[name] = peel_seconds(path, probe, plan, device) / forward
    return found


def comparison_costs(device: str, shape: Shape) -> dict[str, float]:
    """Forward passes that margins cost without and with the checkpoint before at hand, measured in turns."""
    with tempfile.TemporaryDirectory() as folder:
        now, before = Path(folder) / "now", Path(folder) / "before"
        probe = earning(now, shape, device)
        step_back(now, before)
        forward = forward_seconds(now, probe, device)

        def beside() -> None:
            compared(now, before, probe, MARGINS, device)

        alone = [peel_seconds(now, probe, MARGINS, device), seconds(beside, device)]
        again = [peel_seconds(now, probe, MARGINS, device), seconds(beside, device)]
    without, with_past = (min(one, other) / forward for one, other in zip(alone, again, strict=True))
    return {"margins": without, "with change and progress": with_past, "what they add": with_past - without}


def worst_case(device: str, shape: Shape) -> float:
    """Forward passes that margins cost when every one of them stays open."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        probe = idle(path, shape)
        return peel_seconds(path, probe, MARGINS, device) / forward_seconds(path, probe, device)


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


def trie_against_naive(device: str, counts: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, Any]:
    """The trie sweep beside the naive implementation for the paper's 5-of-26 maps, and its cost by number of maps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        probe = earning(path, Shape(width=128, blocks=26, tokens=11_264), device)
        trace = trace_at(path, probe, device)
        solver = SOLVERS["closed_form"]

        def trie(count: int) -> None:
            maps = PAPER_26_BLOCKS[:count]
            stopwatch = Stopwatch(time.perf_counter)
            swept = sweep(trace, BOUNDS, nowhere(trace), hidden_states_of(maps, solver), stopwatch)
            chain_ends(trace, maps, swept.hidden, solver, stopwatch)

        forward = forward_seconds(path, probe, device)
        ours = {count: min(seconds(partial(trie, count), device) for _ in range(2)) for count in counts}
        naive = min(
            seconds(lambda: [naive_chain(trace, target_map) for target_map in PAPER_26_BLOCKS[: counts[-1]]], device)
            for _ in range(2)
        )
    return {
        "naive / trie": naive / ours[counts[-1]],
        "forward passes by maps": {count: spent / forward for count, spent in ours.items()},
    }


def peak_memory(blocks: int) -> float:
    """Peak resident MiB that margins add to a process which has imported everything (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        probe = earning(path, Shape(width=256, blocks=blocks, tokens=22_528), "cpu")
        np.savez(path / "probe.npz", fit=probe.fit, select=probe.select, confirm=probe.confirm)
        command = [sys.executable, "-m", "tests.bench.memory", folder]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(finished.stdout.split()[-1])


def quick(device: str, shape: Shape) -> dict[str, float]:
    """What `scan --effort quick` costs, load included, in tokens' worth of plain forward passes of the same model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        probe = earning(path, replace(shape, tokens=11_264), device)
        ids = np.concatenate([probe.fit, probe.select, probe.confirm])
        np.save(path / "probe.npy", ids)
        a_token = forward_seconds(path, probe, device) / ids.size
        spent = seconds(
            lambda: scan(
                path,
                probe=ProbeSettings(path=path / "probe.npy"),
                peeling=PeelSettings(effort="quick"),
                device=device,
                clock=time.perf_counter,
            ),
            device,
        )
        parameters = sum(parameter.numel() for parameter in shape.model().parameters())
    return {"parameters": parameters, "seconds": spent, "tokens' worth": spent / a_token}


def by_stage(device: str, shape: Shape) -> dict[str, float]:
    """Counted forward passes of each stage of margins, when every block earns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        probe = earning(path, shape, device)
        return dict(peel(trace_at(path, probe, device), MARGINS, time.perf_counter).work)


def scaling(device: str) -> dict[str, Any]:
    """Forward passes that margins cost, and headroom over margins, as tokens, width and depth double from one shape."""
    shapes = {
        "base": SMALL,
        "tokens x2": replace(SMALL, tokens=2 * SMALL.tokens),
        "width x2": replace(SMALL, width=2 * SMALL.width),
        "depth x2": replace(SMALL, blocks=2 * SMALL.blocks),
    }
    found = {name: costs(device, shape, {"margins": MARGINS, "headroom": HEADROOM}) for name, shape in shapes.items()}
    return {
        name: {"margins": spent["margins"], "headroom / margins": spent["headroom"] / spent["margins"]}
        for name, spent in found.items()
    }


def is_of_a_device(arguments: Sequence[str]) -> bool:
    """Whether a GPU or models of given sizes are named, and not the ratios: then seconds are measured."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes")
    parser.add_argument("--ratios", action="store_true")
    options, _ = parser.parse_known_args(arguments)
    return not options.ratios and (options.shapes is not None or options.device != "cpu")


def main() -> None:
    if is_of_a_device(sys.argv[1:]):
        device_bench.main(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="without --ratios a GPU is measured by tests/bench/device.py")
    parser.add_argument("--ratios", action="store_true", help="these ratios on a GPU (cuda:N) too")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--blocks", type=int, default=Shape.blocks)
    parser.add_argument("--tokens", type=int, default=Shape.tokens)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--write", action="store_true", help=f"keep them in {STORED.name}, to compare with later")
    options = parser.parse_args()
    shape = Shape(width=options.width, blocks=options.blocks, tokens=options.tokens)
    results = ratios(options.device, shape)
    for file in (options.out, *([STORED] if options.write else [])):
        file.write_text(json.dumps(results, indent=2) + "\n")


def ratios(device: str, shape: Shape) -> dict[str, Any]:
    """All of it, told as it comes, beside what is stored of the same shape and device."""
    results: dict[str, Any] = {}
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    of_this = asdict(shape) | {"device": device}
    if stored.get("shape") != of_this:
        stored = {}

    def told(name: str, value: Any) -> None:
        results[name] = value
        print(f"{name}: {json.dumps(value, default=float)}", flush=True)
        beside = over_stored(value, stored.get(name))
        if beside is not None:
            print(f"    over those stored: {json.dumps(beside)}", flush=True)

    told("shape", of_this)
    told("Gram rate / matmul rate", gram_rate(device, shape.width))
    plans = {
        "margins of all blocks and parts": MARGINS,
        "default suite of bounds": BOUNDS,
        "headroom of all blocks and parts": HEADROOM,
        "redundancy": REDUNDANCY,
    }
    told("forward passes, every block earning", costs(device, shape, plans))
    told("forward passes of margins by stage, counted", by_stage(device, shape))
    told("forward passes, with the checkpoint before", comparison_costs(device, shape))
    idle_shape = replace(SMALL, blocks=shape.blocks, tokens=shape.tokens)
    told("forward passes for margins, no block earning", worst_case(device, idle_shape))
    told("the paper's 5-of-26 maps", trie_against_naive(device))
    if device == "cpu":
        peaks = {blocks: peak_memory(blocks) for blocks in (4, 8, 16)}
        told("peak MiB by blocks", peaks)
        told("peak memory, 16 blocks / 4 blocks", peaks[16] / peaks[4])
    told("quick effort, 124 M parameters", quick(device, Shape(width=768, blocks=12, vocabulary=16_384)))
    told("forward passes for margins, and headroom, as a shape doubles", scaling(device))
    return results


if __name__ == "__main__":
    main()
