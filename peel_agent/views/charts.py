"""The charts as Vega-Lite specifications. Their data is named, and given apart: a page draws them, and so do images."""

from __future__ import annotations

from collections.abc import Sequence

from peel_agent.views.specs import (
    Chart,
    Spec,
    chart_spec,
    interval_words,
    number,
    steps_axis,
    text,
    whole,
    y_axis,
)

MOST_LIFETIMES = 40
"""Alerts that are drawn, the last ones."""

ROW_PIXELS = (6.0, 26.0)
"""The height of a layer's row, the least and the most."""

MAP_PIXELS = 640.0

BOUND_COLOR = "#c2410c"

CAUSES = ("rotated", "refused", "given up", "overtaken", "unreadable report")


def loss_chart(domain: tuple[float, float], unit: str, *, has_bound: bool, has_maps: bool) -> Chart:
    """Loss and bound with their intervals over the zones."""
    summary = (
        "Loss of the run, and its bound: the loss of the best cheap model built from the run's own layers, up to then. "
        "Both with their intervals; dotted lines are all such models, and the ground shows the zone."
    )
    zones = {
        "data": {"name": "checkpoints"},
        "mark": {"type": "rect", "opacity": 0.25},
        "encoding": {
            "x": steps_axis(domain, "left"),
            "x2": {"field": "right"},
            "fill": {
                "field": "zone",
                "type": "nominal",
                "scale": {
                    "domain": ["effective", "caution", "ineffective", "undecided", "not measured"],
                    "range": ["#3a9d5d", "#e0a800", "#d1495b", "#8a8f98", "transparent"],
                },
                "legend": {"title": "zone", "orient": "top", "columns": 3},
            },
            "tooltip": [
                whole("step", "step"), text("zone", "zone"), text("interval", "loss"), text("bound_words", "bound"),
            ],
        },
    }  # fmt: skip
    series = {"loss": "#2f6fde", **({"bound": BOUND_COLOR} if has_bound else {})}
    legend = {"title": None, "orient": "top"}
    layers: list[Spec] = [zones]
    if has_maps:
        layers.append(
            {
                "data": {"name": "bounds"},
                "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.45, "color": BOUND_COLOR},
                "encoding": {
                    "x": steps_axis(domain),
                    "y": {"field": "loss", "type": "quantitative"},
                    "detail": {"field": "label", "type": "nominal"},
                    "strokeDash": {"value": [2, 2]},
                },
            }
        )
    for name, color in series.items():
        x = steps_axis(domain)
        y = {"field": name, "type": "quantitative", "title": unit, "scale": {"zero": False}, "axis": y_axis()}
        low, high = {**y, "field": f"{name}_low"}, {"field": f"{name}_high"}
        band = {"mark": {"type": "area", "opacity": 0.2, "color": color}, "encoding": {"x": x, "y": low, "y2": high}}
        shade = {"datum": name, "scale": {"domain": list(series), "range": list(series.values())}, "legend": legend}
        point = {"filled": True, "size": 18}
        line = {"mark": {"type": "line", "point": point}, "encoding": {"x": x, "y": y, "color": shade}}
        layers += [{"data": {"name": "checkpoints"}, **layer} for layer in (band, line)]
    for layer in layers[1:]:
        layer["mark"]["tooltip"] = None
    bound = interval_words("bound", "bound_low", "bound_high", "bound_words")
    zones["transform"] = [interval_words("loss", "loss_low", "loss_high"), bound]
    tables = ("checkpoints", "bounds") if has_maps else ("checkpoints",)
    return Chart("loss", "Loss against its bound", summary, tables, chart_spec("loss", summary, 220, layer=layers))


