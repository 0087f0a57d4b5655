"""One checkpoint's report and verdict as the metrics, tags and files that a tracker keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf

from peel_agent.publish.form import report_line
from peel_agent.publish.words import headline
from peel_agent.records import LayerReport, PeelReport, Publication, RuleState, Status, Verdict

ALERTS_FIRING = "peel/alerts_firing"


def publication(
    report: PeelReport,
    verdict: Verdict,
    *,
    committed_at: float,
    max_series: int,
    charted: frozenset[str] = frozenset(),
) -> Publication:
    """What is sent for one checkpoint, with the names of the contract.

    `committed_at` is the checkpoint's own time in Unix seconds. `charted` are the keys that the run's earlier
    checkpoints were sent under: with those of this one they are never more than `max_series`.

    A checkpoint without a step has no place in a series: it is a file named by its fingerprint, without metrics and
    tags. ValueError when the report holds a NaN or an infinity.
    """
    step = report.checkpoint.step
    name = f"step-{step:09d}" if step is not None else report.checkpoint.fingerprint
    files = {f"peel/checkpoints/{name}.json": report_line(report)}
    return Publication(
        step=step or 0,
        timestamp_ms=round(committed_at * 1000),
        metrics=_metrics(report, verdict, max_series, charted) if step is not None else {},
        tags=_tags(report, verdict) if step is not None else {},
        files=files,
        headline=headline(report) if step is not None else "",
    )


def publication_of_the_past(
    report: PeelReport, *, committed_at: float, max_series: int, charted: frozenset[str]
) -> Publication:
    """The same of a checkpoint whose alerts are over: without them and their count, and under no new key."""
    sent = publication(report, Verdict((), ()), committed_at=committed_at, max_series=max_series, charted=charted)
    shown = (charted or frozenset(sent.metrics)) - {ALERTS_FIRING}
    return dataclasses.replace(sent, metrics={key: value for key, value in sent.metrics.items() if key in shown})


def _metrics(report: PeelReport, verdict: Verdict, max_series: int, charted: frozenset[str]) -> dict[str, float]:
    """Summaries, then layers from the worst on, then margins of parts, then maps, as far as there is room.

    What was charted once stays: a curve without holes says more than another layer at each checkpoint.
    """
    every = {ALERTS_FIRING: float(len(verdict.firing))} | series_of(report)
    new = [key for key in every if key not in charted]
    shown = charted.union(new[: max(0, max_series - len(charted))])
    return {key: value for key, value in every.items() if key in shown}


def series_of(report: PeelReport) -> dict[str, float]:
    """Every number of a report that trackers may get, by its key; not capped, and without the count of alerts."""
    maps = {f"peel/yes/{bound.label}": bound.value.value for bound in report.bounds}
    return {**_summaries(report), **dict(_layer_series(report)), **maps}


def _summaries(report: PeelReport) -> dict[str, float]:
    timing = report.timing
    statuses = _measured(layer.status for layer in report.layers)
    parts = _measured(part.status for layer in report.layers for part in layer.parts.values())
    summaries = {
        "peel/loss": report.loss.value,
        "peel/bound": report.bound.value if report.bound is not None else None,
        "peel/gap": report.gap.value if report.gap is not None else None,
        "peel/layers_below": float(statuses.count("below")) if statuses else None,
        "peel/layers_undecided": float(statuses.count("undecided")) if statuses else None,
        "peel/parts_below": float(parts.count("below")) if parts else None,
        "peel/worst_margin": worst_margin(report),
        "peel/seconds": timing.load + timing.capture + timing.solve + timing.score,
    }
    return {key: value for key, value in summaries.items() if value is not None}


def worst_margin(report: PeelReport) -> float | None:
    """The least margin of a block, in nats per token; None when none was measured."""
    return min((layer.margin.value for layer in report.layers if layer.margin is not None), default=None)


def _measured(statuses: Iterable[Status]) -> list[Status]:
    """The statuses that stand on a measured margin."""
    return [status for status in statuses if status != "not_measured"]


def _layer_series(report: PeelReport) -> Iterator[tuple[str, float]]:
    """What is measured of each layer: those with a finding first, then by their margins, those without one last.

    The margins of parts come after all of this: they are the first to be cut.
    """
    ordered = sorted(report.layers, key=_worst_first)
    for layer in ordered:
        estimates = {"margin": layer.margin, "headroom": layer.headroom, "progress": layer.progress}
        for name, measured in estimates.items():
            if measured is not None:
                yield f"peel/{name}/{_label(layer.index)}", measured.value
        if layer.change is not None:
            yield f"peel/change/{_label(layer.index)}", layer.change.ratio
    for layer in ordered:
        for name, part in layer.parts.items():
            if part.margin is not None:
                yield f"peel/margin_{name}/{_label(layer.index)}", part.margin.value


def _worst_first(layer: LayerReport) -> tuple[bool, float]:
    return (layer.finding is None, inf if layer.margin is None else layer.margin.value)


def _tags(report: PeelReport, verdict: Verdict) -> dict[str, str]:
    labels = {layer.name: _label(layer.index) for layer in report.layers}
    labels |= {
        f"{layer.name}/{part}": f"{_label(layer.index)}/{part}" for layer in report.layers for part in layer.parts
    }
    tags: dict[str, str] = {"peel.status": _status(report), "peel.zone": _zone(report)}
    return tags | alert_tags(verdict.states, labels)


def alert_tags(states: Sequence[RuleState], labels: Mapping[str, str]) -> dict[str, str]:
    """The tag of every rule: what of it fires, by its label; what has none (it was not measured) by its own name."""
    firing: dict[str, list[str]] = {state.rule: [] for state in states}
    for state in states:
        if state.phase == "firing":
            firing[state.rule].append(labels.get(state.subject, state.subject))
    return {
        f"peel.alert.{rule}": f"firing: {', '.join(subjects)}" if subjects else "inactive"
        for rule, subjects in firing.items()
    }


def _status(report: PeelReport) -> Status:
    """The worst status of the layers that were measured; `not_measured` when none was, which is no good news."""
    statuses = _measured(layer.status for layer in report.layers)
    worst_first: tuple[Status, ...] = ("below", "undecided", "above")
    return next((status for status in worst_first if status in statuses), "not_measured")


def _zone(report: PeelReport) -> str:
    """The zone; without a gap there is none to decide."""
    return report.zone if report.gap is not None else "not_measured"


def _label(index: int) -> str:
    return f"L{index:03d}"
