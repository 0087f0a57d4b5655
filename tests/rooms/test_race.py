"""The race of margins: what is cleared early is clear in full, and what is open is measured in full."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peel_agent.peel.margins.margin import of_target, statuses
from peel_agent.peel.margins.race import contenders, first_heat, race, still_open
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.sweep.forward import carry, sweep
from peel_agent.peel.sweep.splices import Variant
from peel_agent.records import Plan
from tests import zoo

race_module = importlib.import_module("peel_agent.peel.margins.race")  # the package exports the function of that name
tails_module = importlib.import_module("peel_agent.peel.sweep.forward")
PLAN = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")


def watch() -> Stopwatch:
    return Stopwatch(itertools.count().__next__)


def raced(trace: Any) -> Any:
    """The sweep and the margins; there is no checkpoint before, and so no progress."""
    found = race(trace, PLAN, frozenset(), watch())
    assert found.progress == found.swept.progress == {}
    return found.swept, found.margins


def first_swept(trace: Any) -> Any:
    """What the race knows after its first heat."""
    return sweep(trace, PLAN, first_heat(trace.probe), frozenset(), watch())


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny trained model with a probe large enough for a first heat. The attention of one block adds nothing, so that
    there is a place that no heat can clear.
    """
    model = zoo.build("llama", steps=200)
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    path = zoo.save(model, tmp_path_factory.mktemp("race"))
    return zoo.trace_of(path, zoo.probe(fit=80, select=40, confirm=160))


@pytest.mark.parametrize(
    ("select", "confirm", "heat"), [(40, 160, (5, 20)), (8, 16, (4, 8)), (2, 16, (2, 8)), (4, 9, (4, 9))]
)
def test_the_first_heat_takes_a_part(select: int, confirm: int, heat: tuple[int, int]) -> None:
    """An eighth, never fewer than four of select and eight of confirm, and everything when little would be spared."""
    expected = [*range(heat[0]), *range(select, select + heat[1])]
    assert first_heat(zoo.probe(select=select, confirm=confirm)).tolist() == expected


def test_open_places_are_measured_in_full(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open block's margin is what the full measurement gives; a cleared one keeps the heat's."""
    (swept, margins), first = raced(trace), first_swept(trace)
    rows = first_heat(trace.probe)
    heat = race_module.margins_of(first.trained, first.variants, PLAN.references, 40)
    with monkeypatch.context() as patched:
        patched.setattr(race_module, "HEAT_FRACTION", 1)
        full_sweep, full = raced(trace)
    assert np.isfinite(full_sweep.variants[Variant(1, "block", "skip")]).all()
    opened, again = still_open(heat), contenders(first.variants, heat)
    assert (1, "attention") in opened
    assert set(again) < set(first.variants)
    for variant, losses in swept.variants.items():
        measured = np.isfinite(losses).nonzero()[0].tolist()
        assert measured == (list(range(200)) if variant in again else rows.tolist())
        np.testing.assert_allclose(losses[rows], first.variants[variant][rows], atol=1e-6)
    for place, own in margins.items():
        if place in opened:
            assert own.whole
            assert own.estimate.value == pytest.approx(full[place].references[own.best], abs=1e-6)
            if Variant(*place, full[place].best) in again:  # not shown by a few sequences to be worse than another
                assert own.best == full[place].best
                assert own.estimate.low == pytest.approx(full[place].estimate.low, abs=1e-6)
        else:
            assert own == heat[place]
            assert not own.whole


def test_only_references_that_may_be_the_best_go_on(trace: Any) -> None:
    """A reference that a few sequences show to be worse than another is not carried again; the best always is."""
    swept = first_swept(trace)
    margins = race_module.margins_of(swept.trained, swept.variants, PLAN.references, 40)
    again = contenders(swept.variants, margins)
    for place in still_open(margins):
        assert Variant(*place, margins[place].best) in again
    worse = {
        variant: losses + (1.0 if variant.reference == "skip" else 0.0) for variant, losses in swept.variants.items()
    }
    margins = race_module.margins_of(swept.trained, worse, PLAN.references, 40)
    assert not [variant for variant in contenders(worse, margins) if variant.reference == "skip"]


def test_carrying_again_gives_the_same_losses(trace: Any) -> None:
    """A solved reference, carried a second time over the same sequences, has the same losses."""
    rows = first_heat(trace.probe)
    swept, _ = raced(trace)
    chosen = {variant: swept.solved[variant] for variant in list(swept.variants)[::3]}
    again = carry(trace, chosen, rows, watch())
    for variant, losses in again.items():
        np.testing.assert_allclose(losses, swept.variants[variant][rows], atol=1e-5)


def test_memory_for_spliced_streams_is_bounded(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that may not wait are run to the end block by block, with the same losses to the last digits."""
    waiting, _ = raced(trace)
    held: list[int] = []
    real = tails_module.Tails

    class Watched(real):
        def splice(self, *arguments: Any) -> None:
            super().splice(*arguments)
            held.append(self.waiting)

    monkeypatch.setattr(tails_module, "Tails", Watched)
    monkeypatch.setattr(tails_module, "TAIL_SHARE", 0)
    at_once, _ = raced(trace)
    assert set(held) == {0}
    for variant, losses in waiting.variants.items():
        np.testing.assert_allclose(losses, at_once.variants[variant], atol=1e-6)


def test_a_silenced_block_is_below_and_the_others_are_judged_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a silenced block, race and full measurement agree on which blocks are decided and how."""
    model = zoo.build("llama", steps=200)
    for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    trace = zoo.trace_of(zoo.save(model, tmp_path), zoo.probe(fit=80, select=40, confirm=160))
    _, margins = raced(trace)
    monkeypatch.setattr(race_module, "HEAT_FRACTION", 1)
    _, full = raced(trace)
    short, whole = (statuses(list(of_target(own, "block").values())) for own in (margins, full))
    assert short[2] == whole[2] == "below"
    assert all(one == other for one, other in zip(short, whole, strict=True) if "undecided" not in (one, other))
