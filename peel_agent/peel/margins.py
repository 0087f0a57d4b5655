"""Margins and statuses of blocks and their parts, from the losses of the sweep (METHOD 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from peel_agent.peel.intervals import estimate
from peel_agent.peel.sweep import Losses, Sweep, Target, Variant
from peel_agent.records import Estimate, LayerReport, PartName, PartReport, Status

MEDIAN_FRACTION = 0.1
"""A block is `below` when its margin stays under this fraction of the other blocks' median margin."""

PARTS: tuple[PartName, ...] = ("attention", "mlp")
PART_REFERENCES = frozenset({"skip", "affine"})


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
    """Margin from losses per score sequence [N_s + N_c], the first `selecting` of which are `select`."""
    best = min(references, key=lambda name: float(references[name][:selecting].mean()))
    worse = {name: losses[selecting:] - trained[selecting:] for name, losses in references.items()}
    means = {name: float(difference.mean()) for name, difference in worse.items()}
    return Margin(estimate(worse[best]), best, means, complete)


def statuses(margins: Sequence[Margin]) -> tuple[Status, ...]:
    """Each block's status against the others (METHOD 4).

    A margin whose reference set is incomplete is only an upper limit: it can be `below`, never `above`.
    """
    found: list[Status] = []
    for index, own in enumerate(margins):
        others = [other.estimate.value for place, other in enumerate(margins) if place != index]
        threshold = max(0.0, MEDIAN_FRACTION * median(others)) if others else 0.0
        if own.estimate.high < threshold:
            found.append("below")
        elif own.estimate.low > threshold and own.complete:
            found.append("above")
        else:
            found.append("undecided")
    return tuple(found)


def layer_reports(
    swept: Sweep, names: Sequence[str], references: Sequence[str], selecting: int
) -> tuple[LayerReport, ...]:
    """One report a block, its parts included."""

    def all_margins(target: Target, wanted: frozenset[str]) -> list[Margin]:
        return [
            margin(swept.trained, found, selecting, complete=set(found) >= wanted - unreachable(index))
            for index, found in enumerate(_by_block(swept.variants, target, len(names)))
        ]

    blocks = all_margins("block", frozenset(references))
    parts: dict[PartName, list[Margin]] = {part: all_margins(part, PART_REFERENCES) for part in PARTS}
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
            stream_share=swept.stream_shares[index],
        )
        for index, (name, status) in enumerate(zip(names, statuses(blocks), strict=True))
    )


def unreachable(index: int) -> frozenset[str]:
    """References that this block cannot have: the first block has no previous one."""
    return frozenset({"previous"}) if index == 0 else frozenset()


def _by_block(variants: Mapping[Variant, Losses], target: Target, blocks: int) -> list[dict[str, Losses]]:
    found: list[dict[str, Losses]] = [{} for _ in range(blocks)]
    for variant, losses in variants.items():
        if variant.target == target:
            found[variant.block][variant.reference] = losses
    return found
