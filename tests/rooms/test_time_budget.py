"""A time budget: what it does not suffice for is left out and said, what is there is what it would have been."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from peel_agent.peel import peel
from peel_agent.records import Findings, Plan
from tests import zoo

PLAN = Plan(frozenset({"margin", "bounds"}), ("skip", "affine", "previous"), "ends")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save(zoo.build("llama"), tmp_path_factory.mktemp("budget"))


def peeled(path: Path, ticks: float | None) -> Findings:
    """With a clock that goes on by one at every look."""
    trace = zoo.trace_of(path, zoo.probe(fit=80, select=40, confirm=160))
    return peel(trace, dataclasses.replace(PLAN, seconds=ticks), itertools.count(step=1.0).__next__)


def total(path: Path) -> int:
    looks = itertools.count()
    peel(zoo.trace_of(path, zoo.probe(fit=80, select=40, confirm=160)), PLAN, looks.__next__)
    return next(looks)


def named(findings: Findings) -> list[str]:
    return [skipped.what for skipped in findings.skipped if "time budget" in skipped.why]


def test_none_is_no_limit(path: Path) -> None:
    """Without a budget nothing is left out."""
    assert named(peeled(path, None)) == []


def test_no_time_still_gives_loss_and_head(path: Path) -> None:
    """A budget of nothing leaves out every margin and map by name; the loss and the head's bound are there."""
    whole, nothing = peeled(path, None), peeled(path, 0)
    assert nothing.loss == whole.loss
    assert [bound.label for bound in nothing.bounds] == ["head"]
    assert all(layer.margin is None and layer.status == "not_measured" for layer in nothing.layers)
    assert len(nothing.layers) == zoo.BLOCKS
    assert "margins of model.layers.0 and the blocks after it" in named(nothing)
    assert {f"map {bound.label}" for bound in whole.bounds if bound.label != "head"} < set(named(nothing))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_what_is_left_out_is_said_and_the_rest_is_true(path: Path, share: float) -> None:
    """Whatever the budget, a margin or map is either what the unlimited run gives, or named among what is left out."""
    whole, partial = peeled(path, None), peeled(path, share * total(path))
    values = {bound.label: bound.value for bound in whole.bounds}
    for bound in partial.bounds:
        assert bound.value == values.pop(bound.label)
    assert {f"map {label}" for label in values} <= set(named(partial))
    missing = [layer.name for layer in partial.layers if layer.margin is None]
    assert ([f"margins of {missing[0]} and the blocks after it"] if missing else []) == [
        what for what in named(partial) if what.startswith("margins of")
    ]
    carried = "open margins on all sequences" not in named(partial)
    for one, other in zip(whole.layers, partial.layers, strict=True):
        if other.margin is not None and carried and not missing:
            assert one == other
        if not carried:
            assert other.status != "below"


def test_a_partial_result_was_seen(path: Path) -> None:
    """The cases above are no empty claim: some budget gives some margins and not others."""
    counts = {
        sum(layer.margin is not None for layer in peeled(path, share * total(path)).layers) for share in (0.1, 0.2, 0.3)
    }
    assert counts & set(range(1, zoo.BLOCKS))


def test_the_key_is_checked() -> None:
    """A budget below nothing is refused by name."""
    from peel_agent.config import load_settings
    from peel_agent.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match=r"peel.time_budget_seconds"):
        load_settings(None, {"peel.time_budget_seconds": -1})
    settings: Any = load_settings(None, {"peel.time_budget_seconds": 12})
    assert settings.peel.time_budget_seconds == 12.0
