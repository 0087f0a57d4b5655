"""Real trainings, each a process of its own, shared by the tests of a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from peel_agent.demo.text import corpus
from tests import servers

mlflow_uri = servers.mlflow_uri

STEPS = 500
HELD_BACK = 3

LOW_BIT_STEPS = 400

Train = Callable[[str, bool], Path]
TrainLowBit = Callable[[str, bool], Path]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(kind, healthy): the output directory of a 6-block model trained for 500 steps by transformers' Trainer."""

    @cache
    def run(kind: str, healthy: bool) -> Path:
        return _trained(tmp_path_factory, f"{kind}-{healthy}", STEPS, healthy, "--kind", kind)

    return run


@pytest.fixture(scope="session")
def train_low_bit(tmp_path_factory: pytest.TempPathFactory) -> TrainLowBit:
    """train_low_bit(set, healthy): a Llama whose blocks are quantised in every forward pass, its latents saved."""

    @cache
    def run(name: str, healthy: bool) -> Path:
        return _trained(tmp_path_factory, f"{name}-{healthy}", LOW_BIT_STEPS, healthy, "--bits", name)

    return run


def _trained(factory: pytest.TempPathFactory, name: str, steps: int, healthy: bool, *flags: str) -> Path:
    """The output of one training, which the first process of a test run that needs it does for all."""
    shared = factory.getbasetemp()
    output = (shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared) / "trainings" / name
    with FileLock(f"{output.parent.parent / name}.lock"):
        if output.is_dir():
            return output
        making = output.with_name(f"{name}.part")
        train_on(making, steps, *flags, *([] if healthy else ["--hold-back", str(HELD_BACK)]))
        making.rename(output)
    return output


def train_on(output: Path, steps: int, *flags: str) -> None:
    """Trains to this step, from the last checkpoint that is there, as a process of its own."""
    command = [sys.executable, "-m", "peel_agent.demo.train", str(output), *flags]
    command += ["--steps", str(steps), "--save-every", "100"]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="session")
def probe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of the files that no training has seen."""
    path = tmp_path_factory.mktemp("probe") / "probe.npy"
    np.save(path, corpus()[1])
    return path


@pytest.fixture(scope="session")
def small_probe(tmp_path_factory: pytest.TempPathFactory, probe_file: Path) -> Path:
    """A part of the same, for tests whose claim is not about a block."""
    path = tmp_path_factory.mktemp("probe") / "small.npy"
    np.save(path, np.load(probe_file)[:12_000])
    return path


@pytest.fixture(scope="session")
def middling_probe(tmp_path_factory: pytest.TempPathFactory, probe_file: Path) -> Path:
    """More of the same, about half: enough for small margins and for headroom."""
    path = tmp_path_factory.mktemp("probe") / "middling.npy"
    np.save(path, np.load(probe_file)[:36_000])
    return path
