"""An agent that watches for a long time: does anything grow?

`python -m tests.bench.soak` has one agent take 2,000 checkpoints (about twenty minutes), each written, peeled by an
engine that answers at once, sent by the real courier, and rotated away. Prints the resident memory, open files, threads
and the size of the ledger as they go, and their slopes; exit 1 when one is steeper than its bound.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.sidecar import Sidecar

BOUNDS = {
    "resident KiB": 2.0,
    "open files": 0.001,
    "threads": 0.001,
    "ledger KiB": 1.5,
}
"""A checkpoint may add at most so much in the second half: until a thousand were seen, what formats remember of files
grows. A row of the ledger, about half a KiB, stays for each."""

KEPT = 3
"""Checkpoints that the trainer leaves there."""


def soak(folder: Path, checkpoints: int, every: int) -> list[tuple[int, dict[str, float]]]:
    """The figures after each `every` checkpoints."""
    sidecar = Sidecar(folder, '[tracker]\nuse = ["jsonl"]\n')
    figures = []
    written = 0
    with sidecar.running():
        assert sidecar.process is not None
        agent = psutil.Process(sidecar.process.pid)
        done = 0
        while done < checkpoints:
            while written < min(done + KEPT, checkpoints):
                written += 1
                write_checkpoint(sidecar.root / f"checkpoint-{written}", written)
            time.sleep(0.2)
            rows = sidecar.read("SELECT count(*) FROM checkpoints WHERE outcome = 'peeled'")
            before, done = done, int(rows[0][0]) if rows else 0
            for step in range(max(1, before - KEPT), max(1, done - KEPT)):
                shutil.rmtree(sidecar.root / f"checkpoint-{step}", ignore_errors=True)
            if done // every > before // every:
                figures.append((done, _figures(agent, sidecar.state)))
                print(done, {name: round(value, 1) for name, value in figures[-1][1].items()}, flush=True)
    return figures


def _figures(agent: psutil.Process, state: Path) -> dict[str, float]:
    return {
        "resident KiB": agent.memory_info().rss / 1024,
        "open files": float(agent.num_fds()),
        "threads": float(agent.num_threads()),
        "ledger KiB": sum(file.stat().st_size for file in state.glob("ledger.sqlite*")) / 1024,
    }


def slopes(figures: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """What each checkpoint adds, by least squares over the second half."""
    later = figures[len(figures) // 2 :]
    counts = np.array([count for count, _ in later], dtype=float)
    return {name: float(np.polyfit(counts, [own[name] for _, own in later], 1)[0]) for name in BOUNDS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        figures = soak(Path(name), options.checkpoints, max(10, options.checkpoints // 40))
    steep = 0
    for name, slope in slopes(figures).items():
        holds = abs(slope) <= BOUNDS[name] or slope < 0
        steep += not holds
        print(f"{name}: {slope:+.4f} a checkpoint (bound {BOUNDS[name]}): {'flat' if holds else 'GROWS'}")
    return int(bool(steep))


if __name__ == "__main__":
    sys.exit(main())
