"""The product's claim, on real trainings: the block that never learned is found, and no other that learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs.command import peel_agent
from tests.runs.conftest import HELD_BACK, STEPS, Train
from tests.runs.test_low_bit import NOTHING, others_earn_more


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
@pytest.mark.parametrize("healthy", [False, True], ids=["held_back", "healthy"])
def test_scan_names_the_held_back_block(
    kind: str, healthy: bool, train: Train, probe_file: Path, tmp_path: Path
) -> None:
    """`scan --format json` has the frozen block `below`, and no other is as surely idle.

    Trained whole, every block of the Llama earns something, for certain, and beside a frozen one each earns more than
    that. The GPT-2 learns more slowly: after as many steps it may have a block that earns hardly anything yet. In
    either model one healthy block may be near a tenth of the others' median, where `below` begins, and on the other
    side of it on another processor; never two. The exit code tells whether anything was found.
    """
    checkpoint = train(kind, healthy) / f"checkpoint-{STEPS}"
    finished = peel_agent(
        "scan", checkpoint, "--probe", probe_file, "--format", "json", "--quantities", "margin",
        "--fail-on", "below", home=tmp_path,
    )  # fmt: skip
    report = json.loads(finished.stdout)
    below = {layer["index"] for layer in report["layers"] if layer["status"] == "below"}
    faulty = set() if healthy else {HELD_BACK}
    assert faulty <= below, finished.stdout
    assert len(below - faulty) <= 1, finished.stdout
    margins = [layer["margin"] for layer in report["layers"]]
    if not healthy:
        highest = [margin["high"] for margin in margins]
        assert highest.index(min(highest)) == HELD_BACK, finished.stdout
        assert report["layers"][HELD_BACK]["finding"]["kind"] == "below"
    if kind == "llama":
        trained = [margin for index, margin in enumerate(margins) if index not in faulty]
        assert min(margin["low"] for margin in trained) > NOTHING, finished.stdout
    assert finished.returncode == any(part["finding"] is not None for part in (report, *report["layers"]))
    assert report["model"]["blocks"] == 6
    assert report["checkpoint"]["step"] == STEPS


def test_quick_effort_finds_it_too(train: Train, probe_file: Path, tmp_path: Path) -> None:
    """With `skip` and `affine` alone, on a few thousand tokens, the frozen block is below, and all others earn more."""
    checkpoint = train("llama", False) / f"checkpoint-{STEPS}"
    finished = peel_agent(
        "scan", checkpoint, "--probe", probe_file, "--format", "json", "--effort", "quick", home=tmp_path
    )
    report = json.loads(finished.stdout)
    assert report["layers"][HELD_BACK]["status"] == "below"
    assert others_earn_more(report, HELD_BACK)
    assert sum(report["probe"][part] for part in ("fit_tokens", "select_tokens", "confirm_tokens")) < 10_000
    assert set(report["layers"][1]["references"]) == {"skip", "affine"}


def test_the_loss_curve_shows_nothing(train: Train) -> None:
    """The training losses at the end differ by less than 5 %: the curve alone would not tell."""
    losses = []
    for healthy in (False, True):
        state = json.loads((train("llama", healthy) / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry][-5:])
    held_back, whole = (sum(curve) / len(curve) for curve in losses)
    assert abs(held_back / whole - 1) < 0.05
