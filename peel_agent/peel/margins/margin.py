"""Margins and statuses of blocks and their parts, from the losses of the sweep (method.md 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Losses
from peel_agent.peel.sweep.splices import Target, Variant
from peel_agent.records import Estimate, Status

MEDIAN_FRACTION = 0.1
"""A block is `below` when its margin stays under this fraction of the other blocks' median margin."""

FAR_UNDER = 1 / 3
"""A block earns far less than its neighbours when its margin is under this fraction of either's, and certainly less
than either's. Small trained models: blocks with a dead attention 0 to 0.25, healthy ones 0.5 and more.
"""

Place = tuple[int, Target]
"""A block, or a part of one."""


@dataclass(frozen=True)
class Margin:
    """loss(best reference) - loss(trained); the best is picked on `select`, everything here measured on `confirm`.

    `references` holds the same for every reference, `least` the least lower limit among them. `complete` is False when
    a reference was left out because its fit could not be trusted, `whole` when only a part of confirm was measured.
    `by_sequence` holds what the mean is of on each confirm sequence, of every reference that the interval spans, the
    best first.
    """

    estimate: Estimate
    best: str
    references: Mapping[str, float]
    least: float
    complete: bool
    whole: bool
    by_sequence: Mapping[str, Losses] = field(default_factory=dict, compare=False, repr=False)


def margin(
    trained: Losses,
    references: Mapping[str, Losses],
    selecting: int,
    *,
    complete: bool,
    unsure_of_best: bool = False,
) -> Margin:
    """Margin from losses per score sequence [n], the first `selecting` of which are `select`.

    A reference's losses are NaN on the sequences where it was not measured; the best is one of those measured on most.
    Where it is unsure which that is, the interval spans those of all that may be it, by their paired differences: of
    the one that was picked alone it would say how sure its loss is, and not how sure the margin.
    """
    measured = {name: np.isfinite(losses) for name, losses in references.items()}
    most = max(int(own.sum()) for own in measured.values())
    contenders = [name for name, own in measured.items() if own.sum() == most]
    best = min(contenders, key=lambda name: float(np.nanmean(references[name][:selecting])))
    differences = {
        name: estimate((losses - trained)[selecting:][measured[name][selecting:]])
        for name, losses in references.items()
    }
    spanned, rivals = differences[best], [best]
    if unsure_of_best:
        others = [name for name in references if name != best]
        rivals += [name for name in others if may_be_better(references[name], references[best])]
        low, high = min(differences[name].low for name in rivals), max(differences[name].high for name in rivals)
        spanned = replace(spanned, low=low, high=high)
    return Margin(
        estimate=spanned,
        best=best,
        references={name: own.value for name, own in differences.items()},
        least=min(own.low for own in differences.values()),
        complete=complete,
        whole=bool(measured[best].all()),
        by_sequence={name: (references[name] - trained)[selecting:] for name in rivals},
    )


def may_be_better(losses: Losses, best: Losses) -> bool:
    """Whether a reference is not certainly worse than the one that was picked; that one itself is not."""
    difference = losses - best
    return estimate(difference[np.isfinite(difference)]).low <= 0.0


def margins_of(
    trained: Losses,
    variants: Mapping[Variant, Losses],
    references: Sequence[str],
    selecting: int,
    *,
    unsure_of_best: bool = False,
) -> dict[Place, Margin]:
    """The margin of every block and part that has variants, by block and target."""
    return {
        place: margin(
            trained,
            found,
            selecting,
            complete=set(found) >= reachable(*place, references),
            unsure_of_best=unsure_of_best,
        )
        for place, found in by_place(variants).items()
    }


def by_place(variants: Mapping[Variant, Losses]) -> dict[Place, dict[str, Losses]]:
    """The losses of each place's references by name."""
    spliced: dict[Place, dict[str, Losses]] = {}
    for variant, losses in variants.items():
        spliced.setdefault((variant.block, variant.target), {})[variant.reference] = losses
    return spliced


def reachable(block: int, target: Target, references: Sequence[str]) -> set[str]:
    """The references that this block or part can have: only whole blocks after the first have a previous one."""
    return set(references) - (set() if target == "block" and block > 0 else {"previous"})


def thresholds(margins: Sequence[Margin]) -> tuple[float, ...]:
    """What each margin is held against: a fraction of the others' median, never below 0 (method.md 4)."""
    values = [own.estimate.value for own in margins]
    others = [values[:place] + values[place + 1 :] for place in range(len(values))]
    return tuple(max(0.0, MEDIAN_FRACTION * median(own)) if own else 0.0 for own in others)


def far_under(margins: Mapping[int, Margin]) -> frozenset[int]:
    """The blocks that earn far less than the blocks before and after them.

    Not than the median of all: in a shallow model the first block's margin, which is often many times the others',
    would make every other one look weak.
    """
    found = []
    for index, own in margins.items():
        near = [margins[place].estimate.value for place in (index - 1, index + 1) if place in margins]
        least = min(near, default=0.0)
        if own.estimate.value < FAR_UNDER * least and own.estimate.high < least:
            found.append(index)
    return frozenset(found)


def statuses(margins: Sequence[Margin]) -> tuple[Status, ...]:
    """Each block's status against the others (method.md 4).

    A margin whose reference set is incomplete is only an upper limit: it can be `below`, never `above`. One that was
    not measured on the whole of confirm can be `above`, never `below`.
    """
    found: list[Status] = []
    for own, threshold in zip(margins, thresholds(margins), strict=True):
        if own.estimate.high < threshold and own.whole:
            found.append("below")
        elif own.estimate.low > threshold and own.complete:
            found.append("above")
        else:
            found.append("undecided")
    return tuple(found)


def of_target(margins: Mapping[Place, Margin], target: str) -> dict[int, Margin]:
    """The margins of one kind by block."""
    return {index: own for (index, kind), own in margins.items() if kind == target}
