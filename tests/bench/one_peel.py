"""What a bench of a device does in a process of its own, so that memory and the device are given back.

`python -m tests.bench.one_peel CHECKPOINT DEVICE` peels it on probe.npy, two folders above, and prints seconds and peak
memory as JSON; with `--profile` the time in kernels, and in which.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from peel_agent.pipeline import scan
from peel_agent.records import PeelReport, PeelSettings, ProbeSettings
from tests.bench.random_llama import probe_of
from tests.bench.shapes import peak, synchronise

NO_KERNELS = ("Memcpy", "Memset")
"""What the profiler calls copies on a GPU, which are no kernels."""

LONGEST, NAME = 8, 60
"""So many kernels are named, by so many letters."""


def peeled(checkpoint: Path, device: str, effort: str) -> tuple[PeelReport, float]:
    """The report, and the seconds that it took."""
    start = time.perf_counter()
    report = scan(
        checkpoint,
        probe=ProbeSettings(path=probe_of(checkpoint)),
        peeling=PeelSettings(effort=effort),
        device=device,
        clock=time.perf_counter,
    )
    synchronise(device)
    return report, time.perf_counter() - start


def measure(checkpoint: Path, device: str, effort: str) -> dict[str, Any]:
    """Seconds by stage and the peak: on a GPU what torch allocated there, on the CPU what the process held."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew: exec hands the parent's on
    report, seconds = peeled(checkpoint, device, effort)
    bytes_ = peak() * 2**20 if device == "cpu" else float(torch.cuda.max_memory_allocated(device))
    return {
        "on": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "seconds": seconds,
        "timing": asdict(report.timing),
        "peak GB": bytes_ / 1e9,
        "blocks": Counter(layer.status for layer in report.layers),
        "left out": [left.what for left in report.skipped],
    }


def profiled(checkpoint: Path, device: str, effort: str) -> dict[str, Any]:
    """Seconds in kernels and copies beside those on the wall; on the CPU those in torch's operators."""
    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        _, seconds = peeled(checkpoint, device, effort)
    kernels = copies = 0.0
    by_kernel: Counter[str] = Counter()
    for event in profiler.key_averages():
        taken = (event.self_cpu_time_total if device == "cpu" else event.self_device_time_total) / 1e6
        if event.key.startswith(NO_KERNELS):
            copies += taken
        else:
            kernels += taken
            by_kernel[event.key[:NAME]] += taken
    return {
        "wall": seconds,
        "kernels": kernels,
        "copies": copies,
        "kernels / wall": kernels / seconds,
        "longest": dict(by_kernel.most_common(LONGEST)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("device")
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    work = profiled if options.profile else measure
    print(json.dumps(work(options.checkpoint, options.device, options.effort)))


if __name__ == "__main__":
    main()
