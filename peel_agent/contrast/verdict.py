"""What a comparison comes to, in sentences that need no paper."""

from __future__ import annotations

from peel_agent.contrast.contrast import excludes_zero
from peel_agent.records import Both, DifferenceReport, LayerDifference, PlaceDifference


def difference_verdict(report: DifferenceReport) -> str:
    """The loss, how sure it is, the first block that differs, and how many statuses changed."""
    return " ".join([_loss(report), _first(report), _statuses(report)])


def is_worse(report: DifferenceReport) -> bool:
    """Whether the loss of B is higher than that of A for certain."""
    return report.loss.difference is not None and report.loss.difference.low > 0.0


def newly_below(report: DifferenceReport) -> bool:
    """Whether a block or a part is below its cheap stand-in in B, and was not in A."""
    return any(
        place.status_b == "below" and place.status_a != "below"
        for layer in report.layers
        for place in layer.places.values()
    )


def changed_places(report: DifferenceReport) -> tuple[tuple[str, PlaceDifference], ...]:
    """Every block and part whose status is another one in B, by its name."""
    return tuple(
        (subject, place) for layer in report.layers for subject, place in _subjects(layer) if place.status_changed
    )


def _subjects(layer: LayerDifference) -> list[tuple[str, PlaceDifference]]:
    return [(layer.name, layer.block), *((f"{layer.name}/{name}", part) for name, part in layer.parts.items())]


def how_sure(report: DifferenceReport, both: Both) -> str:
    """How the interval of a difference was made."""
    if report.pairing == "by sequence":
        return f"paired over {both.sequences} sequences"
    return "not paired: the half-widths of both intervals added"


def _loss(report: DifferenceReport) -> str:
    difference = report.loss.difference
    if difference is None:
        return "The losses were not measured."
    sure = how_sure(report, report.loss)
    if not report.weights.blocks and not report.weights.outside and report.weights.why_not is None and _same(report):
        return "A and B hold the same weights."
    if not excludes_zero(difference):
        return f"The losses of A and B cannot be told apart: B - A is {difference} {report.probe.unit}, {sure}."
    which = "higher" if difference.value > 0.0 else "lower"
    return f"B has a {which} loss than A: B - A is {difference} {report.probe.unit}, {sure}."


def _same(report: DifferenceReport) -> bool:
    return report.a.model.blocks == report.b.model.blocks and report.a.model.precision == report.b.model.precision


def _first(report: DifferenceReport) -> str:
    """The first block that differs, by weights and by margin, of what was compared."""
    first: dict[str, int | None] = {}
    if report.weights.why_not is None:
        first["by weights"] = report.first_by_weights
    if any(place.margin.difference is not None for layer in report.layers for place in layer.places.values()):
        first["for certain by margin"] = report.first_by_margin
    if not first:
        return "No block was compared."
    names = {layer.index: layer.name for layer in report.layers}
    known = [f"{names.get(index, f'block {index}')} {how}" for how, index in first.items() if index is not None]
    none = [how for how, index in first.items() if index is None]
    sentences = [f"The first block that differs is {' and '.join(known)}."] if known else []
    sentences += [f"No block differs {' or '.join(none)}."] if none else []
    return " ".join(sentences)


def _statuses(report: DifferenceReport) -> str:
    changed = changed_places(report)
    if not changed:
        return "No block or part has another status."
    shown = ", ".join(f"{name} {place.status_a} -> {place.status_b}" for name, place in changed[:3])
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"Statuses that changed: {shown}{more}."
