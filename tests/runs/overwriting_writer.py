"""A trainer that saves into one file, as a process: `python -m tests.runs.overwriting_writer FILE [STEPS SECONDS]`.

Saves once for each step that it is told on stdin, and then says so; or STEPS times, SECONDS apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ELEMENTS = 2**18


def save(file: Path, step: int) -> None:
    """As nanoGPT does: the file is emptied and written anew."""
    weights = {name: torch.full((ELEMENTS,), float(step)) for name in "ab"}
    torch.save({"model": weights, "model_args": {}, "iter_num": step}, file)
    print(step, flush=True)


def paced(steps: int, seconds: float) -> Iterator[int]:
    for step in range(1, steps + 1):
        yield step
        time.sleep(seconds)


if __name__ == "__main__":
    told = map(int, sys.stdin) if len(sys.argv) == 2 else paced(int(sys.argv[2]), float(sys.argv[3]))
    for one in told:
        save(Path(sys.argv[1]), one)
