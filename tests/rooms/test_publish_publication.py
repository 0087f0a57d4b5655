"""The publish room's Publication: metrics, tags and files with the contract's names."""

from __future__ import annotations

import dataclasses
import json
import re
from math import nan

import pytest

from peel_agent.publish import publication, report_line
from peel_agent.records import BoundReport, Estimate, LayerReport, PeelReport, Publication, RuleState, Verdict
from tests.rooms.test_publish_form import FULL

SILENT = Verdict((), ())
SUMMARIES = {
    "peel/loss": 1.67,
    "peel/bound": 1.5,
    "peel/gap": 0.17,
    "peel/layers_below": 1.0,
    "peel/layers_undecided": 1.0,
    "peel/worst_margin": 0.0,
    "peel/alerts_firing": 0.0,
    "peel/seconds": 1.0,
}


def published(report: PeelReport, verdict: Verdict = SILENT, **options: object) -> Publication:
    return publication(report, verdict, **{"committed_at": 1.5, "alerts_log": "", "max_series": 400, **options})


def layer(index: int, margin: float | None, headroom: float | None = None, status: str = "above") -> LayerReport:
    return LayerReport(
        index=index,
        name=f"model.layers.{index}",
        status=status,
        margin=None if margin is None else Estimate(margin, margin, margin),
        best_reference=None,
        references={},
        parts={},
        stream_share=0.1,
        headroom=None if headroom is None else Estimate(headroom, headroom, headroom),
    )


def deep(blocks: int) -> PeelReport:
    """Block l's margin is (7 l mod blocks) / blocks: the worst ones are scattered over the depth."""
    layers = tuple(layer(index, (7 * index % blocks) / blocks, 0.5) for index in range(blocks))
    return dataclasses.replace(FULL, layers=layers)


def test_metrics_have_the_contracts_names() -> None:
    """A full report yields every summary, each measured layer's margin and headroom, and each map's value."""
    expected = {**SUMMARIES, "peel/margin/L000": 0.0, "peel/headroom/L000": 0.05, "peel/yes/head": 1.6}
    assert published(FULL).metrics == pytest.approx(expected)


def test_what_was_not_measured_is_left_out() -> None:
    """No bound, no gap, no margins: no key stands for them, and none holds a stand-in number."""
    report = dataclasses.replace(FULL, bound=None, gap=None, bounds=(), layers=(layer(3, None, 0.2),))
    metrics = published(report).metrics
    assert set(metrics) == set(SUMMARIES) - {"peel/bound", "peel/gap", "peel/worst_margin"} | {"peel/headroom/L003"}


def test_counts_of_layers_and_alerts() -> None:
    """Layers are counted by status, alerts by firing state, whatever else is pending."""
    layers = tuple(layer(index, 0.1, status=status) for index, status in enumerate(("below", "below", "undecided")))
    states = tuple(RuleState("r", f"model.layers.{i}", phase, 0, 1) for i, phase in enumerate(("firing", "pending")))
    metrics = published(dataclasses.replace(FULL, layers=layers), Verdict(states, ())).metrics
    assert (metrics["peel/layers_below"], metrics["peel/layers_undecided"], metrics["peel/alerts_firing"]) == (2, 1, 1)


def test_step_and_timestamp_come_from_the_checkpoint() -> None:
    """The timestamp is the commit time in milliseconds; a checkpoint without a step has no place in a series: it is a
    file named by its fingerprint, without metrics and tags.
    """
    one = published(FULL, committed_at=1_700_000_000.1234)
    assert (one.step, one.timestamp_ms) == (800, 1_700_000_000_123)
    unnumbered = published(dataclasses.replace(FULL, checkpoint=dataclasses.replace(FULL.checkpoint, step=None)))
    assert (unnumbered.metrics, unnumbered.tags) == ({}, {})
    assert set(unnumbered.files) == {f"peel/checkpoints/{FULL.checkpoint.fingerprint}.json"}


