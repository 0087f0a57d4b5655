"""The rule kinds that are about the run, a number of it, or the watching: what speaks for, against and neither."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peel_agent.judge import fall_of, judge
from peel_agent.judge.convergence import BINS, LEAST_POINTS, T_95
from peel_agent.judge.kinds import KINDS
from peel_agent.records import (
    OF_TIME,
    BoundReport,
    Estimate,
    Finding,
    LayerReport,
    PeelReport,
    ReportObservation,
    Rule,
    RuleState,
    TickObservation,
)
from tests.rooms.test_judge import report

HOUR = 3600.0


def around(value: float, half: float = 0.001) -> Estimate:
    return Estimate(value, value - half, value + half)


def bound(label: str, value: float, *, within: bool = True) -> BoundReport:
    return BoundReport(label, (1, 2), "closed_form", around(value), value, within)


def with_gap(gap: Estimate | None, *bounds: BoundReport, step: int = 100) -> PeelReport:
    best = min(bounds, key=lambda one: one.best, default=None)
    of_best = {} if best is None else {"bound": best.value, "bound_label": best.label, "bound_step": step}
    return replace(report(step), bounds=bounds, gap=gap, **of_best)


def spoken(rule: Rule, observed: ReportObservation | TickObservation) -> dict[str, str]:
    return {subject: one.speaks for subject, one in KINDS[rule.kind](observed, rule).items()}


# ---------------------------------------------------------------- run_below_bound

BOUNDS = {
    "a construction wins by more than 1 % of the loss": (around(0.02), [bound("ends", 0.98)], "for"),
    "by less than that": (around(0.005), [bound("ends", 0.995)], "against"),
    "perhaps by more": (around(0.01), [bound("ends", 0.99)], "neither"),
    "the run is better": (around(-0.1), [bound("ends", 1.1)], "against"),
    "one outside the model's own class alone raises nothing": (
        around(0.1),
        [bound("ends", 0.9, within=False)],
        "neither",
    ),
}


@pytest.mark.parametrize("case", BOUNDS.values(), ids=BOUNDS.keys())
def test_run_below_bound(case: tuple) -> None:
    """It compares the gap's interval with a fraction of the loss."""
    gap, bounds, expected = case
    rule = Rule("r", "run_below_bound")
    assert spoken(rule, ReportObservation(with_gap(gap, *bounds))) == {"run": expected}


def test_the_threshold_of_run_below_bound_is_a_fraction_of_the_loss() -> None:
    """A rule's own fraction wins over the default."""
    seen = ReportObservation(with_gap(around(0.02), bound("ends", 0.98)))
    assert spoken(Rule("r", "run_below_bound", threshold=0.05), seen) == {"run": "against"}
    assert spoken(Rule("r", "run_below_bound", threshold=0.0), seen) == {"run": "for"}


HEADS = {
    "the head alone wins": ([bound("head", 0.9)], "against"),
    "the layers win all but nothing more than the head": ([bound("head", 0.9), bound("1-4", 0.895)], "neither"),
    "the layers win as much again": ([bound("head", 0.95), bound("1-4", 0.9)], "for"),
}


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS.keys())
def test_the_heads_gap_is_told_apart(case: tuple) -> None:
    """What a refitted head alone explains is not the layers', and raises nothing."""
    bounds, expected = case
    testimony = KINDS["run_below_bound"](
        ReportObservation(with_gap(around(0.1), *bounds)), Rule("r", "run_below_bound")
    )
    assert testimony["run"].speaks == expected
    if expected == "for":
        assert "(map 1-4, of step 100)" in testimony["run"].words
        assert "0.0500 of it by its layers" in testimony["run"].words


def test_an_early_run_explains_its_gap() -> None:
    """While the run as a whole has a finding, a gap is no news of its own."""
    early = Finding("early", "run", "the run is early")
    seen = replace(with_gap(around(0.02), bound("ends", 0.98)), finding=early)
    assert spoken(Rule("r", "run_below_bound"), ReportObservation(seen)) == {"run": "neither"}


def test_without_bounds_nothing_is_said_of_them() -> None:
    """A report without a gap has no testimony at all."""
    assert spoken(Rule("r", "run_below_bound"), ReportObservation(report(100))) == {}


# ---------------------------------------------------------------- false_convergence


def losses(start: float, fall: float, *, noise: float = 0.01, points: int = 400, seed: int = 0) -> tuple:
    """A training loss at steps 1 to 600 that falls by so much over these, with noise."""
    generator = random.Random(seed)
    steps = [round(1 + 599 * index / (points - 1)) for index in range(points)]
    return tuple((step, start - fall * step / 600 + generator.gauss(0, noise)) for step in steps)


