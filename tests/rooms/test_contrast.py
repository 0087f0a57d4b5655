"""Two reports held against each other: signs, intervals, the first block, statuses, and what is said besides."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from peel_agent.contrast import contrast, contrast_runs, difference_verdict, is_worse, newly_below
from peel_agent.contrast.contrast import unpaired
from peel_agent.errors import ConfigurationError
from peel_agent.publish import difference_line, difference_sheet, plain_text
from peel_agent.records import (
    Comparable,
    DifferenceReport,
    Estimate,
    History,
    PairedDifference,
    PairedDifferences,
    PeelReport,
    WeightDifference,
    restored,
)
from tests import histories

A, B = histories.report(100), histories.report(400)
EQUAL = WeightDifference(compared=9)


def held(a: PeelReport = A, b: PeelReport = B, **more: Any) -> DifferenceReport:
    return contrast(Comparable("a", a), Comparable("b", b), **{"paired": None, **more})


def sure(value: float, half: float = 0.01) -> PairedDifference:
    return PairedDifference(Estimate(value, value - half, value + half), 40)


def paired(loss: PairedDifference, **margins: PairedDifference) -> PairedDifferences:
    places = {name.removeprefix("at").replace("_", "/"): difference for name, difference in margins.items()}
    return PairedDifferences(loss, places, {})


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (Estimate(1.0, 0.9, 1.1), Estimate(1.5, 1.3, 1.6), Estimate(0.5, 0.2, 0.7)),
        (Estimate(1.0, 1.0, 1.0), Estimate(1.5, 1.5, 1.5), Estimate(0.5, 0.5, 0.5)),
        (Estimate(1.0, 0.5, 1.1), Estimate(1.0, 0.9, 1.8), Estimate(0.0, -0.2, 1.3)),
    ],
)
def test_what_is_not_paired_has_both_half_widths(a: Estimate, b: Estimate, expected: Estimate) -> None:
    """The interval of an unpaired difference reaches from the least that it can be to the most."""
    difference = unpaired(a, b)
    assert [difference.value, difference.low, difference.high] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )


def test_a_pair_is_preferred_and_told() -> None:
    """Where two were paired the difference is that of the pairs, with their number; elsewhere it is nobody's guess."""
    report = held(paired=paired(sure(-0.3), at3=sure(0.2), at3_mlp=sure(0.1)), weights=EQUAL)
    assert (report.pairing, report.loss.difference, report.loss.sequences) == ("by sequence", sure(-0.3).value, 40)
    layer = report.layers[3]
    assert layer.block.margin.difference == sure(0.2).value
    assert layer.parts["mlp"].margin.difference == sure(0.1).value
    assert layer.parts["attention"].margin.difference is None  # it was measured in both, and not paired
    assert held().pairing == "none"
    assert held().layers[3].block.margin.sequences is None


@pytest.mark.parametrize(
    ("margins", "weights", "by_margin", "by_weights"),
    [
        ({}, EQUAL, None, None),
        ({"at2": sure(0.005)}, WeightDifference((4, 5), compared=9), None, 4),
        ({"at2": sure(0.02), "at4": sure(-0.2)}, WeightDifference((1,), compared=9), 2, 1),
        ({"at3": sure(0.005), "at3_mlp": sure(-0.02)}, EQUAL, 3, None),
        ({"at2": sure(0.011)}, EQUAL, 2, None),
        ({f"at{index}": sure(0.011) for index in range(4)}, EQUAL, None, None),  # one of so many may be by chance
    ],
)
def test_the_first_block_that_differs(
    margins: dict[str, PairedDifference], weights: WeightDifference, by_margin: int | None, by_weights: int | None
) -> None:
    """By weights the first unequal one; by margin the first of which an interval that is widened for their number does
    not hold 0, its own or a part's.
    """
    report = held(paired=paired(sure(0.0), **margins), weights=weights)
    assert (report.first_by_margin, report.first_by_weights) == (by_margin, by_weights)
    for index, how in ((by_margin, "for certain by margin"), (by_weights, "by weights")):
        named = "No block differs" if index is None else f"model.layers.{index} {how}"
        assert named in difference_verdict(report) or (not margins and how == "for certain by margin")


@pytest.mark.parametrize(
    ("loss", "words", "worse"),
    [
        (sure(0.02), "B has a higher loss than A", True),
        (sure(-0.02), "B has a lower loss than A", False),
        (sure(0.005), "cannot be told apart", False),
    ],
)
def test_the_verdict_says_which_is_better_only_when_it_is_sure(loss: PairedDifference, words: str, worse: bool) -> None:
    """An interval that holds 0 decides nothing."""
    report = held(paired=paired(loss), weights=WeightDifference((1,), compared=9))
    assert words in difference_verdict(report)
    assert "paired over 40 sequences" in difference_verdict(report)
    assert is_worse(report) == worse


def test_equal_weights_are_one_model() -> None:
    """Of two checkpoints without any unequal value nothing is said of better or worse."""
    report = held(A, dataclasses.replace(A, loss=A.loss), paired=paired(sure(0.0)), weights=EQUAL)
    assert difference_verdict(report).startswith("A and B hold the same weights.")
    other = dataclasses.replace(A, model=dataclasses.replace(A.model, blocks=7))
    assert not difference_verdict(held(A, other, paired=paired(sure(0.0)), weights=EQUAL)).startswith("A and B hold")


