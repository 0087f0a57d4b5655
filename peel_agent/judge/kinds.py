"""What each rule kind reads in a report. Another kind is one more function in KINDS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from peel_agent.records import LayerReport, PeelReport, RuleKind, Status

Speaks = Literal["for", "against", "neither"]


@dataclass(frozen=True)
class Testimony:
    """What a report says about one subject: for the alert, against it, or neither, and the evidence in words."""

    speaks: Speaks
    words: str


def layer_below(report: PeelReport) -> dict[str, Testimony]:
    """Blocks by name: `below` speaks for the alert, `above` against it, `undecided` neither."""
    speaks: Mapping[Status, Speaks] = {"below": "for", "above": "against", "undecided": "neither"}
    return {layer.name: Testimony(speaks[layer.status], _layer_words(layer, report)) for layer in report.layers}


KINDS: Mapping[RuleKind, Callable[[PeelReport], Mapping[str, Testimony]]] = {"layer_below": layer_below}


def _layer_words(layer: LayerReport, report: PeelReport) -> str:
    words = f"{layer.name} {_judgement(layer)} its cheap stand-in"
    if layer.best_reference is not None:
        words += f" `{layer.best_reference}`"
    if layer.margin is not None:
        words += f": margin {layer.margin} nats/token"
    others = [other.margin.value for other in report.layers if other.margin is not None and other.name != layer.name]
    if others:
        words += f", the other blocks' median is {median(others):z.4f}"
    return words


def _judgement(layer: LayerReport) -> str:
    if layer.status == "above":
        return "earns more than"
    # A block can be `below` with a margin that is above 0 but far under its neighbours' (method.md 4).
    certainly_worse = layer.margin is not None and layer.margin.high <= 0
    return "earns less than" if certainly_worse else "earns hardly more than"