def history(gap: Estimate | None, count: int = 5) -> tuple[PeelReport, ...]:
    return tuple(with_gap(gap, bound("ends", 0.95), step=100 * (index + 1)) for index in range(count))


CONVERGENCE = {
    "flat, and a gap stands": (losses(1.0, 0.0), around(0.05), "for"),
    "falling": (losses(1.0, 0.1), around(0.05), "against"),
    "flat, and nothing stands": (losses(1.0, 0.0), around(0.0), "against"),
    "flat, and the gap is open": (losses(1.0, 0.0), around(0.01), "neither"),
    "so noisy that nobody can see whether it falls": (losses(1.0, 0.0, noise=0.5), around(0.05), "neither"),
    "no training loss known": ((), around(0.05), "neither"),
    "too few points": (losses(1.0, 0.0, points=LEAST_POINTS - 1), around(0.05), "neither"),
}


@pytest.mark.parametrize("case", CONVERGENCE.values(), ids=CONVERGENCE.keys())
def test_false_convergence(case: tuple) -> None:
    """A training loss that is flat within its noise, while something better is proven at every checkpoint."""
    loss, gap, expected = case
    last = with_gap(gap, bound("ends", 0.95), step=600)
    seen = ReportObservation(last, history(gap), training_loss=loss)
    assert spoken(Rule("r", "false_convergence"), seen) == {"run": expected}


def test_false_convergence_looks_back_as_far_as_the_rule_says() -> None:
    """`for_checkpoints` is the window; with fewer checkpoints nothing is said."""
    last = with_gap(around(0.05), bound("ends", 0.95), step=600)
    seen = ReportObservation(last, history(around(0.05), 4), training_loss=losses(1.0, 0.0))
    assert spoken(Rule("r", "false_convergence"), seen) == {"run": "neither"}
    assert spoken(Rule("r", "false_convergence", for_checkpoints=4), seen) == {"run": "for"}


def test_it_fires_at_once_for_it_has_counted_already() -> None:
    """One observation raises it: the window is the count."""
    last = with_gap(around(0.05), bound("ends", 0.95), step=600)
    seen = ReportObservation(last, history(around(0.05)), training_loss=losses(1.0, 0.0))
    (state,) = judge(seen, [Rule("r", "false_convergence")], ())
    assert state.phase == "firing"
    assert "the training loss has been flat since step 100" in state.words


def test_headroom_that_stands_counts_too() -> None:
    """A block that could have been better at every checkpoint of the window is named."""

    def with_room(step: int) -> PeelReport:
        rooms = [LayerReport(0, "a", "above", None, None, {}, {}, 0.1, headroom=around(0.05))]
        return replace(report(step), layers=tuple(rooms))

    earlier = tuple(with_room(100 * (index + 1)) for index in range(5))
    seen = ReportObservation(with_room(600), earlier, training_loss=losses(1.0, 0.0))
    testimony = KINDS["false_convergence"](seen, Rule("r", "false_convergence"))["run"]
    assert testimony.speaks == "for"
    assert "a could be better by" in testimony.words


def slow_fall(points: tuple) -> tuple[float, float, float]:
    """The same by numpy's least squares with the textbook's standard error."""
    steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    x = (steps - steps[0]) / (steps[-1] - steps[0])
    which = np.minimum(BINS - 1, np.floor(BINS * x + 1e-12).astype(int))
    x_mean = np.array([x[which == one].mean() for one in range(BINS)])
    y_mean = np.array([values[which == one].mean() for one in range(BINS)])
    design = np.stack([x_mean, np.ones(BINS)], axis=1)
    (slope, offset), *_ = np.linalg.lstsq(design, y_mean, rcond=None)
    residuals = y_mean - slope * x_mean - offset
    covariance = residuals @ residuals / (BINS - 2) * np.linalg.inv(design.T @ design)
    half = T_95 * np.sqrt(covariance[0, 0])
    return -slope, -slope - half, -slope + half


@given(st.floats(-1, 1), st.floats(0.001, 1), st.integers(0, 50))
def test_the_fall_agrees_with_least_squares(fall: float, noise: float, seed: int) -> None:
    """Value and interval are those of ordinary least squares on the means of ten stretches."""
    points = losses(2.0, fall, noise=noise, seed=seed)
    measured = fall_of(points)
    assert measured is not None
    assert (measured.value, measured.low, measured.high) == pytest.approx(slow_fall(points), rel=1e-6, abs=1e-9)


