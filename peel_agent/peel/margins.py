"""Margins and statuses of blocks and their parts, from the losses of the sweep (METHOD 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from peel_agent.peel.intervals import estimate
from peel_agent.peel.splices import Target, Variant
from peel_agent.peel.sweep import Losses
from peel_agent.records import Estimate, LayerReport, PartName, PartReport, Status

MEDIAN_FRACTION = 0.1
"""A block is `below` when its margin stays under this fraction of the other blocks' median margin."""

PARTS: tuple[PartName, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Margin:
    """loss(best reference) - loss(trained); the best is picked on `select`, everything here measured on `confirm`.

    `complete` is False when a reference was left out because its fit could not be trusted.
    """

    estimate: Estimate
    best: str
    references: Mapping[str, float]
    complete: bool


def margin(trained: Losses, references: Mapping[str, Losses], selecting: int, *, complete: bool) -> Margin:
    """Margin from losses per sequence [n], the first `selecting` of which are `select`."""
    best = min(references, key=lambda name: float(references[name][:selecting].mean()))
    worse = {name: losses[selecting:] - trained[selecting:] for name, losses in references.items()}
    means = {name: float(difference.mean()) for name, difference in worse.items()}
    return Margin(estimate(worse[best]), best, means, complete)


def margins_of(
    trained: Losses, variants: Mapping[Variant, Losses], references: Sequence[str], selecting: int
) -> dict[tuple[int, Target], Margin]:
    """The margin of every block and part that has variants, by block and target; losses are over the same sequences."""
    spliced: dict[tuple[int, Target], dict[str, Losses]] = {}
    for variant, losses in variants.items():
        spliced.setdefault((variant.block, variant.target), {})[variant.reference] = losses
    return {
        place: margin(trained, found, selecting, complete=set(found) >= reachable(*place, references))
        for place, found in spliced.items()
    }


def reachable(block: int, target: Target, references: Sequence[str]) -> set[str]:
    """The references that this block or part can have: only whole blocks after the first have a previous one."""
    return set(references) - (set() if target == "block" and block > 0 else {"previous"})


def thresholds(margins: Sequence[Margin]) -> tuple[float, ...]:
    """What each margin is held against: a fraction of the others' median, never below 0 (METHOD 4)."""
    values = [own.estimate.value for own in margins]
    others = [values[:place] + values[place + 1 :] for place in range(len(values))]
    return tuple(max(0.0, MEDIAN_FRACTION * median(own)) if own else 0.0 for own in others)


def statuses(margins: Sequence[Margin]) -> tuple[Status, ...]:
    """Each block's status against the others (METHOD 4).

    A margin whose reference set is incomplete is only an upper limit: it can be `below`, never `above`.
    """
    found: list[Status] = []
    for own, threshold in zip(margins, thresholds(margins), strict=True):
        if own.estimate.high < threshold:
            found.append("below")
        elif own.estimate.low > threshold and own.complete:
            found.append("above")
        else:
            found.append("undecided")
    return tuple(found)


def layer_reports(
    margins: Mapping[tuple[int, Target], Margin], names: Sequence[str], stream_shares: Sequence[float]
) -> tuple[LayerReport, ...]:
    """One report a block, its parts included."""
    blocks = of_target(margins, "block", len(names))
    parts = {part: of_target(margins, part, len(names)) for part in PARTS}
    part_statuses = {part: statuses(found) for part, found in parts.items()}
    return tuple(
        LayerReport(
            index=index,
            name=name,
            status=status,
            margin=blocks[index].estimate,
            best_reference=blocks[index].best,
            references=blocks[index].references,
            parts={part: PartReport(part_statuses[part][index], parts[part][index].estimate) for part in PARTS},
            stream_share=stream_shares[index],
        )
        for index, (name, status) in enumerate(zip(names, statuses(blocks), strict=True))
    )


def of_target(margins: Mapping[tuple[int, Target], Margin], target: Target, depth: int) -> list[Margin]:
    """The margins of one kind in the order of the blocks."""
    return [margins[index, target] for index in range(depth)]
