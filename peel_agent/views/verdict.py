"""What a history comes to, in a sentence that needs no paper."""

from __future__ import annotations

from collections.abc import Sequence

from peel_agent.records import ACCUSING, History, PeelReport, Zone
from peel_agent.views.lifetimes import Lifetime

NAMED = 3
"""Findings that the sentence holds; the others are counted."""

ZONES: dict[Zone, str] = {
    "effective": "the run is better than every cheap model that was built from its own layers",
    "caution": "a cheap model built from the run's own layers is better than the run",
    "ineffective": "even the simplest cheap model built from the run's own layers is better than the run",
    "undecided": "it is not certain whether a cheap model built from the run's own layers is better than the run",
}
"""The zone in words (method.md 3, 7)."""


def verdict(report: PeelReport) -> str:
    """One sentence on a checkpoint: what is wrong, or that nothing was found, or that nothing was looked at."""
    at = f"At step {report.checkpoint.step:,}" if report.checkpoint.step is not None else "In the last export"
    accused = [layer.finding for layer in report.layers if layer.finding is not None and layer.finding.kind in ACCUSING]
    words = [*([report.finding.words] if report.finding is not None else []), *(finding.words for finding in accused)]
    if words:
        more = len(words) - NAMED
        others = f"; and {more} more {'is' if more == 1 else 'are'} listed below" if more > 0 else ""
        return f"{at}: {'; '.join(words[:NAMED])}{others}."
    measured = [layer for layer in report.layers if layer.status != "not_measured"]
    undecided = sum(layer.status == "undecided" for layer in measured)
    if not measured:
        return f"{at}, margins were not measured, so nothing is known of single layers."
    if undecided:
        return (
            f"{at}, nothing was found in {len(measured) - undecided} of {len(measured)} layers, and "
            f"{undecided} could not be decided."
        )
    return f"{at}, nothing was found in any of {len(measured)} layers."


def standing(report: PeelReport) -> str:
    """The loss against its bound, in a sentence."""
    if report.bound is not None and report.gap is not None:
        against = f"Loss {report.loss.value:.4f}, bound {report.bound.value:.4f} {report.probe.unit}"
        if report.zone == "caution" and report.bound_label == "head":
            return f"{against}: refitting the output matrix alone gains that much, so the gap is not the layers'."
        return f"{against}: {ZONES[report.zone]}."
    return f"Loss {report.loss.value:.4f} {report.probe.unit}; no bound was measured."


def situation(report: PeelReport, alerts: Sequence[Lifetime], history: History) -> tuple[str, ...]:
    """Short sentences that go with the verdict: the loss against its bound, the alerts, the checkpoints."""
    sentences = [standing(report)]
    firing = sum(not alert.is_over for alert in alerts)
    over = len(alerts) - firing
    sentences.append(f"Alerts: {firing} firing, {over} over." if alerts else "No alert was ever told.")
    count = len(history.reports) + history.left_out
    peeled = f"{count:,} checkpoint{'' if count == 1 else 's'} peeled"
    if history.gaps is None:
        sentences.append(f"{peeled}; a tracker does not know which were missed.")
    else:
        sentences.append(f"{peeled}, {len(history.gaps):,} without a report.")
    return tuple(sentences)
