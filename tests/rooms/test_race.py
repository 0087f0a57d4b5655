"""The race of margins: what is decided early would be decided the same way, and what is open is measured in full."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peel_agent.peel.race import first_heat, race, still_open
from peel_agent.peel.splices import Variant
from peel_agent.peel.stopwatch import Stopwatch
from peel_agent.peel.sweep import carry
from tests import zoo

race_module = importlib.import_module("peel_agent.peel.race")  # the package exports the function of that name
REFERENCES = ("skip", "affine", "previous")


def raced(trace: Any) -> Any:
    return race(trace, REFERENCES, frozenset(), Stopwatch(itertools.count().__next__))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny trained model with a probe large enough for a first heat."""
    path = zoo.save(zoo.build("llama", steps=200), tmp_path_factory.mktemp("race"))
    return zoo.trace_of(path, zoo.probe(fit=80, select=40, confirm=160))


@pytest.mark.parametrize(("select", "confirm", "heat"), [(40, 160, 40), (10, 20, 8), (10, 16, 8), (10, 15, 15)])
def test_the_first_heat_takes_a_part_of_confirm(select: int, confirm: int, heat: int) -> None:
    """All of select and a quarter of confirm, never fewer than eight, and everything when little would be spared."""
    assert first_heat(zoo.probe(select=select, confirm=confirm)).tolist() == list(range(select + heat))


def test_open_places_are_measured_in_full(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open block's margin is what the full measurement gives; a decided one keeps the heat's."""
    _, margins = raced(trace)
    with monkeypatch.context() as patched:
        patched.setattr(race_module, "HEAT_FRACTION", 1)
        full_sweep, full = raced(trace)
    assert len(full_sweep.variants[Variant(1, "block", "skip")]) == 200
    with monkeypatch.context() as patched:
        patched.setattr(race_module, "_second_heat", lambda *_: {})
        _, heat = raced(trace)
    opened = still_open(heat, zoo.BLOCKS)
    assert opened
    for place, own in margins.items():
        if place in opened:
            assert own.best == full[place].best
            assert own.estimate.value == pytest.approx(full[place].estimate.value, abs=1e-6)
            assert own.estimate.low == pytest.approx(full[place].estimate.low, abs=1e-6)
        else:
            assert own == heat[place]


def test_carrying_again_gives_the_same_losses(trace: Any) -> None:
    """A solved reference, carried a second time over the same sequences, has the same losses."""
    rows = first_heat(trace.probe)
    swept, _ = raced(trace)
    chosen = {variant: swept.solved[variant] for variant in list(swept.variants)[::3]}
    again = carry(trace, chosen, rows, Stopwatch(itertools.count().__next__))
    for variant, losses in again.items():
        np.testing.assert_allclose(losses, swept.variants[variant], atol=1e-5)


def test_decisions_are_those_of_the_full_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a silenced block, race and full measurement agree on which blocks are decided and how."""
    from peel_agent.peel.margins import of_target, statuses

    model = zoo.build("llama", steps=200)
    for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    trace = zoo.trace_of(zoo.save(model, tmp_path), zoo.probe(fit=80, select=40, confirm=160))
    _, margins = raced(trace)
    monkeypatch.setattr(race_module, "HEAT_FRACTION", 1)
    _, full = raced(trace)
    short, whole = (statuses(of_target(own, "block", zoo.BLOCKS)) for own in (margins, full))
    assert short[2] == whole[2] == "below"
    assert all(one == other for one, other in zip(short, whole, strict=True) if "undecided" not in (one, other))
