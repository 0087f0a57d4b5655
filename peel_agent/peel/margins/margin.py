"""Margins and statuses of blocks and their parts, from the losses of the sweep (method.md 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

import numpy as np

from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Excess, Losses
from peel_agent.peel.sweep.splices import Target, Variant
from peel_agent.records import Estimate, Status

MEDIAN_FRACTION = 0.1
"""A block is `below` when its margin stays under this fraction of the other blocks' median margin."""

CUT_DOUBT = 2.0
"""Beside the margins of the other blocks, that of a block may be so many times as large on the first tokens of
sequences as on whole ones, or as small.
"""

FAR_UNDER = 1 / 3
"""A block earns far less than its neighbours when its margin is under this fraction of either's, and certainly less
than either's. Small trained models: blocks with a dead attention 0 to 0.25, healthy ones 0.5 and more.
"""

Place = tuple[int, Target]
"""A block, or a part of one."""


@dataclass(frozen=True)
class Margin:
    """loss(best reference) - loss(trained); the best is picked on `select`, everything here measured on `confirm`.

    `references` holds the same for every reference, `least` the least lower limit among those that may be the best.
    `complete` is False when a reference was left out because its fit could not be trusted, `whole` when only a part of
    confirm was measured. `cut` says of how many first tokens of each sequence the margin is, None of all.
    `by_sequence` holds what the mean is of on each confirm sequence, of every reference that the interval spans, the
    best first.
    """

    estimate: Estimate
    best: str
    references: Mapping[str, float]
    least: float
    complete: bool
    whole: bool
    cut: int | None = None
    by_sequence: Mapping[str, Losses] = field(default_factory=dict, compare=False, repr=False)


def margin(references: Mapping[str, Excess], selecting: int, *, complete: bool, unsure_of_best: bool = False) -> Margin:
    """Margin from what each reference's losses are more than the trained model's, per score sequence, the first
    `selecting` of which are `select`.

    The best is one of those measured on most tokens: the others were certainly worse than it before. It is picked on
    confirm where it was not measured on select. Where it is unsure which that is, as it is then, the interval spans
    those of all that may be it, by their paired differences: of the one that was picked alone it would say how sure its
    loss is, and not how sure the margin.
    """
    contenders = measured_on_most(references)
    some = references[contenders[0]]
    selected = some.measured[:selecting].any()
    choosing = slice(0, selecting) if selected else slice(selecting, None)
    best = min(contenders, key=lambda name: float(np.nanmean(references[name].losses[choosing])))
    differences = {name: estimate(own.losses[selecting:][own.measured[selecting:]]) for name, own in references.items()}
    spanned, rivals = differences[best], [best]
    if unsure_of_best or not selected:
        others = [name for name in contenders if name != best]
        rivals += [name for name in others if may_be_better(references[name], references[best])]
        low, high = min(differences[name].low for name in rivals), max(differences[name].high for name in rivals)
        spanned = replace(spanned, low=low, high=high)
    return Margin(
        estimate=spanned,
        best=best,
        references={name: own.value for name, own in differences.items()},
        least=min(differences[name].low for name in contenders),
        complete=complete,
        whole=some.cut is None and bool(some.measured[selecting:].all()),
        cut=some.cut,
        by_sequence={name: references[name].losses[selecting:] for name in rivals},
    )


def measured_on_most(references: Mapping[str, Excess]) -> list[str]:
    """The references that were measured on most tokens."""
    widest = max(references.values(), key=lambda own: (own.cut is None, own.cut or 0, own.measured.sum()))
    return [name for name, own in references.items() if own.alike(widest)]


def may_be_better(own: Excess, best: Excess) -> bool:
    """Whether a reference is not certainly worse than the one that was picked; that one itself is not.

    On cuts it must cost CUT_DOUBT times as much, for on whole sequences either may cost more than there, or less.
    """
    if own is best:
        return True
    if not own.alike(best):
        return False
    measured = own.measured
    ours, theirs = own.losses[measured], best.losses[measured]
    if own.cut is not None and estimate(ours - CUT_DOUBT * theirs).low <= 0.0:
        return True
    return estimate(ours - theirs).low <= 0.0


def margins_of(
    variants: Mapping[Variant, Excess], references: Sequence[str], selecting: int, *, unsure_of_best: bool = False
) -> dict[Place, Margin]:
    """The margin of every block and part that has variants, by block and target."""
    return {
        place: margin(
            found, selecting, complete=set(found) >= reachable(*place, references), unsure_of_best=unsure_of_best
        )
        for place, found in by_place(variants).items()
    }


def by_place(variants: Mapping[Variant, Excess]) -> dict[Place, dict[str, Excess]]:
    """What each place's references cost, by name."""
    spliced: dict[Place, dict[str, Excess]] = {}
    for variant, own in variants.items():
        spliced.setdefault((variant.block, variant.target), {})[variant.reference] = own
    return spliced


def reachable(block: int, target: Target, references: Sequence[str]) -> set[str]:
    """The references that this block or part can have: only whole blocks after the first have a previous one."""
    return set(references) - (set() if target == "block" and block > 0 else {"previous"})


class Threshold(NamedTuple):
    """What a margin must be under to be `below`, and over to be `above`."""

    below: float
    above: float


def thresholds(margins: Sequence[Margin]) -> tuple[Threshold, ...]:
    """What each margin is held against: a fraction of the others' median, never below 0 (method.md 4).

    That is one number where all are of whole sequences. Where some are of cuts it may lie anywhere between what the
    others' lower and upper limits give, and CUT_DOUBT times as far.
    """
    doubt = CUT_DOUBT if any(own.cut is not None for own in margins) else 1.0
    return tuple(_threshold(others, doubt) for others in _others(margins))


def _threshold(others: Sequence[Margin], doubt: float) -> Threshold:
    if not others:
        return Threshold(0.0, 0.0)
    if doubt == 1.0:
        exact = max(0.0, MEDIAN_FRACTION * median(own.estimate.value for own in others))
        return Threshold(exact, exact)
    return _doubtful(others, doubt)


def _doubtful(others: Sequence[Margin], doubt: float) -> Threshold:
    low, high = (
        median(limits) for limits in ([own.estimate.low for own in others], [own.estimate.high for own in others])
    )
    return Threshold(max(0.0, MEDIAN_FRACTION * low / doubt), max(0.0, MEDIAN_FRACTION * high * doubt))


def _others(margins: Sequence[Margin]) -> Iterator[list[Margin]]:
    yield from ([*margins[:place], *margins[place + 1 :]] for place in range(len(margins)))


def final_thresholds(margins: Sequence[Margin]) -> tuple[Threshold, ...]:
    """The same when nothing more is measured: doubtful too while some margin was left open, for what that one would be
    on all sequences might move the median.
    """
    found = thresholds(margins)
    if all(own.whole or own.least > limits.above for own, limits in zip(margins, found, strict=True)):
        return found
    doubt = CUT_DOUBT if any(own.cut is not None for own in margins) else 1.0
    return tuple(_doubtful(others, doubt) if others else Threshold(0.0, 0.0) for others in _others(margins))


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
    for own, threshold in zip(margins, final_thresholds(margins), strict=True):
        if own.estimate.high < threshold.below and own.whole:
            found.append("below")
        elif own.estimate.low > threshold.above and own.complete:
            found.append("above")
        else:
            found.append("undecided")
    return tuple(found)


def of_target(margins: Mapping[Place, Margin], target: str) -> dict[int, Margin]:
    """The margins of one kind by block."""
    return {index: own for (index, kind), own in margins.items() if kind == target}