def heat_map(
    domain: tuple[float, float], layers: Sequence[int], colors: tuple[float, float], unit: str, *, columns: int
) -> Chart:
    """Margins over layer and step: the darker, the less a layer earns; what is undecided is hatched, not coloured."""
    summary = (
        "Margin of each layer at each checkpoint: how much loss the layer saves beside a cheap stand-in. Dark saves "
        "little; hatched is undecided; framed in red is below; blank was not measured. "
        "A cell's upper half is the whole block, below it are its attention and its MLP."
    )
    first, last = (min(layers), max(layers) + 1) if layers else (0, 1)
    row = min(ROW_PIXELS[1], max(ROW_PIXELS[0], MAP_PIXELS / (last - first)))
    sparse = [index + 0.5 for index in layers if index % max(1, round(13 / row)) == 0]
    y = {
        "field": "top",
        "type": "quantitative",
        "title": "layer",
        "scale": {"domain": [first, last], "reverse": True, "nice": False, "zero": False},
        "axis": y_axis(values=sparse, labelExpr="format(floor(datum.value), 'd')", grid=False, ticks=False),
    }
    place = {"x": steps_axis(domain, "left"), "x2": {"field": "right"}, "y": y, "y2": {"field": "bottom"}}
    tooltip = [
        text("name", "layer"), text("band", "of it"), whole("step", "step"), text("status", "status"),
        text("interval", f"margin, {unit}"), text("stand", "stand-in"),
    ]  # fmt: skip
    color = {
        "field": "margin",
        "type": "quantitative",
        "title": f"margin, {unit}",
        "scale": {"type": "symlog", "constant": 0.01, "domain": list(colors), "clamp": True, "scheme": "viridis"},
        "legend": {"orient": "top", "gradientLength": 220, "format": ".2~g"},
    }
    filled = {
        "transform": [{"filter": "datum.status != 'undecided'"}],
        "mark": {"type": "rect"},
        "encoding": {
            **place,
            "color": color,
            "stroke": {"condition": {"test": "datum.status == 'below'", "value": "#ff2d55"}, "value": None},
            "strokeWidth": {"value": 1 if row >= 2 * ROW_PIXELS[0] else 0.4},
            "tooltip": tooltip,
        },
    }
    ground, hatch = _undecided(place, tooltip, columns)
    spec = chart_spec(
        "heat_map",
        summary,
        row * (last - first),
        data={"name": "cells"},
        transform=[
            {"lookup": "step", "from": {"data": {"name": "columns"}, "key": "step", "fields": ["left", "right"]}},
            {"lookup": "layer", "from": {"data": {"name": "layers"}, "key": "layer", "fields": ["name"]}},
            interval_words("margin", "low", "high"),
            {"calculate": "isValid(datum.stand_in) ? datum.stand_in : '-'", "as": "stand"},
        ],
        layer=[ground, filled, hatch],
    )
    return Chart("heat_map", "What each layer earns", summary, ("cells", "columns", "layers"), spec)


def _undecided(place: Spec, tooltip: list[Spec], columns: int) -> tuple[Spec, Spec]:
    """The cells that are undecided: their ground, and the strokes over it."""
    ground = {
        "transform": [{"filter": "datum.status == 'undecided'"}],
        "mark": {"type": "rect", "fill": "#808080", "fillOpacity": 0.08, "stroke": "#808080", "strokeWidth": 0.5},
        "encoding": {**place, "tooltip": tooltip},
    }
    # So many strokes a cell that they are about eight pixels apart.
    strokes = max(1, round(90 / max(columns, 1)))
    width = f"(datum.right - datum.left) / {strokes}"
    hatch = {
        "transform": [
            {"filter": "datum.status == 'undecided'"},
            {"calculate": f"sequence({strokes})", "as": "stroke"},
            {"flatten": ["stroke"]},
            {"calculate": f"datum.left + datum.stroke * {width}", "as": "from"},
            {"calculate": f"datum.left + (datum.stroke + 1) * {width}", "as": "to"},
        ],
        "mark": {"type": "rule", "stroke": "#808080", "strokeWidth": 1.2, "tooltip": None},
        "encoding": {
            "x": {**place["x"], "field": "from"},
            "x2": {"field": "to"},
            "y": {**place["y"], "field": "bottom"},
            "y2": {"field": "top"},
        },
    }
    return ground, hatch


def alert_chart(domain: tuple[float, float], rows: int) -> Chart:
    """Each alert as a bar from the step at which it began to the one at which it ended."""
    summary = "Each alert from the step that it is about to the step at which it ended; an arrow goes on."
    y = {
        "field": "label",
        "type": "nominal",
        "title": "alert",
        "sort": None,
        "axis": y_axis(ticks=False, labels=False),
    }
    color = {
        "field": "severity",
        "type": "nominal",
        "scale": {"domain": ["info", "warning", "critical"], "range": ["#4f8fd9", "#d98e04", "#d1345b"]},
        "legend": {"orient": "top"},
    }
    tooltip = [
        text("rule", "rule"), text("subject", "subject"), text("state", "state"), whole("since", "since step"),
        whole("until", "until step"), text("text", "what it says"),
    ]  # fmt: skip
    bar = {
        "mark": {"type": "bar", "height": 8, "yOffset": 7, "cornerRadius": 2},
        "encoding": {
            "x": steps_axis(domain, "left"),
            "x2": {"field": "right"},
            "y": y,
            "color": color,
            "tooltip": tooltip,
        },
    }
    arrow = {
        "transform": [{"filter": "datum.state == 'firing'"}],
        "mark": {
            "type": "point",
            "shape": "triangle-right",
            "filled": True,
            "size": 200,
            "xOffset": -6,
            "yOffset": 7,
            "opacity": 1,
        },
        "encoding": {"x": steps_axis(domain, "right"), "y": y, "color": color, "tooltip": tooltip},
    }
    label = {
        "mark": {"type": "text", "align": "left", "dy": -6, "tooltip": None},
        "encoding": {"x": {"value": 4}, "y": y, "text": {"field": "label", "type": "nominal"}},
    }
    spec = chart_spec(
        "alerts",
        summary,
        min(rows, MOST_LIFETIMES) * 32,
        data={"name": "alerts"},
        transform=[
            {"filter": "isValid(datum.left)"},
            {"window": [{"op": "row_number", "as": "place"}], "sort": [{"field": "left", "order": "descending"}]},
            {"filter": f"datum.place <= {MOST_LIFETIMES}"},
        ],
        layer=[bar, arrow, label],
    )
    return Chart("alerts", "Alerts", summary, ("alerts",), spec)