def with_status(report: PeelReport, index: int, status: str) -> PeelReport:
    layers = [dataclasses.replace(one, status=status) if one.index == index else one for one in report.layers]
    return dataclasses.replace(report, layers=tuple(layers))


@pytest.mark.parametrize(
    ("was", "now", "below"),
    [
        ("above", "above", False),
        ("above", "below", True),
        ("undecided", "below", True),
        ("below", "above", False),
        ("not_measured", "below", True),
    ],
)
def test_statuses_that_changed(was: str, now: str, below: bool) -> None:
    """Each change is named with both statuses; what was below before is no news."""
    report = held(with_status(B, 1, was), with_status(B, 1, now))
    assert newly_below(report) == below
    words = difference_verdict(report)
    assert (f"model.layers.1 {was} -> {now}" in words) == (was != now)
    assert ("No block or part has another status" in words) == (was == now)


def other(**model: object) -> PeelReport:
    return dataclasses.replace(B, model=dataclasses.replace(B.model, **model))


@pytest.mark.parametrize(
    ("b", "note"),
    [
        (other(family="gpt2"), "their families differ: A llama, B gpt2"),
        (other(precision="bfloat16"), "their precisions differ: A float32, B bfloat16"),
        (other(parameters=7), "A has 1,200,000 parameters and B 7"),
        (
            dataclasses.replace(histories.report(400, layers=8), probe=A.probe),
            "A has 6 blocks and B 8: blocks 6 to 7 of B have none to be held against",
        ),
        (
            dataclasses.replace(B, checkpoint=dataclasses.replace(B.checkpoint, format="dcp")),
            "their formats differ: A transformers, B dcp",
        ),
    ],
)
def test_what_else_differs_is_said(b: PeelReport, note: str) -> None:
    """Formats, families, precisions and depths that differ are told; blocks are compared as far as both have them."""
    report = held(A, b)
    assert note in report.notes
    assert [layer.index for layer in report.layers] == list(range(6))
    assert f"note: {note}" in plain_text(difference_sheet(report))


def test_the_json_comes_back_the_same() -> None:
    """The schema is named, and everything is read back as it was; a NaN is refused."""
    report = held(paired=paired(sure(-0.3), at3=sure(0.2)), weights=WeightDifference((1,), ("lm_head.weight",), 9))
    form = json.loads(difference_line(report))
    assert form["schema"] == "peel-agent/compare/1"
    assert restored(DifferenceReport, form) == report
    broken = dataclasses.replace(A, loss=Estimate(float("nan"), 0.0, 0.0))
    with pytest.raises(ValueError, match="not JSON compliant"):
        difference_line(held(broken))


# ---------------------------------------------------------------- runs


def run(name: str, *steps: int | None, shift: float = 0.0) -> History:
    def shifted(step: int | None) -> PeelReport:
        one = histories.report(step)
        loss = Estimate(*(end + shift for end in (one.loss.value, one.loss.low, one.loss.high)))
        return dataclasses.replace(one, loss=loss)

    return History(name, f"/runs/{name}", tuple(map(shifted, steps)))


def test_runs_are_compared_at_common_steps_and_at_their_ends() -> None:
    """Every step that both have, in order; and the last checkpoint of each, of whatever step."""
    report = contrast_runs(run("one", 100, 200, 300, 400), run("two", 200, 400, 500, shift=0.5), where=("a", "b"))
    assert [step.step for step in report.steps] == [200, 400]
    assert (report.kind, report.pairing, report.a.run, report.b.run) == ("runs", "none", "one", "two")
    assert (report.a.checkpoint.step, report.b.checkpoint.step) == (400, 500)
    assert report.weights.why_not is not None
    for step in report.steps:
        assert step.loss.difference is not None
        assert step.loss.difference.value == pytest.approx(0.5)
        assert (step.loss.difference.low, step.loss.difference.high) == pytest.approx((0.4, 0.6))
        assert step.statuses_changed == 0
    assert "the last checkpoint of A is of step 400, that of B of step 500" in report.notes


def test_runs_without_a_common_step() -> None:
    """Their ends are compared all the same, which is said; so are two exports without a step."""
    report = contrast_runs(run("one", 100), run("two", 200), where=("a", "b"))
    assert report.steps == ()
    assert any("no step in common" in note for note in report.notes)
    report = contrast_runs(run("one", None), run("two", None), where=("a", "b"))
    assert report.loss.difference is not None


def test_runs_on_two_probes_are_refused() -> None:
    """Losses of two probes are no difference of the runs; older reports of another probe are left out, and counted."""
    probe = dataclasses.replace(A.probe, fingerprint="dead")
    elsewhere = History("two", "", (dataclasses.replace(A, probe=probe),))
    with pytest.raises(ConfigurationError, match="two probes: one on beef, two on dead"):
        contrast_runs(run("one", 100), elsewhere, where=("a", "b"))
    mixed = History("two", "", (dataclasses.replace(A, probe=probe), histories.report(200)))
    report = contrast_runs(run("one", 100, 200), mixed, where=("a", "b"))
    assert [step.step for step in report.steps] == [200]
    assert any("1 reports of B are of another probe, and are left out" in note for note in report.notes)
