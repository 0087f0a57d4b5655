"""The publish room's Publication: metrics, tags and files with the contract's names."""

from __future__ import annotations

import dataclasses
import json
import re
from math import nan

import numpy as np
import pytest

from peel_agent.publish import publication, report_line, series_of
from peel_agent.records import (
    METRICS,
    BoundReport,
    Change,
    Estimate,
    Finding,
    LayerReport,
    PartReport,
    PeelReport,
    Publication,
    RuleState,
    Verdict,
    metric_form,
)
from tests.rooms.test_publish_form import FULL

SILENT = Verdict((), ())
SUMMARIES = {
    "peel/loss": 1.67,
    "peel/bound": 1.5,
    "peel/gap": 0.17,
    "peel/layers_below": 1.0,
    "peel/layers_undecided": 1.0,
    "peel/parts_below": 1.0,
    "peel/worst_margin": 0.0,
    "peel/alerts_firing": 0.0,
    "peel/seconds": 1.0,
}


def published(report: PeelReport, verdict: Verdict = SILENT, **options: object) -> Publication:
    return publication(report, verdict, **{"committed_at": 1.5, "max_series": 400, **options})


def layer(index: int, margin: float | None, headroom: float | None = None, status: str = "above") -> LayerReport:
    return LayerReport(
        index=index,
        name=f"model.layers.{index}",
        status=status,
        margin=None if margin is None else Estimate(margin, margin, margin),
        best_reference=None,
        references={},
        parts={name: PartReport("above", None) for name in ("attention", "mlp")},
        stream_share=0.1,
        headroom=None if headroom is None else Estimate(headroom, headroom, headroom),
    )


def deep(blocks: int, *, parts: bool = False) -> PeelReport:
    """Block l's margin is (7 l mod blocks) / blocks: the worst ones are scattered over the depth."""
    layers = tuple(layer(index, (7 * index % blocks) / blocks, 0.5) for index in range(blocks))
    if parts:
        both = {name: PartReport("above", Estimate(0.25, 0.2, 0.3)) for name in ("attention", "mlp")}
        layers = tuple(dataclasses.replace(block, parts=both) for block in layers)
    return dataclasses.replace(FULL, layers=layers)


def test_metrics_have_the_contracts_names() -> None:
    """A full report yields every summary, what was measured of each layer, its parts' margins, and each map's value."""
    expected = {
        **SUMMARIES,
        "peel/margin/L000": 0.0,
        "peel/headroom/L000": 0.05,
        "peel/progress/L000": -0.02,
        "peel/change/L000": 1.5,
        "peel/margin_attention/L000": 0.0,
        "peel/yes/head": 1.6,
    }
    assert published(FULL).metrics == pytest.approx(expected)


def test_a_change_of_nothing_is_published() -> None:
    """A frozen layer's change is exactly 0, which is a finding and no gap in the series."""
    frozen = dataclasses.replace(layer(3, None), change=Change(0.0), progress=Estimate(0.0, 0.0, 0.0))
    metrics = published(dataclasses.replace(FULL, layers=(frozen,))).metrics
    assert (metrics["peel/change/L003"], metrics["peel/progress/L003"]) == (0.0, 0.0)


def test_what_was_not_measured_is_left_out() -> None:
    """No bound, no gap, no margins: no key stands for them or counts them, and none holds a stand-in number."""
    nothing = {name: PartReport("not_measured", None) for name in ("attention", "mlp")}
    layers = (dataclasses.replace(layer(3, None, 0.2, status="not_measured"), parts=nothing),)
    report = dataclasses.replace(FULL, bound=None, gap=None, bounds=(), layers=layers)
    one = published(report)
    assert set(one.metrics) == {"peel/loss", "peel/alerts_firing", "peel/seconds", "peel/headroom/L003"}
    assert one.tags == {"peel.status": "not_measured", "peel.zone": "not_measured"}


def test_parts_that_were_not_measured_are_not_counted() -> None:
    """Whole blocks alone, as effort quick measures them, give no number of parts below."""
    parts = {name: PartReport("not_measured", None) for name in ("attention", "mlp")}
    report = dataclasses.replace(FULL, layers=(dataclasses.replace(layer(3, 0.1), parts=parts),))
    metrics = published(report).metrics
    assert "peel/parts_below" not in metrics
    assert (metrics["peel/layers_below"], metrics["peel/layers_undecided"]) == (0.0, 0.0)


def test_counts_of_layers_and_alerts() -> None:
    """Layers and parts are counted by status, alerts by firing state, whatever else is pending or was not measured."""
    statuses = ("below", "below", "undecided", "not_measured", "above")
    layers = [layer(index, 0.1, status=status) for index, status in enumerate(statuses)]
    for index, parts in ((0, ("below", "below")), (2, ("undecided", "below")), (4, ("above", "not_measured"))):
        both = dict(zip(("attention", "mlp"), (PartReport(part, None) for part in parts), strict=True))
        layers[index] = dataclasses.replace(layers[index], parts=both)
    states = tuple(
        RuleState("r", subject, phase, 0, 1)
        for subject, phase in (
            ("model.layers.0", "firing"),
            ("model.layers.0/mlp", "firing"),
            ("model.layers.1", "pending"),
        )
    )
    metrics = published(dataclasses.replace(FULL, layers=tuple(layers)), Verdict(states, ())).metrics
    names = ("layers_below", "layers_undecided", "parts_below", "alerts_firing")
    assert [metrics[f"peel/{name}"] for name in names] == [2, 1, 3, 2]


