"""The model never has to fit into memory (method.md 8): its blocks are read one by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.bench.shapes import Shape, idle


def test_a_checkpoint_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    """Margins of a 72-block model add less than half of its weights' size to the process."""
    shape = Shape(width=256, blocks=72, tokens=22 * 64, vocabulary=128)
    probe = idle(tmp_path, shape)
    probe = type(probe)(probe.fit[:, :16], probe.select[:, :16], probe.confirm[:, :16], "small")
    np.savez(tmp_path / "probe.npz", fit=probe.fit, select=probe.select, confirm=probe.confirm)
    command = [sys.executable, "-m", "tests.bench.memory", str(tmp_path)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    weights = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert weights > 280
    assert float(finished.stdout.split()[-1]) < weights / 2
