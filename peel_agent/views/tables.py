"""A history as the tables that the page draws and embeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peel_agent.errors import printable
from peel_agent.records import Estimate, History, LayerReport, PeelReport, Status
from peel_agent.views.lifetimes import Lifetime
from peel_agent.views.table import Table, Value
from peel_agent.views.timeline import Timeline

MOST_ALERTS = 2000
"""Alerts that the page keeps, the last ones."""

MOST_GAPS = 2000

BANDS = ("block", "attention", "mlp")


def bands_of(history: History) -> tuple[str, ...]:
    """What each layer's cell shows: the whole block, and its parts where any was measured."""
    has_parts = any(layer.parts for report in history.reports for layer in report.layers)
    return BANDS if has_parts else BANDS[:1]


def layer_table(line: Timeline) -> Table:
    """The layers by index, under the names that the newest report has for them."""
    names = {layer.index: layer.name for report in line.by_step.values() for layer in report.layers}
    return Table(("layer", "name"), [(index, printable(name)) for index, name in sorted(names.items())])


def checkpoint_table(line: Timeline) -> Table:
    """One row a checkpoint: its losses and its bound with their intervals, its zone, and what it covers of the axis."""
    names = ("loss", "bound", "gap")
    numbers = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    columns = ("step", "left", "right", "fingerprint", *numbers, "bound_label", "zone", "below", "undecided")
    rows = []
    for step, report in line.by_step.items():
        span, statuses = line.spans[step], [layer.status for layer in report.layers]
        rows.append(
            (
                step,
                span.left,
                span.right,
                printable(str(report.checkpoint.fingerprint)),
                *_interval(report.loss),
                *_interval(report.bound),
                *_interval(report.gap),
                None if report.bound_label is None else printable(str(report.bound_label)),
                report.zone if report.gap is not None else "not measured",
                statuses.count("below"),
                statuses.count("undecided"),
            )
        )
    return Table(columns, rows)


def column_table(line: Timeline) -> Table:
    """What each drawn checkpoint covers of the axis."""
    return Table(("step", "left", "right"), [(step, span.left, span.right) for step, span in line.drawn_spans.items()])


def cell_table(line: Timeline, bands: Sequence[str]) -> Table:
    """One row for each layer, band and drawn checkpoint; `top` and `bottom` are places on the axis of layers."""
    columns = ("step", "layer", "band", "margin", "low", "high", "status", "stand_in", "top", "bottom")
    rows = [
        row
        for step in line.drawn
        for layer in line.by_step[step].layers
        for row in _cells(step, layer, {band: index for index, band in enumerate(bands)})
    ]
    return Table(columns, rows)


def _cells(step: int, layer: LayerReport, bands: dict[str, int]) -> Iterator[tuple[Value, ...]]:
    block_and_parts: list[tuple[str, Status, Estimate | None, str | None]] = [
        ("block", layer.status, layer.margin, layer.best_reference)
    ]
    block_and_parts += [(name, part.status, part.margin, None) for name, part in layer.parts.items()]
    # The block has half of the cell, its parts a quarter each.
    edges = (0.0, 0.5, 0.75, 1.0) if len(bands) > 1 else (0.0, 1.0)
    for band, status, margin, stand_in in block_and_parts:
        if band in bands and status != "not_measured":
            place = bands[band]
            shown = None if stand_in is None else printable(stand_in)
            ends = (layer.index + edges[place], layer.index + edges[place + 1])
            yield (step, layer.index, band, *_interval(margin), printable(status), shown, *ends)


def margin_table(line: Timeline, layers: Sequence[int]) -> Table:
    """The margin of every layer at every checkpoint, drawn or not: a column a layer, by its index."""
    rows = []
    for step, report in line.by_step.items():
        margins = {layer.index: layer.margin for layer in report.layers}
        values = [margins.get(index) for index in layers]
        rows.append((step, *(None if margin is None else margin.value for margin in values)))
    return Table(("step", *map(str, layers)), rows)


def bound_table(line: Timeline) -> Table:
    """The loss of each cheap construction, at the drawn checkpoints."""
    rows = [
        (step, printable(str(bound.label)), *_interval(bound.value))
        for step in line.drawn
        for bound in line.by_step[step].bounds
    ]
    return Table(("step", "label", "loss", "low", "high"), rows)


def alert_table(alerts: Sequence[Lifetime], domain: tuple[float, float]) -> Table:
    """One row an alert, the last ones; `left` and `right` are where it is drawn, none for one without steps."""
    columns = ("rule", "subject", "label", "severity", "since", "until", "state", "left", "right", "text")
    rows = []
    for alert in alerts[-MOST_ALERTS:]:
        left = None if alert.since is None else float(alert.since)
        right = None if left is None else domain[1] if alert.until is None else float(alert.until)
        label = f"{alert.rule}: {alert.subject}"
        texts = tuple(map(printable, (alert.rule, alert.subject, label, alert.severity)))
        state = "over" if alert.is_over else "firing"
        rows.append((*texts, alert.since, alert.until, state, left, right, printable(alert.text)))
    return Table(columns, rows)


def gap_table(history: History) -> Table:
    """One row a checkpoint without a report, the last ones."""
    rows: list[tuple[Value, ...]] = [
        (gap.step, gap.cause, printable(gap.path), printable(gap.why)) for gap in history.gaps or ()
    ]
    return Table(("step", "cause", "path", "why"), rows[-MOST_GAPS:])


def share_table(report: PeelReport | None) -> Table:
    """What a better optimiser and what other weights than low-bit ones would still win, a row each and layer."""
    rows = [
        (layer.index, printable(layer.name), what, share)
        for layer in (report.layers if report is not None else ())
        for what, share in (("optimiser", layer.optimization_share), ("quantiser", layer.quantization_share))
        if share is not None
    ]
    return Table(("layer", "name", "what", "share"), rows)


def redundancy_table(report: PeelReport | None) -> Table:
    """What it costs to let one refitted block stand in for the blocks `first` to `last`."""
    rows = [
        (first, last, float(cost))
        for first, row in enumerate((report.redundancy if report is not None else None) or ())
        for last, cost in enumerate(row)
        if last > first
    ]
    return Table(("first", "last", "cost"), rows)


def newest_with(reports: Sequence[PeelReport], what: str) -> PeelReport | None:
    """The newest report that has shares, or redundancy."""
    has: dict[str, Any] = {
        "shares": lambda report: any(layer.optimization_share is not None for layer in report.layers),
        "redundancy": lambda report: bool(report.redundancy),
    }
    return next((report for report in reversed(reports) if has[what](report)), None)


def _interval(estimate: Estimate | None) -> tuple[Value, Value, Value]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
