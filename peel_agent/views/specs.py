"""What charts are made of: Vega-Lite specifications with the same axes, colours and tooltips.

No text out of a checkpoint is part of a specification, only of data: Vega draws data as text, and evaluates none of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]

AXIS_PIXELS = 76
"""The room left of every chart that shares the axis of steps: so they stand one under the other."""

LONG_RUN = 20_000
"""Steps from which on they are written as 25k."""


@dataclass(frozen=True)
class Chart:
    """One specification; `title` is its heading, `summary` says in words what it shows, `tables` its data by name."""

    key: str
    title: str
    summary: str
    tables: tuple[str, ...]
    spec: Spec = field(repr=False)


def chart_spec(key: str, summary: str, height: float, **rest: Any) -> Spec:
    """A specification of this key and height, which says what it shows."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": summary,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": "transparent",
        "usermeta": {"chart": key},
        **rest,
    }


def steps_axis(domain: tuple[float, float], name: str = "step") -> Spec:
    """The axis of training steps."""
    form = "~s" if domain[1] >= LONG_RUN else ",d"
    axis = {"format": form, "grid": False, "labelOverlap": "greedy", "tickMinStep": 1}
    return {
        "field": name,
        "type": "quantitative",
        "title": "training step",
        "axis": axis,
        "scale": {"domain": list(domain), "nice": False, "zero": False},
    }


def y_axis(**rest: Any) -> Spec:
    """An axis whose labels take the same room in every chart."""
    return {"minExtent": AXIS_PIXELS, "maxExtent": AXIS_PIXELS, "labelLimit": AXIS_PIXELS - 12, **rest}


def number(name: str, title: str) -> Spec:
    """A tooltip's number."""
    return {"field": name, "type": "quantitative", "title": title, "format": ".5~g"}


def text(name: str, title: str) -> Spec:
    """A tooltip's text."""
    return {"field": name, "type": "nominal", "title": title}


def whole(name: str, title: str) -> Spec:
    """A tooltip's whole number."""
    return {"field": name, "type": "quantitative", "title": title, "format": ","}


def interval_words(name: str, low: str, high: str, words: str = "interval") -> Spec:
    """A transform that makes the text `words` of three numbers."""
    digits = "'.4f'"
    ends = f"format(datum.{name}, {digits}) + ' [' + format(datum.{low}, {digits}) + ', ' + format(datum.{high}, "
    return {"calculate": f"isValid(datum.{name}) ? {ends}{digits}) + ']' : 'not measured'", "as": words}
