"""The charts of a comparison; their data is named, and given apart."""

from __future__ import annotations

from peel_agent.views.specs import Chart, Spec, chart_spec, interval_words, number, steps_axis, text, whole, y_axis

PARTS: Spec = {
    "field": "part",
    "type": "nominal",
    "scale": {"domain": ["block", "attention", "mlp"], "range": ["#2f6fde", "#c2410c", "#3a9d5d"]},
    "legend": {"title": None, "orient": "top"},
}

NOTHING: Spec = {
    "data": {"values": [{"zero": 0}]},
    "mark": {"type": "rule", "strokeDash": [4, 3], "stroke": "#808080"},
    "encoding": {"y": {"field": "zero", "type": "quantitative"}},
}
"""The line at 0: an interval that does not cross it is a difference for certain."""


def places_chart(key: str, title: str, what: str, unit: str) -> Chart:
    """The difference of one number of each block and part, a point with its interval; table `key`."""
    summary = (
        f"Difference of {what}, B - A, of each block and its parts, with its interval. An interval that does not cross "
        "the dashed line at 0 is a difference for certain; above it B has more."
    )
    x = {"field": "layer", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0, "labelOverlap": True}}
    offset = {"field": "part", "type": "nominal", "scale": {"domain": ["block", "attention", "mlp"]}}
    y = {"field": "difference", "type": "quantitative", "title": f"B - A, {unit}", "axis": y_axis()}
    tooltip: list[Spec] = [
        text("name", "block"), text("part", "of it"), text("interval", f"B - A, {unit}"), number("a", "A"),
        number("b", "B"), text("status_a", "status A"), text("status_b", "status B"),
    ]  # fmt: skip
    place: Spec = {"x": x, "xOffset": offset, "color": PARTS, "tooltip": tooltip}
    rule = {
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {**place, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
    }
    point = {"mark": {"type": "point", "filled": True, "size": 45}, "encoding": {**place, "y": y}}
    spec = chart_spec(
        key,
        summary,
        260,
        data={"name": key},
        transform=[{"filter": "isValid(datum.difference)"}, interval_words("difference", "low", "high")],
        layer=[NOTHING, rule, point],
    )
    return Chart(key, title, summary, (key,), spec)


def step_chart(domain: tuple[float, float], unit: str) -> Chart:
    """The difference of the losses of two runs at every common step."""
    summary = (
        "Difference of the losses, B - A, at every common step, with its interval: where that lies under the dashed "
        "line at 0, B has the lower loss for certain."
    )
    x = steps_axis(domain)
    y = {"field": "difference", "type": "quantitative", "title": f"B - A, {unit}", "axis": y_axis()}
    tooltip = [
        whole("step", "step"), text("interval", f"B - A, {unit}"), number("a", "A"), number("b", "B"),
        whole("statuses_changed", "statuses that differ"),
    ]  # fmt: skip
    band = {
        "mark": {"type": "area", "opacity": 0.2, "color": "#2f6fde", "tooltip": None},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
    }
    line = {
        "mark": {"type": "line", "color": "#2f6fde", "point": {"filled": True, "size": 30}},
        "encoding": {"x": x, "y": y, "tooltip": tooltip},
    }
    spec = chart_spec(
        "steps",
        summary,
        220,
        data={"name": "steps"},
        transform=[interval_words("difference", "low", "high")],
        layer=[NOTHING, band, line],
    )
    return Chart("steps", "Loss over training", summary, ("steps",), spec)
