"""The axis of training steps: which checkpoints are on it, which are drawn, and how wide each is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from peel_agent.records import History, PeelReport

MOST_CELLS = 30_000
"""What a browser draws and searches under the pointer without a wait that is felt."""

MOST_COLUMNS, FEWEST_COLUMNS = 160, 24

WIDE_PAUSE = 1.9
"""Usual distances between checkpoints; more than that without one is left blank."""


@dataclass(frozen=True)
class Span:
    """What one checkpoint covers of the axis, in steps."""

    left: float
    right: float


@dataclass(frozen=True)
class Timeline:
    """The reports by step, the last of each; the steps that are `drawn` in detail, each with what it covers."""

    by_step: Mapping[int, PeelReport]
    drawn: tuple[int, ...]
    spans: Mapping[int, Span]
    drawn_spans: Mapping[int, Span]
    repeated: int
    """Reports that another of the same step replaced."""

    @property
    def domain(self) -> tuple[float, float]:
        """The first and the last place on the axis."""
        if not self.spans:
            return (0.0, 1.0)
        return (min(span.left for span in self.spans.values()), max(span.right for span in self.spans.values()))


def timeline(history: History, *, bands: int) -> Timeline:
    """The axis of a history whose heat map has `bands` bands a layer."""
    by_step: dict[int, PeelReport] = {}
    stepped = [report for report in history.reports if report.checkpoint.step is not None]
    for report in stepped:
        assert report.checkpoint.step is not None
        by_step[report.checkpoint.step] = report
    ordered = dict(sorted(by_step.items()))
    steps = tuple(ordered)
    layers = max((len(report.layers) for report in ordered.values()), default=1) or 1
    most = max(FEWEST_COLUMNS, min(MOST_COLUMNS, MOST_CELLS // (layers * bands)))
    told = {notice.step for notice in history.notices if notice.step is not None}
    drawn = _chosen(steps, told & set(steps), most)
    missing = sorted({gap.step for gap in history.gaps or () if gap.step is not None} - set(steps))
    spans = _spans(steps, missing)
    return Timeline(ordered, drawn, spans, _merged(spans, drawn), len(stepped) - len(steps))


def _chosen(steps: Sequence[int], told: Iterable[int], most: int) -> tuple[int, ...]:
    """At most so many steps: the first and the last, those at which something was told, and evenly what is between."""
    if len(steps) <= most:
        return tuple(steps)
    chosen = {steps[0], steps[-1], *sorted(told)[-most // 2 :]}
    left = most - len(chosen)
    chosen |= {steps[round(place * (len(steps) - 1) / (left + 1))] for place in range(1, left + 1)}
    return tuple(sorted(chosen))


def _spans(steps: Sequence[int], missing: Sequence[int]) -> dict[int, Span]:
    """Each step reaches half-way to the next one, or to the next that is missing; a long pause stays blank."""
    if not steps:
        return {}
    usual = median([later - earlier for earlier, later in pairwise(steps)] or [1])
    left, right = {steps[0]: steps[0] - usual / 2}, {steps[-1]: steps[-1] + usual / 2}
    for earlier, later in pairwise(steps):
        between = [step for step in missing if earlier < step < later]
        if between:
            right[earlier], left[later] = (earlier + between[0]) / 2, (between[-1] + later) / 2
        elif later - earlier > WIDE_PAUSE * usual:
            right[earlier], left[later] = earlier + usual / 2, later - usual / 2
        else:
            right[earlier] = left[later] = (earlier + later) / 2
    return {step: Span(left[step], right[step]) for step in steps}


def _merged(spans: Mapping[int, Span], drawn: Sequence[int]) -> dict[int, Span]:
    """What each drawn step covers: with its own span those of the steps after it that are not drawn, up to a blank."""
    merged: dict[int, Span] = {}
    current: int | None = None
    wanted = set(drawn)
    for step, span in spans.items():
        if step in wanted:
            merged[step], current = span, step
        elif current is not None and merged[current].right == span.left:
            merged[current] = Span(merged[current].left, span.right)
        else:
            current = None
    return merged