def gap_chart(domain: tuple[float, float], causes: Sequence[str]) -> Chart:
    """The checkpoints without a report, by cause."""
    summary = "Checkpoints without a report, at their step, by cause."
    cause = {"field": "cause", "type": "nominal"}
    encoding = {
        "x": steps_axis(domain),
        "y": {**cause, "title": "cause", "sort": list(CAUSES), "axis": y_axis(ticks=False)},
        "shape": {**cause, "legend": None, "scale": {"domain": list(CAUSES)}},
        "tooltip": [whole("step", "step"), text("cause", "cause"), text("path", "checkpoint"), text("why", "why")],
    }
    spec = chart_spec(
        "gaps",
        summary,
        22 * len(causes),
        data={"name": "gaps"},
        transform=[{"filter": "isValid(datum.step)"}],
        mark={"type": "point", "size": 60, "strokeWidth": 2, "color": "#8a6d3b"},
        encoding=encoding,
    )
    return Chart("gaps", "Checkpoints without a report", summary, ("gaps",), spec)


def layer_chart(domain: tuple[float, float], layers: Sequence[int], shown: int, unit: str) -> Chart:
    """One layer's margins over training, chosen from a list; `shown` is chosen first."""
    summary = "Margin of one layer and of its parts over training, with their intervals."
    chosen = {"input": "select", "options": list(layers), "name": "Layer "}
    color = {
        "field": "band",
        "type": "nominal",
        "scale": {"domain": ["block", "attention", "mlp"], "range": ["#2f6fde", "#c2410c", "#3a9d5d"]},
        "legend": {"title": None, "orient": "top"},
    }
    y = {"field": "margin", "type": "quantitative", "title": f"margin, {unit}", "axis": y_axis()}
    tooltip = [
        text("band", "of it"), whole("step", "step"), text("status", "status"),
        text("interval", f"margin, {unit}"), text("stand_in", "stand-in"),
    ]  # fmt: skip
    x = steps_axis(domain)
    band = {
        "mark": {"type": "area", "opacity": 0.18},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color},
    }
    line = {
        "mark": {"type": "line", "point": {"filled": True, "size": 30}},
        "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip},
    }
    nothing = {
        "data": {"values": [{"zero": 0}]},
        "mark": {"type": "rule", "strokeDash": [4, 3], "stroke": "#808080"},
        "encoding": {"y": {**y, "field": "zero"}},
    }
    spec = chart_spec(
        "layer",
        summary,
        200,
        data={"name": "cells"},
        params=[{"name": "layer", "value": shown, "bind": chosen}],
        transform=[{"filter": "datum.layer == layer"}, interval_words("margin", "low", "high")],
        layer=[nothing, band, line],
    )
    return Chart("layer", "One layer over training", summary, ("cells",), spec)


def share_chart(layers: int, unit: str) -> Chart:
    """The two shares of each low-bit layer as stacked bars."""
    summary = (
        "What each low-bit layer could still win: through a better optimiser with the same weight set, and by free "
        "weights instead of the weight set."
    )
    encoding = {
        "x": {"field": "share", "type": "quantitative", "title": unit, "stack": "zero"},
        "y": {"field": "layer", "type": "ordinal", "axis": y_axis(labelOverlap=True)},
        "color": {
            "field": "what",
            "type": "nominal",
            "scale": {"domain": ["optimiser", "quantiser"], "range": ["#2f6fde", "#d98e04"]},
            "legend": {"title": None, "orient": "top"},
        },
        "tooltip": [text("name", "layer"), text("what", "share of"), number("share", unit)],
    }
    height = min(MAP_PIXELS, max(60, 18 * layers))
    spec = chart_spec("shares", summary, height, data={"name": "shares"}, mark="bar", encoding=encoding)
    return Chart("shares", "Optimiser and quantiser", summary, ("shares",), spec)


def redundancy_chart(blocks: int, unit: str) -> Chart:
    """What it costs to let one refitted block stand in for several."""
    summary = (
        "What it costs to replace neighbouring blocks, from the one at the left to the one below, by one refitted "
        "block. Dark costs little: a hint for pruning."
    )
    encoding = {
        "x": {"field": "last", "type": "ordinal", "title": "to block", "axis": {"labelOverlap": True, "labelAngle": 0}},
        "y": {"field": "first", "type": "ordinal", "title": "from block", "axis": y_axis(labelOverlap=True)},
        "color": {
            "field": "cost",
            "type": "quantitative",
            "title": f"cost, {unit}",
            "scale": {"type": "symlog", "constant": 0.01, "scheme": "viridis"},
            "legend": {"orient": "top", "gradientLength": 220, "format": ".2~g"},
        },
        "tooltip": [whole("first", "from block"), whole("last", "to block"), number("cost", f"cost, {unit}")],
    }
    height = min(480.0, max(80.0, 22.0 * blocks))
    spec = chart_spec("redundancy", summary, height, data={"name": "redundancy"}, mark="rect", encoding=encoding)
    return Chart("redundancy", "Which blocks could be one", summary, ("redundancy",), spec)