def test_the_interval_of_the_fall_covers() -> None:
    """Over 400 noisy series the 95 % interval holds the true fall in 92 to 98 %."""
    covered = 0
    for seed in range(400):
        fall = fall_of(losses(1.0, 0.05 * 600 / 599, noise=0.1, seed=seed))
        assert fall is not None
        covered += fall.low <= 0.05 <= fall.high
    assert 0.92 <= covered / 400 <= 0.98


# ---------------------------------------------------------------- quantization_collapse, metric


@pytest.mark.parametrize(("share", "expected"), [(0.2, "for"), (0.01, "against"), (None, None)])
def test_quantization_collapse(share: float | None, expected: str | None) -> None:
    """A low-bit layer whose weight set costs more than 5 % of the loss; one that is not low-bit says nothing."""
    layer = LayerReport(0, "a", "above", None, None, {}, {}, 0.1, quantization_share=share)
    seen = ReportObservation(replace(report(100), layers=(layer,)))
    assert spoken(Rule("r", "quantization_collapse"), seen).get("a") == expected


@pytest.mark.parametrize(("op", "expected"), [("<", "against"), ("<=", "for"), (">", "against"), (">=", "for")])
def test_metric_at_its_threshold(op: str, expected: str) -> None:
    """Each operator at the value itself."""
    rule = Rule("r", "metric", metric="peel/loss", op=op, threshold=2.0)
    assert spoken(rule, ReportObservation(report(100), metrics={"peel/loss": 2.0})) == {"run": expected}
    assert spoken(rule, ReportObservation(report(100), metrics={})) == {"run": "neither"}


# ---------------------------------------------------------------- the watching itself

TICKS = {
    "a checkpoint came lately": (Rule("r", "no_checkpoint", threshold=60), {"last_checkpoint_at": 970.0}, "against"),
    "none for longer than the rule's seconds": (
        Rule("r", "no_checkpoint", threshold=20),
        {"last_checkpoint_at": 970.0},
        "for",
    ),
    "none at all yet": (Rule("r", "no_checkpoint", threshold=20), {}, "neither"),
    "one alone, and no threshold": (Rule("r", "no_checkpoint"), {"last_checkpoint_at": 0.0}, "neither"),
    "the training has ended": (
        Rule("r", "no_checkpoint", threshold=20),
        {"last_checkpoint_at": 970.0, "ended": "the tracker has it as FINISHED"},
        "against",
    ),
    "a trouble that lasts": (Rule("r", "agent_error"), {"troubles": (("no server", 600.0),)}, "for"),
    "a trouble that began just now": (Rule("r", "agent_error"), {"troubles": (("no server", 900.0),)}, "neither"),
    "a checkpoint that cannot be used": (Rule("r", "agent_error"), {"unusable": "it is damaged"}, "for"),
    "deliveries that were given up": (Rule("r", "agent_error"), {"given_up": 2}, "for"),
    "nothing wrong": (Rule("r", "agent_error"), {}, "against"),
    "as many wait as the rule says": (Rule("r", "lag", threshold=4), {"waiting": 4}, "for"),
    "fewer, and more than half": (Rule("r", "lag", threshold=4), {"waiting": 3}, "neither"),
    "half as many": (Rule("r", "lag", threshold=4), {"waiting": 2}, "against"),
}


@pytest.mark.parametrize("case", TICKS.values(), ids=TICKS.keys())
def test_ticks(case: tuple) -> None:
    """At the time 1,000, each kind that goes by the clock."""
    rule, standing, expected = case
    (speaks,) = spoken(rule, TickObservation(1000.0, **standing)).values()
    assert speaks == expected


def test_without_a_threshold_a_checkpoint_is_missed_after_five_pauses() -> None:
    """Five times the longest pause between two so far, and at least an hour."""
    rule = Rule("r", "no_checkpoint")
    for pause, silent, expected in ((HOUR, 4.9 * HOUR, "against"), (HOUR, 5.1 * HOUR, "for"), (10.0, 600.0, "against")):
        tick = TickObservation(100 * HOUR, last_checkpoint_at=100 * HOUR - silent, longest_pause=pause)
        assert spoken(rule, tick) == {"run": expected}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_is_moved_by_its_own_observations_only(kind: str) -> None:
    """A report leaves alerts of the clock as they are, and a tick those of reports."""
    rule = Rule("r", kind, metric="peel/loss", threshold=1.0)
    state = RuleState("r", "run", "firing", 0, 100, told=1)
    other = ReportObservation(report(200)) if kind in OF_TIME else TickObservation(1000.0)
    assert judge(other, [rule], (state,)) == (state,)