def test_files_hold_the_report_and_the_alerts() -> None:
    """The report is filed under its step, the alerts log as it is, and no log means no file."""
    line = report_line(FULL)
    assert published(FULL).files == {"peel/checkpoints/step-000000800.json": line}
    assert published(FULL, alerts_log="{}\n").files == {
        "peel/checkpoints/step-000000800.json": line,
        "peel/alerts.jsonl": "{}\n",
    }


def test_a_deep_model_keeps_to_max_series() -> None:
    """500 layers exceed 400 keys: all summaries stay, then the layers with the lowest margins, and no map."""
    metrics = published(deep(500)).metrics
    assert len(metrics) == 400
    assert set(SUMMARIES) < set(metrics)
    kept = {key: value for key, value in metrics.items() if key.startswith("peel/margin/")}
    assert sorted(kept.values()) == pytest.approx([rank / 500 for rank in range(196)])
    assert {key.replace("headroom", "margin") for key in metrics if "headroom" in key} == set(kept)
    assert not any(key.startswith("peel/yes/") for key in metrics)


@pytest.mark.parametrize("max_series", [0, 3, 8, 9, 18, 20, 21, 22])
def test_never_more_keys_than_max_series(max_series: int) -> None:
    """At any limit the number of keys is at most that, and everything is there as soon as everything fits."""
    metrics = published(deep(6), max_series=max_series).metrics
    everything = 8 + 12 + 1
    assert len(metrics) == (everything if max_series >= everything else min(max_series, 20))


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (("above", "above"), "above"),
        (("above", "undecided"), "undecided"),
        (("undecided", "below", "above"), "below"),
        ((), "undecided"),
    ],
)
def test_the_status_tag_is_the_worst_of_the_layers(statuses: tuple[str, ...], expected: str) -> None:
    """`below` when any layer is below, else `undecided` when any is or none was measured, else `above`."""
    layers = tuple(layer(index, 0.1, status=status) for index, status in enumerate(statuses))
    tags = published(dataclasses.replace(FULL, layers=layers)).tags
    assert tags == {"peel.status": expected, "peel.zone": "caution"}


def test_alert_tags_name_the_layers_that_fire() -> None:
    """Every rule with a state has a tag; a firing layer that this report lacks is named by its module."""
    states = (
        RuleState("layer_below", "model.layers.3", "firing", 0, 100),
        RuleState("layer_below", "model.layers.4", "firing", 1, 100),
        RuleState("layer_below", "model.layers.5", "pending", 1, 100),
        RuleState("layer_below", "model.layers.9", "firing", 0, 100),
        RuleState("calm", "model.layers.3", "inactive", 0, None),
    )
    report = dataclasses.replace(FULL, layers=tuple(layer(index, 0.1) for index in (3, 4, 5)))
    tags = published(report, Verdict(states, ())).tags
    assert tags["peel.alert.layer_below"] == "firing: L003, L004, model.layers.9"
    assert tags["peel.alert.calm"] == "inactive"


def test_every_key_is_one_that_trackers_take() -> None:
    """Metric keys and tags keep to MLflow's letters and lie beneath `peel`; values are floats."""
    labels = ("head", "ends-1_4", "user.2")
    bounds = tuple(BoundReport(label, (1,), "closed_form", Estimate(1.0, 0.9, 1.1), 1.0, True) for label in labels)
    one = published(dataclasses.replace(deep(3), bounds=bounds))
    assert all(re.fullmatch(r"peel/[/\w.\-]{1,240}", key) for key in one.metrics)
    assert all(type(value) is float for value in one.metrics.values())
    assert all(tag.startswith("peel.") for tag in one.tags)
    assert all(json.loads(text) for text in one.files.values())


def test_a_report_with_a_nan_is_not_published() -> None:
    """NaN crashes tracker pages: nothing is composed from a report that holds one."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        published(dataclasses.replace(FULL, loss=Estimate(nan, nan, nan)))
