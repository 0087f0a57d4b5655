"""A fully connected network, whole commands: its YES bounds by `scan` and by `watch`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from peel_agent.load import ProbeSizes, load_samples
from tests.oracles import feedforward as oracle
from tests.runs.command import peel_agent

STEPS = (50, 1500)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of a digits classifier after some steps, and samples it was not trained on."""
    folder = tmp_path_factory.mktemp("digits")
    inputs, classes = load_digits(return_X_y=True)
    inputs, targets = (inputs / 16).astype(np.float32), np.eye(10, dtype=np.float32)[classes]
    save_numpy({"inputs": inputs[700:], "targets": targets[700:]}, folder / "probe.safetensors")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    X, Y = torch.from_numpy(inputs[:700]), torch.from_numpy(targets[:700])
    for step in range(1, max(STEPS) + 1):
        optimiser.zero_grad()
        (model(X) - Y).square().sum(dim=1).mean().backward()
        optimiser.step()
        if step in STEPS:
            path = folder / "run" / f"step_{step}"
            path.mkdir(parents=True)
            save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
            (path / "config.json").write_text(json.dumps({"model_type": "mlp"}))
    return folder


def test_scan_tells_the_zones(run: Path, tmp_path: Path) -> None:
    """After a few steps the network is worse than YES-0 (red), after many better than every construction (green)."""
    zones = []
    for step in STEPS:
        finished = peel_agent(
            "scan",
            run / "run" / f"step_{step}",
            "--probe",
            run / "probe.safetensors",
            "--format",
            "json",
            home=tmp_path,
        )
        assert finished.returncode == 0, finished.stderr
        report = json.loads(finished.stdout)
        zones.append(report["zone"])
        assert [bound["label"] for bound in report["bounds"]] == ["yes-0", "yes-1", "yes-2"]
        model = {"family": "mlp", "blocks": 3, "parameters": 3466, "precision": "float32", "vocabulary": None}
        assert report["model"] == model
    assert zones == ["ineffective", "effective"]


def test_watch_keeps_the_running_minimum(run: Path, tmp_path: Path) -> None:
    """`watch --once` reports every checkpoint; YES-0, which knows no training, is the same in each."""
    watched = tmp_path / "run"
    shutil.copytree(run / "run", watched)
    finished = peel_agent(
        "watch", watched, "--probe", run / "probe.safetensors", "--once", "--json", home=tmp_path,
        PEEL__TRACKER__USE="['jsonl']", PEEL__WATCH__SETTLE_SECONDS="0",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    first, last = (json.loads(line) for line in finished.stdout.splitlines())
    assert (first["checkpoint"]["step"], last["checkpoint"]["step"]) == STEPS
    assert first["bounds"][0]["value"] == pytest.approx(last["bounds"][0]["value"])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"inputs": np.zeros((9, 64), np.float32), "targets": np.zeros((9, 10), np.float32)},
            "too few for an interval",
        ),
        ({"inputs": np.zeros((900, 64), np.float32)}, "`inputs` [samples, n] and `targets` [samples, m]"),
        (
            {"inputs": np.zeros((900, 5), np.float32), "targets": np.zeros((900, 10), np.float32)},
            "maps 64 inputs to 10",
        ),
    ],
)
def test_samples_that_do_not_suit(run: Path, tmp_path: Path, tensors: dict[str, np.ndarray], words: str) -> None:
    """Too few samples, a missing tensor, another width: named, with what is needed, exit code 2."""
    save_numpy(tensors, tmp_path / "bad.safetensors")
    finished = peel_agent("scan", run / "run" / "step_50", "--probe", tmp_path / "bad.safetensors", home=tmp_path)
    assert finished.returncode == 2
    assert words in finished.stderr


def test_what_scan_prints_is_the_oracle_s(run: Path, tmp_path: Path) -> None:
    """Loss and every YES-k of the command are the straight re-implementation's, on the same split."""
    samples = load_samples(run / "probe.safetensors", ProbeSizes())
    state = load_file(run / "run" / "step_1500" / "model.safetensors")
    layers = [(state[f"{n}.weight"].double().numpy(), state[f"{n}.bias"].double().numpy()) for n in (0, 2, 4)]
    parts = {name: (part.X.numpy(), part.Y.numpy()) for name, part in vars(samples).items() if name != "fingerprint"}
    finished = peel_agent(
        "scan", run / "run" / "step_1500", "--probe", run / "probe.safetensors", "--format", "json", home=tmp_path
    )
    report = json.loads(finished.stdout)
    assert report["loss"]["value"] == pytest.approx(oracle.losses(layers, *parts["confirm"]).mean(), rel=1e-6)
    theirs = oracle.yes(layers, parts["fit"], parts["select"], parts["confirm"], "full")
    for bound, (waypoints, _, losses) in zip(report["bounds"], theirs, strict=True):
        assert tuple(bound["map"]) == waypoints
        assert bound["value"]["value"] == pytest.approx(losses.mean(), rel=1e-5)
