"""The race of margins: what is cleared early is clear in full, and what is open is measured in full."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peel_agent.peel.margins.heats import first_heat
from peel_agent.peel.margins.margin import of_target, statuses
from peel_agent.peel.margins.race import contenders, race, still_open
from peel_agent.peel.numerics.losses import Excess
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.sweep.forward import sweep
from peel_agent.peel.sweep.heats import Heat
from peel_agent.peel.sweep.lanes import carry
from peel_agent.peel.sweep.splices import Variant
from peel_agent.records import Plan
from tests import zoo

race_module = importlib.import_module("peel_agent.peel.margins.race")  # the package exports the function of that name
heats_module = importlib.import_module("peel_agent.peel.margins.heats")
lanes_module = importlib.import_module("peel_agent.peel.sweep.lanes")
PLAN = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")


def watch() -> Stopwatch:
    return Stopwatch(itertools.count().__next__)


def raced(trace: Any) -> Any:
    """What variants cost and the margins; there is no checkpoint before, and so no progress."""
    found = race(trace, PLAN, frozenset(), watch())
    assert found.progress == found.swept.progress == {}
    return found.excesses, found.margins


def meter_of(trace: Any) -> Meter:
    return Meter(trace, next(iter(trace.blocks(stop=1))))


def heat_of(trace: Any) -> Heat:
    return first_heat(trace, meter_of(trace), 7)


def first_swept(trace: Any) -> Any:
    """What the race knows after its first heat."""
    return sweep(trace, PLAN, heat_of(trace), frozenset(), watch())


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
def test_the_first_heat_takes_a_part(select: int, confirm: int, heat: tuple[int, int], tmp_path: Path) -> None:
    """An eighth, never fewer than four of select and eight of confirm, and everything when little would be spared."""
    expected = [*range(heat[0]), *range(select, select + heat[1])]
    trace = zoo.trace_of(zoo.save(zoo.build("llama", steps=0), tmp_path), zoo.probe(select=select, confirm=confirm))
    assert heat_of(trace).rows.tolist() == expected
    assert heat_of(trace).length == trace.probe.sequence_length


def test_open_places_are_measured_in_full(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open block's margin is what the full measurement gives; a cleared one keeps the heat's."""
    (excesses, margins), first = raced(trace), first_swept(trace)
    rows = heat_of(trace).rows
    heat = race_module.margins_of(first.variants, PLAN.references, 40)
    with monkeypatch.context() as patched:
        patched.setattr(heats_module, "HEAT_FRACTION", 1)
        patched.setattr(heats_module, "WHOLE_PASSES", 1000.0)
        full_excesses, full = raced(trace)
    assert full_excesses[Variant(1, "block", "skip")].measured.all()
    opened = still_open(heat)
    again = contenders(first.variants, {place: heat[place] for place in opened})
    assert (1, "attention") in opened
    assert set(again) < set(first.variants)
    for variant, own in excesses.items():
        alone = sum(other[:2] == variant[:2] for other in again) == 1
        expected = np.union1d(rows, np.arange(40 if alone else 0, 200)) if variant in again else rows
        assert own.measured.nonzero()[0].tolist() == expected.tolist()
        np.testing.assert_allclose(own.losses[rows], first.variants[variant].losses[rows], atol=1e-6)
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
    margins = race_module.margins_of(swept.variants, PLAN.references, 40)
    again = contenders(swept.variants, margins)
    for place in margins:
        assert Variant(*place, margins[place].best) in again
    worse = {
        variant: Excess(own.losses + (5.0 if variant.reference == "skip" else 0.0))
        for variant, own in swept.variants.items()
    }
    margins = race_module.margins_of(worse, PLAN.references, 40)
    assert not [variant for variant in contenders(worse, margins) if variant.reference == "skip"]


def test_carrying_again_gives_the_same_losses(trace: Any) -> None:
    """A solved reference, carried a second time over the same sequences, has the same losses."""
    heat, swept = heat_of(trace), first_swept(trace)
    chosen = {variant: swept.solved[variant] for variant in list(swept.variants)[::3]}
    (again,) = carry(trace, [(heat, chosen)], watch(), meter_of(trace))
    for variant, own in again.items():
        np.testing.assert_allclose(own.losses, swept.variants[variant].losses, atol=1e-5)


def test_memory_for_spliced_streams_is_bounded(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that may not wait are run to the end block by block, with the same losses to the last digits."""
    waiting, _ = raced(trace)
    held: list[int] = []
    real = lanes_module.Tails

    class Watched(real):
        def splice(self, *arguments: Any) -> None:
            super().splice(*arguments)
            held.append(self.waiting)

    monkeypatch.setattr(lanes_module, "Tails", Watched)
    monkeypatch.setattr(lanes_module, "TAIL_SHARE", 0)
    at_once, _ = raced(trace)
    assert set(held) == {0}
    for variant, own in waiting.items():
        np.testing.assert_allclose(own.losses, at_once[variant].losses, atol=1e-6)


def test_a_silenced_block_is_below_and_the_others_are_judged_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a silenced block, race and full measurement agree on which blocks are decided and how."""
    model = zoo.build("llama", steps=200)
    for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    trace = zoo.trace_of(zoo.save(model, tmp_path), zoo.probe(fit=80, select=40, confirm=160))
    _, margins = raced(trace)
    monkeypatch.setattr(heats_module, "HEAT_FRACTION", 1)
    monkeypatch.setattr(heats_module, "WHOLE_PASSES", 1000.0)
    _, full = raced(trace)
    short, whole = (statuses(list(of_target(own, "block").values())) for own in (margins, full))
    assert short[2] == whole[2] == "below"
    assert all(one == other for one, other in zip(short, whole, strict=True) if "undecided" not in (one, other))
