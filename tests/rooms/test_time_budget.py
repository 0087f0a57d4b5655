"""A budget of seconds or of forward passes: what it does not suffice for is left out and said, what is there is what it
would have been.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.peel import peel
from peel_agent.records import Estimate, Findings, LayerReport, Plan, Status
from tests import zoo

heats_module = importlib.import_module("peel_agent.peel.margins.heats")
meter_module = importlib.import_module("peel_agent.peel.numerics.meter")
race_module = importlib.import_module("peel_agent.peel.margins.race")  # the package exports the function of that name
PLAN = Plan(frozenset({"margin", "bounds"}), ("skip", "affine", "previous"), "ends")
OPEN = "open margins on all sequences: "


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained while one attention and one block of it added nothing."""
    idle = ("1.self_attn.o_proj", "2.self_attn.o_proj", "2.mlp.down_proj")
    model = zoo.build("llama", 200, [f"model.layers.{name}.weight" for name in idle])
    return zoo.save(model, tmp_path_factory.mktemp("budget"))


@pytest.fixture(params=["whole sequences", "cuts"])
def heats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A first heat of whole sequences, or of the first tokens of more of them."""
    if request.param == "cuts":
        monkeypatch.setattr(heats_module, "WHOLE_PASSES", 0.0)
        monkeypatch.setattr(heats_module, "CUT_PASSES", 0.25)
        monkeypatch.setattr(heats_module, "LEAST_CUT", 4)
    return str(request.param)


@cache
def trace_of(path: Path) -> BlockwiseTrace:
    return zoo.trace_of(path, zoo.probe(fit=80, select=40, confirm=160))


def peeled(path: Path, ticks: float | None = None) -> Findings:
    """With a clock that goes on by one at every look."""
    return peel(trace_of(path), dataclasses.replace(PLAN, seconds=ticks), itertools.count(step=1.0).__next__)


def margins(path: Path, passes: float | None = None) -> Findings:
    plan = dataclasses.replace(PLAN, quantities=frozenset({"margin"}), passes=passes)
    return peel(trace_of(path), plan, itertools.count().__next__)


@cache
def unlimited(path: Path) -> Findings:
    """Bounds too."""
    return peeled(path)


@cache
def total(path: Path) -> int:
    looks = itertools.count()
    peel(trace_of(path), PLAN, looks.__next__)
    return next(looks)


def named(findings: Findings) -> list[str]:
    return [skipped.what for skipped in findings.skipped if "budget" in skipped.why]


def places(layers: tuple[LayerReport, ...]) -> Iterator[tuple[str, Status, Estimate | None]]:
    """Every block and part with its status and margin."""
    for layer in layers:
        yield layer.name, layer.status, layer.margin
        for name, part in layer.parts.items():
            yield f"{layer.name}/{name}", part.status, part.margin


def check(whole: Findings, partial: Findings) -> None:
    """Each margin is what the unlimited run gives, or its place is named among what is left out; no status is another,
    unless it is left open.
    """
    missing = [layer.name for layer in partial.layers if layer.margin is None]
    assert ([f"margins of {missing[0]} and the blocks after it"] if missing else []) == [
        what for what in named(partial) if what.startswith("margins of")
    ]
    left_open = {name for what in named(partial) if what.startswith(OPEN) for name in what[len(OPEN) :].split(", ")}
    for (name, full, theirs), (_, status, ours) in zip(places(whole.layers), places(partial.layers), strict=True):
        if missing:  # what a margin is held against hangs on the others
            continue
        assert ours is not None
        assert theirs is not None
        assert status in (full, "undecided")
        if name in left_open:
            assert status == "undecided"
            assert ours.low <= theirs.high
            assert theirs.low <= ours.high
        else:
            assert ours == theirs


def test_none_is_no_limit(path: Path) -> None:
    """Without a budget nothing is left out."""
    assert named(unlimited(path)) == []


def test_no_time_still_gives_loss_and_head(path: Path) -> None:
    """A budget of nothing leaves out every margin and map by name; the loss and the head's bound are there."""
    whole, nothing = unlimited(path), peeled(path, 0)
    assert nothing.loss == whole.loss
    assert [bound.label for bound in nothing.bounds] == ["head"]
    assert {f"map {bound.label}" for bound in whole.bounds if bound.label != "head"} < set(named(nothing))
    assert all(layer.margin is None and layer.status == "not_measured" for layer in nothing.layers)
    assert len(nothing.layers) == zoo.BLOCKS
    assert "margins of model.layers.0 and the blocks after it" in named(nothing)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_what_is_left_out_is_said_and_the_rest_is_true(path: Path, share: float) -> None:
    """Whatever the time, a margin or map is either what the unlimited run gives, or named among what is left out."""
    whole, partial = unlimited(path), peeled(path, share * total(path))
    values = {bound.label: bound.value for bound in whole.bounds}
    for bound in partial.bounds:
        assert bound.value == values.pop(bound.label)
    assert {f"map {label}" for label in values} <= set(named(partial))
    check(whole, partial)


def test_passes_that_do_not_suffice(path: Path, heats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for forward passes: never more than the budget are spent, but for the first look at every block and
    what is measured whatever the budget; and the same ones at every time.
    """
    monkeypatch.setattr(meter_module, "USUAL_TOKENS", 0)
    monkeypatch.setattr(race_module, "MOST_BELOW", 0)
    monkeypatch.setattr(race_module, "CLEARING", 1.0)
    whole, least = margins(path), margins(path, 1e-9).passes
    assert least < 0.9 * whole.passes
    opened = set()
    for share in (0.6, 0.8, 0.9, 0.97, 1.0):
        partial, again = (margins(path, share * whole.passes) for _ in range(2))
        assert partial.passes <= max(least, share * whole.passes) * (1 + 1e-9)
        assert partial == dataclasses.replace(again, timing=partial.timing)
        assert bool(named(partial)) == (share < 1.0)
        check(whole, partial)
        opened.add(sum(what.count(", ") for what in named(partial)))
    assert len(opened) > 2  # some budgets leave more open than others


def test_a_partial_result_was_seen(path: Path) -> None:
    """The cases above are no empty claim: some budget gives some margins and not others."""
    counts = {
        sum(layer.margin is not None for layer in peeled(path, share * total(path)).layers) for share in (0.1, 0.2, 0.3)
    }
    assert counts & set(range(1, zoo.BLOCKS))


@pytest.mark.parametrize("key", ["time_budget_seconds", "budget_passes"])
def test_the_key_is_checked(key: str) -> None:
    """A budget below nothing is refused by name."""
    from peel_agent.config import load_settings
    from peel_agent.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match=rf"peel\.{key}"):
        load_settings(None, {f"peel.{key}": -1})
    settings: Any = load_settings(None, {f"peel.{key}": 12})
    assert getattr(settings.peel, key) == 12.0
