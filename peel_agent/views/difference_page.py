"""The page of a comparison, in the report page's frame."""

from __future__ import annotations

from collections.abc import Mapping

from peel_agent.errors import printable
from peel_agent.records import Both, Compared, DifferenceReport, LayerDifference, PlaceDifference, plain
from peel_agent.views.difference_charts import places_chart, step_chart
from peel_agent.views.frame import Provenance, Shown, page, probe_words, shown
from peel_agent.views.specs import Chart
from peel_agent.views.table import DIGITS, Table, Value

_PLACES = (
    "layer", "name", "part", "difference", "low", "high", "a", "b", "status_a", "status_b", "sequences",
    "weights_differ",
)  # fmt: skip
_STEPS = ("step", "difference", "low", "high", "a", "b", "statuses_changed", "first_by_margin")
_HIDDEN = ("layer",)


def difference_page(report: DifferenceReport, verdict: str, provenance: Provenance) -> str:
    """The page; `verdict` is what it comes to in words. Raises ConfigurationError without the extra `report`."""
    tables = _tables(report)
    charts = _charts(report, tables)
    return page(
        title="peel-agent compare",
        schema=report.schema,
        data=_form(report, verdict, provenance, tables, charts),
        name="B against A",
        place=f"A: {_called(report.a)} | B: {_called(report.b)}",
        verdict=verdict,
        situation=_situation(report),
        findings_heading="Statuses that changed",
        findings=_changed(report),
        charts=[(chart, _beside(tables[chart.key])) for chart in charts],
        notes=[printable(note) for note in report.notes],
        unchecked=_unchecked(report),
        reproduce=_reproduce(report, provenance),
    )


def _form(
    report: DifferenceReport, verdict: str, provenance: Provenance, tables: Mapping[str, Table], charts: list[Chart]
) -> dict[str, object]:
    """The comparison as `--format json` has it, and what the charts draw."""
    return {
        "schema": report.schema,
        **plain(report),
        "made": plain(provenance),
        "verdict": verdict,
        "unit": report.probe.unit,
        "significant_digits": DIGITS,
        "tables": {name: table.form() for name, table in tables.items()},
        "charts": {chart.key: {"tables": list(chart.tables), "spec": chart.spec} for chart in charts},
    }


def _tables(report: DifferenceReport) -> dict[str, Table]:
    margins: list[tuple[Value, ...]] = []
    headrooms: list[tuple[Value, ...]] = []
    for layer in report.layers:
        for part, place in layer.places.items():
            margins.append(_row(layer, part, place, place.margin))
            if place.headroom is not None:
                headrooms.append(_row(layer, part, place, place.headroom))
    steps: list[tuple[Value, ...]] = [
        (step.step, *_numbers(step.loss), step.statuses_changed, step.first_by_margin) for step in report.steps
    ]
    return {
        "margins": Table(_PLACES, margins),
        "headroom": Table(_PLACES, headrooms),
        "steps": Table(_STEPS, steps),
    }


def _row(layer: LayerDifference, part: str, place: PlaceDifference, both: Both) -> tuple[Value, ...]:
    statuses = (place.status_a, place.status_b)
    name = printable(layer.name)
    return (layer.index, name, part, *_numbers(both), *statuses, both.sequences, layer.weights_differ)


def _numbers(both: Both) -> tuple[Value, ...]:
    """The difference with the ends of its interval, and the two values."""
    interval = (None, None, None) if both.difference is None else _ends(both)
    return (*interval, both.a.value if both.a is not None else None, both.b.value if both.b is not None else None)


def _ends(both: Both) -> tuple[Value, Value, Value]:
    assert both.difference is not None
    return (both.difference.value, both.difference.low, both.difference.high)


def _charts(report: DifferenceReport, tables: Mapping[str, Table]) -> list[Chart]:
    charts = []
    if len(report.steps) > 1:
        steps = [common.step for common in report.steps]
        charts.append(step_chart((float(min(steps)), float(max(steps))), report.probe.unit))
    if any(row[3] is not None for row in tables["margins"].rows):
        charts.append(places_chart("margins", "What each block earns", "margins", report.probe.unit))
    if any(row[3] is not None for row in tables["headroom"].rows):
        charts.append(places_chart("headroom", "What each block could still win", "headroom", report.probe.unit))
    return charts


def _beside(table: Table) -> Shown:
    return shown(table, [name for name in table.columns if name not in _HIDDEN])


def _called(side: Compared) -> str:
    return side.where if side.run is None else f"run {side.run} ({side.where})"


def _situation(report: DifferenceReport) -> list[str]:
    """The losses, and which of the weights differ."""
    loss, weights = report.loss, report.weights
    sentences = [f"Loss of A {loss.a}, of B {loss.b} {report.probe.unit}."]
    if weights.why_not is not None:
        sentences.append(f"Weights were not compared: {weights.why_not}.")
    else:
        of = f" of {len(report.layers)}" if report.layers else ""
        outside = f"; so do {', '.join(weights.outside)}" if weights.outside else ""
        sentences.append(f"Blocks whose weights differ in some value: {len(weights.blocks)}{of}{outside}.")
    if report.pairing == "none":
        sentences.append(
            "Of two runs only the reports are there, so nothing is paired: each difference has the half-widths of both "
            "intervals added."
        )
    return sentences


def _changed(report: DifferenceReport) -> list[tuple[str, str, list[str]]]:
    rows: list[tuple[str, str, list[str]]] = []
    for layer in report.layers:
        for part, place in layer.places.items():
            if place.status_changed:
                subject = layer.name if part == "block" else f"{layer.name}/{part}"
                words = f"was {place.status_a} in A and is {place.status_b} in B"
                rows.append((printable(subject), printable(words), []))
    return rows


def _unchecked(report: DifferenceReport) -> list[tuple[str, str]]:
    rows = [
        (printable(f"{name}: {skipped.what}"), printable(skipped.why))
        for name, side in (("A", report.a), ("B", report.b))
        for skipped in side.skipped
    ]
    if report.weights.why_not is not None:
        rows.append(("weights", printable(report.weights.why_not)))
    return rows


def _reproduce(report: DifferenceReport, provenance: Provenance) -> list[tuple[str, str]]:
    rows = [
        ("this page", provenance.command),
        *((name, _side(side)) for name, side in (("A", report.a), ("B", report.b))),
        ("probe", probe_words(report.probe)),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
        ("made", provenance.at),
    ]
    return [(what, printable(words)) for what, words in rows]


def _side(side: Compared) -> str:
    checkpoint, model = side.checkpoint, side.model
    return (
        f"{checkpoint.path} ({checkpoint.format}, {checkpoint.fingerprint}): {model.family}, {model.blocks} blocks, "
        f"{model.parameters:,} parameters, {model.precision}"
    )
