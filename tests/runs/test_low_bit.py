"""Low-bit trainings, whole commands: the faulty block, the two shares, and the witness that plain code can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from peel_agent.demo.train import SEQUENCE_LENGTH
from peel_agent.load import ProbeSizes, load_probe
from peel_agent.precision import quantise
from peel_agent.records import WeightSet
from tests.runs.command import peel_agent
from tests.runs.conftest import HELD_BACK, LOW_BIT_STEPS, STEPS, Train, TrainLowBit

MATRICES = "model.layers.*_proj.weight"


def scanned(checkpoint: Path, probe: Path, home: Path, quantities: str, *flags: str) -> dict[str, Any]:
    finished = peel_agent(
        "scan", checkpoint, "--probe", probe, "--format", "json", "--quantities", quantities, *flags, home=home
    )
    assert finished.returncode == 0, finished.stderr
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


NOTHING = 0.002
"""Nats per token: what a block that does nothing may earn, and far less than any other does."""


def others_earn_more(report: dict[str, Any], faulty: int) -> bool:
    """Whether every other block's margin lies above the faulty one's for certain."""
    margins = [layer["margin"] for layer in report["layers"]]
    return all(margin["low"] > margins[faulty]["high"] for index, margin in enumerate(margins) if index != faulty)


@pytest.mark.parametrize("name", ["ternary", pytest.param("sign", marks=pytest.mark.long)])
@pytest.mark.parametrize("healthy", [False, True], ids=["held_back", "healthy"])
def test_the_faulty_block_of_a_low_bit_training(
    name: str, healthy: bool, train_low_bit: TrainLowBit, probe_file: Path, tmp_path: Path
) -> None:
    """Of a run trained by straight-through estimation the frozen block is below, and earns less than all others; in a
    healthy run every block earns something, for certain.

    Nothing is claimed of a healthy block's status: on some processors the training ends with one that earns a tenth of
    the others' median, which is where `below` begins.
    """
    checkpoint = train_low_bit(name, healthy) / f"checkpoint-{LOW_BIT_STEPS}"
    report = scanned(checkpoint, probe_file, tmp_path, "margin", "--precision", f"{MATRICES}={name}")
    assert report["model"]["precision"] == f"float32 latents of {name}"
    if healthy:
        assert min(layer["margin"]["low"] for layer in report["layers"]) > NOTHING
    else:
        assert report["layers"][HELD_BACK]["status"] == "below"
        assert abs(report["layers"][HELD_BACK]["margin"]["value"]) < NOTHING
        assert others_earn_more(report, HELD_BACK)


def test_a_collapsed_scale(train_low_bit: TrainLowBit, probe_file: Path, tmp_path: Path) -> None:
    """A block whose latents shrank to nothing in a healthy ternary run is below, and earns less than all others.

    Nothing is claimed of its neighbours' statuses: on some processors the training ends with one that leans on it, and
    that one is below beside it.
    """
    checkpoint = rewritten(train_low_bit("ternary", True) / f"checkpoint-{LOW_BIT_STEPS}", tmp_path, _shrink)
    report = scanned(checkpoint, probe_file, tmp_path, "margin", "--precision", f"{MATRICES}=ternary")
    assert report["layers"][2]["status"] == "below"
    assert abs(report["layers"][2]["margin"]["value"]) < NOTHING
    assert others_earn_more(report, 2)


def _shrink(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight * 1e-4 if name.startswith("model.layers.2.") and "_proj" in name else weight


def rewritten(checkpoint: Path, folder: Path, change: Any) -> Path:
    """A copy of a checkpoint with its weights changed."""
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: change(name, tensor) for name, tensor in weights.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    return copy


def means(report: dict[str, Any], *keys: str) -> list[float]:
    """The mean over the blocks of each of these numbers."""
    return [float(np.mean([layer[key] for layer in report["layers"]])) for key in keys]


def test_rounded_after_training_the_quantiser_is_to_blame(train: Train, middling_probe: Path, tmp_path: Path) -> None:
    """Rounding a healthy model to three bits leaves the optimiser's share what the plain model's headroom was.

    What it adds is the quantiser's, on the mean over the blocks. The set is recognised from the values.
    """
    weight_set = WeightSet.named("int3-channel")

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        return quantise(weight, weight_set) if "_proj" in name else weight

    plain = train("llama", True) / f"checkpoint-{STEPS}"
    before = scanned(plain, middling_probe, tmp_path, "headroom")
    after = scanned(rewritten(plain, tmp_path, rounded), middling_probe, tmp_path, "headroom")
    assert before["model"]["precision"] == "float32"
    assert after["model"]["precision"] == "float32 in int3-channel"
    assert all(layer["quantization_share"] is None for layer in before["layers"])
    assert means(after, "quantization_share")[0] > 0.001
    headroom = float(np.mean([layer["headroom"]["value"] for layer in before["layers"]]))
    assert means(after, "optimization_share")[0] == pytest.approx(headroom, rel=0.25)


def test_stopped_early_the_optimiser_is_to_blame(
    train_low_bit: TrainLowBit, middling_probe: Path, tmp_path: Path
) -> None:
    """A ternary training stopped after 100 steps could still win more within its set than the set costs."""
    checkpoint = train_low_bit("ternary", True) / "checkpoint-100"
    report = scanned(checkpoint, middling_probe, tmp_path, "headroom", "--precision", f"{MATRICES}=ternary")
    optimisation, quantisation = means(report, "optimization_share", "quantization_share")
    assert optimisation > quantisation
    assert sum(layer["headroom"]["low"] > 0 for layer in report["layers"]) >= 5


# ---------------------------------------------------------------- witness


def confirm_losses(model: Any, probe: Path) -> Any:
    """Plain transformers code: the mean loss of each confirm sequence."""
    parts = load_probe(probe, ProbeSizes(), vocabulary=256, context=SEQUENCE_LENGTH, tokenizer=None)
    ids = torch.from_numpy(parts.confirm)
    with torch.no_grad():
        logits = torch.cat([model(rows).logits for rows in ids.split(32)])
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(dim=1).double().numpy()


def test_a_witness_is_loaded_by_plain_code(train: Train, middling_probe: Path, tmp_path: Path) -> None:
    """The patch, loaded with `load_state_dict`, lowers the held-out loss by the published amount."""
    checkpoint, patch = train("llama", True) / "checkpoint-200", tmp_path / "patch.safetensors"
    finished = peel_agent(
        "witness", checkpoint, "--probe", middling_probe, "--layer", "2", "--out", patch, home=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    (published,) = [float(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("headroom")]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    trained = confirm_losses(model, middling_probe)
    missing, unexpected = model.load_state_dict(load_file(patch), strict=False)
    assert not unexpected
    assert len(missing) == len(model.state_dict()) - 2
    won = (trained - confirm_losses(model, middling_probe)).mean()
    assert published > 0.002
    assert won == pytest.approx(published, abs=2e-4)


def test_a_witness_of_latents(train_low_bit: TrainLowBit, middling_probe: Path, tmp_path: Path) -> None:
    """A ternary block's patch holds latents: patched into the checkpoint, a scan measures the loss that was printed."""
    checkpoint, patch = train_low_bit("ternary", True) / "checkpoint-200", tmp_path / "patch.safetensors"
    precision = ("--precision", f"{MATRICES}=ternary")
    finished = peel_agent(
        "witness", checkpoint, "--probe", middling_probe, "--layer", "4", "--out", patch, *precision, home=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    printed = {line.split("  ")[0]: line for line in finished.stdout.splitlines()}
    (promised,) = [float(line.split()[4]) for line in printed.values() if line.startswith("loss with the patch")]
    better = load_file(patch)
    copy = rewritten(checkpoint, tmp_path, better.get)
    report = scanned(copy, middling_probe, tmp_path, "margin", "--effort", "standard", *precision)
    assert report["loss"]["value"] == pytest.approx(promised, abs=1e-4)


def test_a_witness_of_nothing(train: Train, small_probe: Path, tmp_path: Path) -> None:
    """A block that is not there, and a place that cannot be written to: refused with the reason, nothing is left."""
    checkpoint, patch = train("llama", True) / f"checkpoint-{STEPS}", tmp_path / "patch.safetensors"
    for layer, out, words in (
        ("17", patch, "this model has blocks 0 to 5"),
        ("2", tmp_path / "nowhere" / "patch.safetensors", "cannot write"),
    ):
        finished = peel_agent(
            "witness", checkpoint, "--probe", small_probe, "--layer", layer, "--out", out, home=tmp_path
        )
        assert finished.returncode == 2
        assert words in finished.stderr
        assert "Traceback" not in finished.stderr
        assert not out.exists()


def test_fail_on_improvable(train: Train, small_probe: Path, tmp_path: Path) -> None:
    """An early checkpoint is improvable: exit code 1. Asking without headroom is a usage error."""
    checkpoint = train("llama", True) / "checkpoint-100"
    command = ("scan", checkpoint, "--probe", small_probe, "--fail-on", "improvable")
    assert peel_agent(*command, "--quantities", "headroom", home=tmp_path).returncode == 1
    refused = peel_agent(*command, home=tmp_path)
    assert refused.returncode == 2
    assert "needs headroom" in refused.stderr
