"""Two reports on one probe, number by number and block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from peel_agent.errors import printable
from peel_agent.records import (
    Both,
    Comparable,
    Compared,
    DifferenceReport,
    Estimate,
    LayerDifference,
    LayerReport,
    PairedDifference,
    PairedDifferences,
    PartReport,
    PlaceDifference,
    WeightDifference,
)

ERRORS = 0.05
"""How often an interval may fail to hold what it is about."""

NOT_COMPARED = WeightDifference(why_not="two runs are compared by their reports, which hold no weights")


def contrast(
    a: Comparable,
    b: Comparable,
    *,
    paired: PairedDifferences | None,
    weights: WeightDifference = NOT_COMPARED,
    notes: Iterable[str] = (),
) -> DifferenceReport:
    """The differences b - a of two reports on one probe. Without `paired` only their intervals are known, and not the
    losses on each sequence.

    Blocks are held against each other by index, as far as both have them.
    """
    values = _Values(paired)
    pairs = list(zip(a.report.layers, b.report.layers, strict=False))
    layers = tuple(_layer(layer_a, layer_b, values, weights) for layer_a, layer_b in pairs)
    kind: Literal["checkpoints", "runs"] = "checkpoints" if a.run is None else "runs"
    return DifferenceReport(
        kind=kind,
        pairing="none" if paired is None else "by sequence",
        a=_compared(a),
        b=_compared(b),
        probe=a.report.probe,
        loss=values.loss(a.report.loss, b.report.loss),
        layers=layers,
        first_by_weights=min(weights.blocks, default=None),
        first_by_margin=first_by_margin(layers),
        weights=weights,
        notes=(*_of_two_models(a, b), *notes),
    )


def unpaired(a: Estimate, b: Estimate) -> Estimate:
    """B - a; the half-widths of both intervals are added, which is wide enough however the two are correlated.

    Of two numbers that were measured on the same sequences the paired interval is narrower, mostly by far.
    """
    value = b.value - a.value
    below = (b.value - b.low) + (a.high - a.value)
    above = (b.high - b.value) + (a.value - a.low)
    return Estimate(value, value - below, value + above)


def excludes_zero(estimate: Estimate | None) -> bool:
    """Whether an interval tells a difference from none."""
    return estimate is not None and (estimate.low > 0.0 or estimate.high < 0.0)


def first_by_margin(layers: Sequence[LayerDifference]) -> int | None:
    """The first block of which the margin, or that of a part, differs for certain.

    Each interval is widened for the number of margins that are compared (Bonferroni): of twenty pairs of models that do
    not differ, at most about one is said to have such a block, however deep they are.
    """
    differences = [place.margin.difference for layer in layers for place in layer.places.values()]
    wider = _widening(sum(difference is not None for difference in differences))
    for layer in layers:
        if any(_is_certain(place.margin.difference, wider) for place in layer.places.values()):
            return layer.index
    return None


def _widening(count: int) -> float:
    """The factor on 95 % intervals with which `count` of them hold all at once, 95 % of the time (normal numbers)."""
    normal = NormalDist()
    return normal.inv_cdf(1.0 - ERRORS / 2.0 / max(1, count)) / normal.inv_cdf(1.0 - ERRORS / 2.0)


def _is_certain(estimate: Estimate | None, wider: float) -> bool:
    if estimate is None:
        return False
    low = estimate.value - wider * (estimate.value - estimate.low)
    high = estimate.value + wider * (estimate.high - estimate.value)
    return excludes_zero(Estimate(estimate.value, low, high))


@dataclass(frozen=True)
class _Values:
    """The differences by place, paired where they are."""

    paired: PairedDifferences | None

    def loss(self, a: Estimate, b: Estimate) -> Both:
        return self._both(a, b, self.paired.loss if self.paired is not None else None)

    def margin(self, place: str, a: Estimate | None, b: Estimate | None) -> Both:
        return self._both(a, b, self.paired.margins.get(place) if self.paired is not None else None)

    def headroom(self, place: str, a: Estimate | None, b: Estimate | None) -> Both | None:
        if a is None and b is None:
            return None
        return self._both(a, b, self.paired.headroom.get(place) if self.paired is not None else None)

    def _both(self, a: Estimate | None, b: Estimate | None, known: PairedDifference | None) -> Both:
        if a is None or b is None:
            return Both(a, b, None)
        if self.paired is None:
            return Both(a, b, unpaired(a, b))
        return Both(a, b, None) if known is None else Both(a, b, known.value, known.sequences)


def _layer(a: LayerReport, b: LayerReport, values: _Values, weights: WeightDifference) -> LayerDifference:
    return LayerDifference(
        index=a.index,
        name=a.name if a.name == b.name else f"{a.name} | {b.name}",
        block=_place(str(a.index), a, b, values),
        parts={
            name: _place(f"{a.index}/{name}", a.parts[name], b.parts[name], values)
            for name in a.parts
            if name in b.parts
        },
        weights_differ=None if weights.why_not is not None else a.index in weights.blocks,
    )


def _place(place: str, a: LayerReport | PartReport, b: LayerReport | PartReport, values: _Values) -> PlaceDifference:
    return PlaceDifference(
        a.status, b.status, values.margin(place, a.margin, b.margin), values.headroom(place, a.headroom, b.headroom)
    )


def _compared(side: Comparable) -> Compared:
    return Compared(side.where, side.report.checkpoint, side.report.model, side.report.skipped, side.run)


def _of_two_models(a: Comparable, b: Comparable) -> list[str]:
    """What differs of the two besides their numbers."""
    model_a, model_b = a.report.model, b.report.model
    pairs: Mapping[str, tuple[str, str]] = {
        "formats": (a.report.checkpoint.format, b.report.checkpoint.format),
        "families": (model_a.family, model_b.family),
        "precisions": (model_a.precision, model_b.precision),
    }
    notes = [
        f"their {what} differ: A {first}, B {second}" for what, (first, second) in pairs.items() if first != second
    ]
    shallow, deep = sorted((model_a.blocks, model_b.blocks))
    if shallow != deep:
        last = f"blocks {shallow} to {deep - 1} of" if deep - shallow > 1 else f"block {shallow} of"
        which = "A" if model_a.blocks == deep else "B"
        notes.append(
            f"A has {model_a.blocks} blocks and B {model_b.blocks}: {last} {which} "
            f"{'have' if deep - shallow > 1 else 'has'} none to be held against"
        )
    elif model_a.parameters != model_b.parameters:
        notes.append(f"A has {model_a.parameters:,} parameters and B {model_b.parameters:,}")
    return [printable(note) for note in notes]