def test_step_and_timestamp_come_from_the_checkpoint() -> None:
    """The timestamp is the commit time in milliseconds; a checkpoint without a step has no place in a series: it is a
    file named by its fingerprint, without metrics and tags.
    """
    one = published(FULL, committed_at=1_700_000_000.1234)
    assert (one.step, one.timestamp_ms) == (800, 1_700_000_000_123)
    unnumbered = published(dataclasses.replace(FULL, checkpoint=dataclasses.replace(FULL.checkpoint, step=None)))
    assert (unnumbered.metrics, unnumbered.tags) == ({}, {})
    assert set(unnumbered.files) == {f"peel/checkpoints/{FULL.checkpoint.fingerprint}.json"}


def test_the_file_holds_the_report() -> None:
    """The report is filed under its step; the log of alerts is made when it is delivered, and is not in it."""
    assert published(FULL).files == {"peel/checkpoints/step-000000800.json": report_line(FULL)}


def test_a_deep_model_keeps_to_max_series() -> None:
    """500 layers exceed 400 keys: all summaries stay, then the layers with the lowest margins, and no map."""
    metrics = published(deep(500)).metrics
    assert len(metrics) == 400
    assert set(SUMMARIES) < set(metrics)
    kept = {key: value for key, value in metrics.items() if key.startswith("peel/margin/")}
    assert sorted(kept.values()) == pytest.approx([rank / 500 for rank in range(196)])
    (last,) = [
        key for key, value in kept.items() if value == pytest.approx(195 / 500)
    ]  # 391 keys are 195 pairs and one
    assert {key.replace("headroom", "margin") for key in metrics if "headroom" in key} == set(kept) - {last}
    assert not any(key.startswith("peel/yes/") for key in metrics)


@pytest.mark.parametrize("max_series", [0, 3, 8, 9, 18, 20, 21, 22, 23])
def test_never_more_keys_than_max_series(max_series: int) -> None:
    """At any limit the number of keys is at most that, and everything is there as soon as everything fits."""
    metrics = published(deep(6), max_series=max_series).metrics
    everything = 9 + 12 + 1
    assert len(metrics) == (everything if max_series >= everything else min(max_series, 21))


def test_a_run_keeps_to_max_series_whatever_layers_are_the_worst() -> None:
    """Over 50 checkpoints whose worst layers are others each time, all keys together are at most so many, and a layer
    that is charted once is charted to the end.
    """
    random, charted, keys = np.random.default_rng(0), frozenset[str](), []
    for _ in range(50):
        margins = random.permutation(60) / 60
        layers = tuple(layer(index, float(margins[index]), 0.5) for index in range(60))
        metrics = published(dataclasses.replace(FULL, layers=layers), max_series=100, charted=charted).metrics
        keys.append(set(metrics))
        charted |= frozenset(metrics)
    assert len(charted) == 100
    assert all(set(SUMMARIES) < one for one in keys)
    assert keys == [set(charted)] * 50


def test_a_series_that_comes_later_is_charted_while_there_is_room() -> None:
    """Headroom that is asked for in the middle of a run has its keys; a run that is full gets no further one."""
    without = dataclasses.replace(FULL, layers=tuple(layer(index, 0.5) for index in range(6)))
    both = dataclasses.replace(FULL, layers=tuple(layer(index, 0.5, 0.1) for index in range(6)))
    charted = frozenset(published(without).metrics)
    assert set(published(both, charted=charted).metrics) - charted == {
        f"peel/headroom/L{index:03d}" for index in range(6)
    }
    room = published(both, charted=charted, max_series=len(charted) + 2).metrics
    assert len(set(room) - charted) == 2
    assert set(published(both, charted=charted, max_series=3).metrics) == charted  # a limit that was lowered


def test_margins_of_parts_are_cut_before_anything_of_a_layer() -> None:
    """What does not fit goes in this order: the maps, then the margins of parts, the best layer's first, then the best
    layers themselves; the summaries go last.
    """
    report = deep(6, parts=True)
    everything = list(published(report).metrics)
    parts, maps = [key for key in everything if key.startswith("peel/margin_")], ["peel/yes/head"]
    assert (len(everything), len(parts)) == (9 + 12 + 12 + 1, 12)
    best_first = [f"peel/margin/L{index:03d}" for index in sorted(range(6), key=lambda index: -(7 * index % 6))]
    gone: list[str] = []
    for fit in reversed(range(len(everything))):
        now = set(published(report, max_series=fit).metrics)
        assert len(now) == fit
        gone += [key for key in reversed(everything) if key not in now and key not in gone]
    assert gone[:1] == maps
    parts_last = ("mlp", "attention")
    assert gone[1:13] == [key.replace("margin", f"margin_{part}") for key in best_first for part in parts_last]
    assert gone[13:25] == [name for key in best_first for name in (key.replace("margin", "headroom"), key)]
    assert set(gone[25:]) == set(SUMMARIES)


