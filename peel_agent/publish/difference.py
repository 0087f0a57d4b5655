"""Two checkpoints or runs held against each other, as JSON and as a table: the contract's `peel-agent/compare/1`."""

from __future__ import annotations

import json

from peel_agent.publish.sheet import Column, Grid, Lines, Sheet, sheet
from peel_agent.records import Both, Compared, DifferenceReport, Estimate, LayerDifference, PlaceDifference, plain

LAST_STEPS = 20
"""Common steps of two runs that a table shows, the last ones; JSON and the page have all."""

_MARGINS = (
    Column("block", 22),
    Column("part", 9),
    Column("margin B - A [95 % interval]", 26),
    Column("over", 5, rank=1),
    Column("A", 9, rank=2),
    Column("B", 9, rank=3),
    Column("status A", 12, rank=5),
    Column("status B", 12, rank=6),
    Column("weights", rank=4),
)
_HEADROOMS = (
    Column("block", 22), Column("part", 9), Column("headroom B - A [95 % interval]", 26), Column("A", 9, rank=1),
    Column("B", 9, rank=2),
)  # fmt: skip
_STEPS = (
    Column("step", 9),
    Column("loss B - A [95 % interval]", 26),
    Column("A", 9, rank=1),
    Column("B", 9, rank=2),
    Column("statuses changed", rank=4),
    Column("first block by margin", rank=3),
)


def difference_line(report: DifferenceReport) -> str:
    """The comparison as one line of JSON, without the newline. ValueError for a NaN or an infinity."""
    return json.dumps({"schema": report.schema, **plain(report)}, allow_nan=False)


def difference_sheet(report: DifferenceReport) -> Sheet:
    """The comparison in words and tables: losses, blocks and parts, headroom, common steps, what was not compared."""
    parts: list[Lines | Grid] = [
        Lines((_side("A", report.a), _side("B", report.b), _probe(report)), "faint"),
        Lines((_loss_line(report.loss), *_weight_lines(report))),
    ]
    if report.layers:
        parts += [Lines(("",)), Grid(_MARGINS, tuple(row for layer in report.layers for row in _margins(layer)))]
    rooms = tuple(row for layer in report.layers for row in _headrooms(layer))
    if rooms:
        parts += [Lines(("",)), Grid(_HEADROOMS, rooms)]
    if report.steps:
        shown = report.steps[-LAST_STEPS:]
        left = len(report.steps) - len(shown)
        heading = f"at the last {len(shown)} of {len(report.steps):,} common steps" if left else "at every common step"
        rows = tuple(
            (
                str(step.step), _text(step.loss.difference), _value(step.loss.a), _value(step.loss.b),
                str(step.statuses_changed), "-" if step.first_by_margin is None else str(step.first_by_margin),
            )
            for step in shown
        )  # fmt: skip
        parts += [Lines(("", heading)), Grid(_STEPS, rows)]
    left_out = [f"note: {note}" for note in report.notes]
    for name, side in (("A", report.a), ("B", report.b)):
        left_out += [f"left out of {name}: {skipped.what}: {skipped.why}" for skipped in side.skipped]
    if left_out:
        parts.append(Lines(("", *left_out), "faint"))
    return sheet(*parts)


def _side(name: str, side: Compared) -> str:
    run = "" if side.run is None else f"run {side.run}, last "
    step = "" if side.checkpoint.step is None else f" (step {side.checkpoint.step:,})"
    model = side.model
    return (
        f"{name}: {run}{side.checkpoint.path}{step}: {side.checkpoint.format}, {model.family}, {model.blocks} blocks, "
        f"{model.parameters:,} parameters, {model.precision}"
    )


def _probe(report: DifferenceReport) -> str:
    probe = report.probe
    how = (
        "differences are paired by sequence, over those that both were measured on; A and B are each what `scan` gives"
        if report.pairing == "by sequence"
        else "differences are not paired: the half-widths of both intervals are added, which is mostly far too wide"
    )
    return (
        f"probe {probe.fingerprint}: {probe.confirm_tokens:,} confirm tokens in sequences of {probe.sequence_length}; "
        f"{probe.unit}; {how}"
    )


def _loss_line(loss: Both) -> str:
    return f"loss: A {_text(loss.a)}, B {_text(loss.b)}, B - A {_text(loss.difference)}"


def _weight_lines(report: DifferenceReport) -> list[str]:
    weights = report.weights
    if weights.why_not is not None:
        return [f"weights: not compared: {weights.why_not}"]
    blocks = (
        f"{len(weights.blocks)} of {len(report.layers)} blocks" if report.layers else f"{len(weights.blocks)} blocks"
    )
    outside = f"; outside of blocks {', '.join(weights.outside)}" if weights.outside else ""
    return [f"weights: {blocks} differ in some value{outside}"]


def _margins(layer: LayerDifference) -> list[tuple[str, ...]]:
    """A row for the block, and one for each part that was measured or whose status changed."""
    rows = [_margin_row(layer.name, "", layer.block, layer.weights_differ)]
    for name, part in layer.parts.items():
        if part.margin.a is not None or part.margin.b is not None or part.status_changed:
            rows.append(_margin_row(layer.name, name, part, None))
    return rows


def _margin_row(name: str, part: str, place: PlaceDifference, weights_differ: bool | None) -> tuple[str, ...]:
    weights = {None: "", True: "differ", False: "equal"}[weights_differ]
    both = place.margin
    statuses = (place.status_a or "-", place.status_b or "-")
    over = "-" if both.sequences is None else str(both.sequences)
    return (name, part, _text(both.difference), over, _value(both.a), _value(both.b), *statuses, weights)


def _headrooms(layer: LayerDifference) -> list[tuple[str, ...]]:
    return [
        (
            layer.name,
            "" if name == "block" else name,
            _text(place.headroom.difference),
            _value(place.headroom.a),
            _value(place.headroom.b),
        )
        for name, place in layer.places.items()
        if place.headroom is not None
    ]


def _text(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def _value(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:z.4f}"
