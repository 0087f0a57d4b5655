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

    `references` holds the mean of the same difference for every reference, `least` the lowest lower limit among those
    that may be the best. `complete` is False when a reference was left out because its fit could not be trusted,
    `whole` is False when only a part of confirm was measured. `cut`: only the first so many tokens of each sequence
    were measured; None for whole sequences. `by_sequence` holds the difference on each confirm sequence, for every
    reference that the interval spans, the best first.
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
    """Margin from how much higher each reference's loss is than the trained model's, per score sequence; the first
    `selecting` sequences are `select`.

    The best is one of those measured on most tokens: the others dropped out earlier, being certainly worse. It is
    picked on `select`, or on confirm where nothing was measured on `select`. In that case, and with `unsure_of_best`,
    another reference may be the best in truth: then the interval spans those of all that may be, by their paired
    differences. The interval of the picked one alone would say how sure its loss is, not how sure the margin is.
    """
    contenders = measured_on_most(references)
    measured_most = references[contenders[0]]
    selected = measured_most.measured[:selecting].any()
    choosing = slice(0, selecting) if selected else slice(selecting, None)
    best = min(contenders, key=lambda name: float(np.nanmean(references[name].losses[choosing])))
    differences = {
        name: estimate(excess.losses[selecting:][excess.measured[selecting:]]) for name, excess in references.items()
    }
    spanned, rivals = differences[best], [best]
    if unsure_of_best or not selected:
        others = [name for name in contenders if name != best]
        rivals += [name for name in others if may_be_better(references[name], references[best])]
        low, high = min(differences[name].low for name in rivals), max(differences[name].high for name in rivals)
        spanned = replace(spanned, low=low, high=high)
    return Margin(
        estimate=spanned,
        best=best,
        references={name: difference.value for name, difference in differences.items()},
        least=min(differences[name].low for name in contenders),
        complete=complete,
        whole=measured_most.cut is None and bool(measured_most.measured[selecting:].all()),
        cut=measured_most.cut,
        by_sequence={name: references[name].losses[selecting:] for name in rivals},
    )


def measured_on_most(references: Mapping[str, Excess]) -> list[str]:
    """The references that were measured on most tokens."""
    widest = max(references.values(), key=lambda excess: (excess.cut is None, excess.cut or 0, excess.measured.sum()))
    return [name for name, excess in references.items() if excess.alike(widest)]


def may_be_better(rival: Excess, best: Excess) -> bool:
    """Whether a reference is not certainly worse than the one that was picked; true of that one itself.

    On the first tokens of sequences only one that costs more than CUT_DOUBT times as much is certainly worse: on whole
    sequences either may cost more or less than there.
    """
    if rival is best:
        return True
    if not rival.alike(best):
        return False
    measured = rival.measured
    rivals, bests = rival.losses[measured], best.losses[measured]
    if rival.cut is not None and estimate(rivals - CUT_DOUBT * bests).low <= 0.0:
        return True
    return estimate(rivals - bests).low <= 0.0


def margins_of(
    variants: Mapping[Variant, Excess], references: Sequence[str], selecting: int, *, unsure_of_best: bool = False
) -> dict[Place, Margin]:
    """The margin of every block and part that has variants, by block and target."""
    return {
        place: margin(
            excesses, selecting, complete=set(excesses) >= reachable(*place, references), unsure_of_best=unsure_of_best
        )
        for place, excesses in by_place(variants).items()
    }


def by_place(variants: Mapping[Variant, Excess]) -> dict[Place, dict[str, Excess]]:
    """The excess loss of each place's references, by their names."""
    excesses: dict[Place, dict[str, Excess]] = {}
    for variant, excess in variants.items():
        excesses.setdefault((variant.block, variant.target), {})[variant.reference] = excess
    return excesses


def reachable(block: int, target: Target, references: Sequence[str]) -> set[str]:
    """The references that this block or part can have: only whole blocks after the first have a previous one."""
    return set(references) - (set() if target == "block" and block > 0 else {"previous"})


class Threshold(NamedTuple):
    """A margin under the first number is `below`, one over the second `above`, one between them neither."""

    below: float
    above: float


def thresholds(margins: Sequence[Margin]) -> tuple[Threshold, ...]:
    """What each margin is held against: a fraction of the others' median, never below 0 (method.md 4).

    Both numbers are the same where all margins are of whole sequences. What one of first tokens only would be on whole
    ones is not known: the two numbers allow for that.
    """
    return tuple(_threshold(others) for others in _others([_values(margin) for margin in margins]))


def final_thresholds(margins: Sequence[Margin]) -> tuple[Threshold, ...]:
    """The same when nothing more is measured: a margin that was left open would be another one on all sequences, too,
    which might move the median.
    """
    limits = thresholds(margins)
    values = [
        _values(margin, left_open=not margin.whole and margin.least <= limit.above)
        for margin, limit in zip(margins, limits, strict=True)
    ]
    return tuple(_threshold(others) for others in _others(values))


def _values(margin: Margin, *, left_open: bool = False) -> tuple[float, float]:
    """The least and the most that a margin may be on all sequences, as far as thresholds need to allow for it."""
    value, low, high = margin.estimate.value, margin.estimate.low, margin.estimate.high
    if margin.cut is not None:
        return min(low, low / CUT_DOUBT), max(high, high * CUT_DOUBT)
    return (low, high) if left_open else (value, value)


def _threshold(others: Sequence[tuple[float, float]]) -> Threshold:
    if not others:
        return Threshold(0.0, 0.0)
    below, above = (max(0.0, MEDIAN_FRACTION * median(values)) for values in zip(*others, strict=True))
    return Threshold(below, above)


def _others(values: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    yield from ([*values[:place], *values[place + 1 :]] for place in range(len(values)))


def far_under(margins: Mapping[int, Margin]) -> frozenset[int]:
    """The blocks that earn far less than the blocks before and after them.

    Not than the median of all: in a shallow model the first block's margin, which is often many times the others',
    would make every other one look weak.
    """
    weak = []
    for index, margin in margins.items():
        neighbours = [margins[near].estimate.value for near in (index - 1, index + 1) if near in margins]
        least = min(neighbours, default=0.0)
        if margin.estimate.value < FAR_UNDER * least and margin.estimate.high < least:
            weak.append(index)
    return frozenset(weak)


def statuses(margins: Sequence[Margin]) -> tuple[Status, ...]:
    """Each block's status against the others (method.md 4).

    A margin whose reference set is incomplete is only an upper limit: it can be `below`, never `above`. One that was
    not measured on the whole of confirm can be `above`, never `below`.
    """
    decided: list[Status] = []
    for margin, threshold in zip(margins, final_thresholds(margins), strict=True):
        if margin.estimate.high < threshold.below and margin.whole:
            decided.append("below")
        elif margin.estimate.low > threshold.above and margin.complete:
            decided.append("above")
        else:
            decided.append("undecided")
    return tuple(decided)


def of_target(margins: Mapping[Place, Margin], target: str) -> dict[int, Margin]:
    """The margins of one kind by block."""
    return {index: margin for (index, kind), margin in margins.items() if kind == target}