def test_layers_with_a_finding_are_cut_last() -> None:
    """Whatever its margin, a layer that something was found of comes first, one without a margin last."""
    layers = [layer(index, margin) for index, margin in enumerate((0.1, 0.9, 0.2, None))]
    layers[3] = dataclasses.replace(layers[3], change=Change(1.0))
    layers[1] = dataclasses.replace(layers[1], finding=Finding("changed", "model.layers.1/mlp", "words"))
    report = dataclasses.replace(FULL, layers=tuple(layers))
    kept = [key for key in published(report).metrics if key.split("/")[1] in ("margin", "change")]
    assert kept == ["peel/margin/L001", "peel/margin/L000", "peel/margin/L002", "peel/change/L003"]
    assert [key for key in published(report, max_series=10).metrics if key not in SUMMARIES] == kept[:1]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (("above", "above"), "above"),
        (("above", "undecided"), "undecided"),
        (("undecided", "below", "above"), "below"),
        ((), "not_measured"),
        (("not_measured", "above"), "above"),
        (("not_measured", "undecided"), "undecided"),
        (("not_measured", "below"), "below"),
        (("not_measured", "not_measured"), "not_measured"),
    ],
)
def test_the_status_tag_is_the_worst_of_the_layers(statuses: tuple[str, ...], expected: str) -> None:
    """Of those measured: `below` when any is, else `undecided` when any is, else `above`; else `not_measured`."""
    layers = tuple(layer(index, 0.1, status=status) for index, status in enumerate(statuses))
    tags = published(dataclasses.replace(FULL, layers=layers)).tags
    assert tags == {"peel.status": expected, "peel.zone": "caution"}


def test_alert_tags_name_the_layers_that_fire() -> None:
    """Every rule with a state has a tag, which names parts too; a firing layer or part that this report lacks is named
    by its module.
    """
    states = (
        RuleState("layer_below", "model.layers.3", "firing", 0, 100),
        RuleState("layer_changed", "model.layers.3/mlp", "firing", 0, 100),
        RuleState("layer_changed", "model.layers.4", "firing", 0, 100),
        RuleState("layer_changed", "model.layers.4/attention", "inactive", 0, None),
        RuleState("layer_changed", "model.layers.9/attention", "firing", 0, 100),
        RuleState("layer_below", "model.layers.4", "firing", 1, 100),
        RuleState("layer_below", "model.layers.5", "pending", 1, 100),
        RuleState("layer_below", "model.layers.9", "firing", 0, 100),
        RuleState("calm", "model.layers.3", "inactive", 0, None),
    )
    both = {"attention": PartReport("above", None), "mlp": PartReport("above", None)}
    layers = tuple(dataclasses.replace(layer(index, 0.1), parts=both) for index in (3, 4, 5))
    tags = published(dataclasses.replace(FULL, layers=layers), Verdict(states, ())).tags
    assert tags["peel.alert.layer_below"] == "firing: L003, L004, model.layers.9"
    assert tags["peel.alert.layer_changed"] == "firing: L003/mlp, L004, model.layers.9/attention"
    assert tags["peel.alert.calm"] == "inactive"


def test_every_key_is_one_that_trackers_take() -> None:
    """Metric keys and tags keep to MLflow's letters and lie beneath `peel`; values are floats."""
    labels = ("head", "ends-1_4", "user.2")
    bounds = tuple(BoundReport(label, (1,), "closed_form", Estimate(1.0, 0.9, 1.1), 1.0, True) for label in labels)
    one = published(dataclasses.replace(deep(3, parts=True), bounds=bounds))
    assert all(re.fullmatch(r"peel/[/\w.\-]{1,240}", key) for key in one.metrics)
    assert all(type(value) is float for value in one.metrics.values())
    assert all(tag.startswith("peel.") for tag in one.tags)
    assert all(json.loads(text) for text in one.files.values())


def test_a_report_with_a_nan_is_not_published() -> None:
    """NaN crashes tracker pages: nothing is composed from a report that holds one."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        published(dataclasses.replace(FULL, loss=Estimate(nan, nan, nan)))


def test_every_number_has_a_form_that_rules_may_name() -> None:
    """What trackers get of a report is what a rule of kind `metric` may read, but for the count of alerts."""
    every = dataclasses.replace(FULL, layers=tuple(map(_measured, FULL.layers)))
    assert {metric_form(key) for key in series_of(every)} == set(METRICS)


def _measured(layer: LayerReport) -> LayerReport:
    """The layer with every number that there is."""
    one = Estimate(0.1, 0.1, 0.1)
    parts = {name: PartReport("above", one) for name in ("attention", "mlp")}
    return dataclasses.replace(
        layer, margin=one, headroom=one, progress=one, change=layer.change or Change(1.0), parts=parts
    )
