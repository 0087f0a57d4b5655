"""What the page and the images hold: tables and the charts of them, for one history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import quantiles

from peel_agent.records import History, PeelReport
from peel_agent.views import charts, tables
from peel_agent.views.lifetimes import Lifetime, lifetimes
from peel_agent.views.specs import Chart
from peel_agent.views.table import Table
from peel_agent.views.timeline import Timeline, timeline

SMALLEST_RANGE = 0.05
"""Of the colours, in nats per token: less than that between layers is not made to look like much."""


@dataclass(frozen=True)
class Content:
    """Tables by name, and the charts that have something to show; `newest` is the report that the page speaks of."""

    newest: PeelReport
    line: Timeline
    alerts: tuple[Lifetime, ...]
    tables: Mapping[str, Table]
    charts: tuple[Chart, ...]


def content_of(history: History) -> Content:
    """The content of a history with at least one report."""
    bands = tables.bands_of(history)
    line = timeline(history, bands=len(bands))
    stepped = list(line.by_step.values())
    newest = stepped[-1] if stepped else history.reports[-1]
    alerts = lifetimes(history.notices)
    layers = tables.layer_table(line)
    indices = [int(str(index)) for index, _ in layers.rows]
    shares, redundancy = (tables.newest_with(stepped or history.reports, what) for what in ("shares", "redundancy"))
    held: dict[str, Table] = {
        "checkpoints": tables.checkpoint_table(line),
        "columns": tables.column_table(line),
        "layers": layers,
        "cells": tables.cell_table(line, bands),
        "bounds": tables.bound_table(line),
        "alerts": tables.alert_table(alerts, line.domain),
        "gaps": tables.gap_table(history),
        "shares": tables.share_table(shares),
        "redundancy": tables.redundancy_table(redundancy),
    }
    if len(line.drawn) < len(line.by_step):
        held["margins"] = tables.margin_table(line, indices)
    return Content(newest, line, alerts, held, tuple(_charts(line, held, indices, newest)))


def _charts(line: Timeline, held: Mapping[str, Table], layers: list[int], newest: PeelReport) -> list[Chart]:
    domain, words = line.domain, newest.probe.unit
    drawn: list[Chart] = []
    if line.by_step:
        has_bound = any(report.bound is not None for report in line.by_step.values())
        drawn.append(charts.loss_chart(domain, words, has_bound=has_bound, has_maps=bool(held["bounds"].rows)))
    if held["cells"].rows:
        columns = len(line.drawn)
        drawn.append(charts.heat_map(domain, layers, _colors(held["cells"]), words, columns=columns))
    placed = [row for row in held["alerts"].rows if row[7] is not None]
    if placed and line.by_step:
        drawn.append(charts.alert_chart(domain, len({row[2] for row in placed})))
    causes = {str(row[1]) for row in held["gaps"].rows if row[0] is not None}
    if causes and line.by_step:
        drawn.append(charts.gap_chart(domain, [cause for cause in charts.CAUSES if cause in causes]))
    if held["cells"].rows:
        drawn.append(charts.layer_chart(domain, layers, _lowest(held["cells"]), words))
    if held["shares"].rows:
        drawn.append(charts.share_chart(len({row[0] for row in held["shares"].rows}), words))
    if held["redundancy"].rows:
        drawn.append(charts.redundancy_chart(len({row[1] for row in held["redundancy"].rows}) + 1, words))
    return drawn


def _colors(cells: Table) -> tuple[float, float]:
    """The margins at both ends of the colours: nothing or the least, and what nine of ten do not exceed."""
    margins = [float(str(row[3])) for row in cells.rows if row[3] is not None]
    if not margins:
        return (0.0, SMALLEST_RANGE)
    high = quantiles(margins, n=10)[-1] if len(margins) > 1 else margins[0]
    low = min(0.0, quantiles(margins, n=50)[0] if len(margins) > 1 else margins[0])
    return (low, max(high, low + SMALLEST_RANGE))


def _lowest(cells: Table) -> int:
    """The layer whose block has the smallest margin at the last checkpoint that is drawn."""
    last = max(int(str(row[0])) for row in cells.rows)
    blocks = [row for row in cells.rows if row[2] == "block" and row[3] is not None]
    candidates = [row for row in blocks if row[0] == last] or blocks or list(cells.rows)
    return int(str(min(candidates, key=lambda row: float(str(row[3] or 0.0)))[1]))
