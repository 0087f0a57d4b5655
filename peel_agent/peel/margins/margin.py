"""Margins and statuses of blocks and their parts, from the losses of the sweep (method.md 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

import numpy as np

from peel_agent.peel.numerics.intervals import CONFIDENCE, doubt_of_excess, estimate
from peel_agent.peel.numerics.losses import Excess, Losses
from peel_agent.peel.sweep.splices import Target, Variant
from peel_agent.records import Estimate, Status

MEDIAN_FRACTION = 0.1
"""A block is `below` when its margin stays under this fraction of the other blocks' median margin."""

CUT_DOUBT = 2.0
"""Beside the margins of the other blocks, that of a block may be so many times as large on the tokens behind a cut as
on those before it, or as small.
"""

ONE_SIDE = (1 - CONFIDENCE) / 2
"""How often an interval lies over a number that is no lower than what it is for."""

DROPPED = 1e-3
"""How often, at most, a reference is dropped on few sequences that is as good as the one picked: it is not measured
again, and whether a block is below may hang on it.
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

    `references` holds the mean of the same difference for every reference. `least` and `most` are the lowest lower and
    the lowest upper limit among those that may be the best: whichever is costs no more than any of them. `complete` is
    False when a reference was left out because its fit could not be trusted, `whole` is False when only a part of
    confirm was measured. `cut`: only the first so many tokens of each sequence were measured, a share `seen` of all;
    None for whole sequences. `by_sequence` holds the difference on each confirm sequence, for every reference that the
    interval spans, the best first; `contending` the same, where measured, for every one that was measured on most
    tokens.
    """

    estimate: Estimate
    best: str
    references: Mapping[str, float]
    least: float
    most: float
    complete: bool
    whole: bool
    cut: int | None = None
    seen: float = 1.0
    by_sequence: Mapping[str, Losses] = field(default_factory=dict, compare=False, repr=False)
    contending: tuple[Losses, ...] = field(default=(), compare=False, repr=False)

    def doubt(self, limit: float) -> float:
        """How likely such losses are on these sequences, at most, if the margin were no higher than this limit."""
        if not self.contending:
            return 0.0 if self.least > limit else 1.0
        return max(doubt_of_excess(losses - limit) for losses in self.contending)


@dataclass(frozen=True)
class Few:
    """Few tokens, as effort quick has them: on so few sequences another reference than the one picked may be the best.

    `fit_share` is what share of what an affine stand-in costs it would cost at least, had it been fitted to many more
    tokens. With n tokens and p columns least squares leaves 1 / (1 - p / n) times the squared error that it would leave
    with endlessly many (for normal noise), and for small errors losses grow with the square.
    """

    fit_share: float = 1.0

    def least(self, name: str, low: float) -> float:
        """The lower limit of what a reference costs."""
        return low * self.fit_share if name == "affine" and low > 0.0 else low


def margin(references: Mapping[str, Excess], selecting: int, *, complete: bool, few: Few | None = None) -> Margin:
    """Margin from how much higher each reference's loss is than the trained model's, per score sequence; the first
    `selecting` sequences are `select`.

    The best is one of those measured on most tokens: the others dropped out earlier, being certainly worse. It is
    picked on `select`, or on confirm where nothing was measured on `select`. Where that was done on few sequences, and
    with `few` tokens, another reference may be the best in truth: then the interval spans those of all that may be, by
    their paired differences. The interval of the picked one alone would say how sure its loss is, not how sure the
    margin is. Else it spans, besides the picked one, what confirm says is certainly better.
    """
    contenders = measured_on_most(references)
    measured_most = references[contenders[0]]
    selected = measured_most.measured[:selecting].any()
    choosing = slice(0, selecting) if selected else slice(selecting, None)
    best = min(contenders, key=lambda name: float(np.nanmean(references[name].losses[choosing])))
    differences = {
        name: estimate(excess.losses[selecting:][excess.measured[selecting:]]) for name, excess in references.items()
    }
    whole = measured_most.cut is None and bool(measured_most.measured[selecting:].all())
    unsure = few is not None or not selected or not whole
    rivals = [
        name
        for name in contenders
        if (may_be_better(references[name], references[best]) if unsure else name == best)
        or (whole and estimate(references[name].losses[selecting:] - references[best].losses[selecting:]).high < 0.0)
    ]
    rivals.sort(key=lambda name: name != best)
    lows = {name: few.least(name, one.low) if few else one.low for name, one in differences.items()}
    spanned = replace(
        differences[best],
        low=min(lows[name] for name in rivals),
        high=max(differences[name].high for name in rivals),
    )
    return Margin(
        estimate=spanned,
        best=best,
        references={name: difference.value for name, difference in differences.items()},
        least=min(lows[name] for name in contenders),
        most=min(differences[name].high for name in contenders),
        complete=complete,
        whole=whole,
        cut=measured_most.cut,
        seen=measured_most.seen,
        by_sequence={name: references[name].losses[selecting:] for name in rivals},
        contending=tuple(
            references[name].losses[selecting:][references[name].measured[selecting:]] for name in contenders
        ),
    )


def measured_on_most(references: Mapping[str, Excess]) -> list[str]:
    """The references that were measured on most tokens."""
    widest = max(references.values(), key=lambda excess: (excess.cut is None, excess.cut or 0, excess.measured.sum()))
    return [name for name, excess in references.items() if excess.alike(widest)]


def doubt_of_cut(seen: float) -> tuple[float, float]:
    """How many times a margin on the first tokens its margin on whole sequences is, at least and at most, if those are
    a share `seen` of all.
    """
    return seen + (1.0 - seen) / CUT_DOUBT, seen + (1.0 - seen) * CUT_DOUBT


def may_be_better(rival: Excess, best: Excess, doubt: float = ONE_SIDE) -> bool:
    """Whether a reference is not certainly worse than the one that was picked; true of that one itself. One that is as
    good would be called worse no oftener than `doubt`.

    On the first tokens of sequences only one that costs as many times more as `doubt_of_cut` says is certainly worse:
    on whole sequences either may cost more or less than there.
    """
    if rival is best:
        return True
    if not rival.alike(best):
        return False
    measured = rival.measured
    rivals, bests = rival.losses[measured], best.losses[measured]
    if rival.cut is not None and doubt_of_excess(rivals - doubt_of_cut(rival.seen)[1] * bests) >= doubt:
        return True
    return doubt_of_excess(rivals - bests) >= doubt


def margins_of(
    variants: Mapping[Variant, Excess], references: Sequence[str], selecting: int, *, few: Few | None = None
) -> dict[Place, Margin]:
    """The margin of every block and part that has variants, by block and target."""
    return {
        place: margin(excesses, selecting, complete=set(excesses) >= reachable(*place, references), few=few)
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

    Both numbers are the same where all margins are of all sequences. What one of a few sequences, or of first tokens
    only, would be on all is not known: the two numbers allow for that.
    """
    return tuple(_threshold(others) for others in _others([_limits(margin) for margin in margins]))


def over(margins: Sequence[Margin]) -> tuple[bool, ...]:
    """Whether each margin is over its threshold with every reference that may be the best.

    Of many that are looked at on few sequences some lie over it by chance. So a margin that was not measured in full
    must do so clearly enough beside the others (Benjamini and Hochberg 1995): where most are over it, by its interval;
    where no other is, by one that is wider for their number.
    """
    limits = [limit.above for limit in thresholds(margins)]
    doubts = [margin.doubt(limit) for margin, limit in zip(margins, limits, strict=True)]
    ranked = enumerate(sorted(doubts), start=1)
    tolerated = max((doubt for rank, doubt in ranked if doubt <= rank / len(doubts) * ONE_SIDE), default=-1.0)
    return tuple(
        margin.least > limit and (margin.whole or doubt <= tolerated)
        for margin, limit, doubt in zip(margins, limits, doubts, strict=True)
    )


def _limits(margin: Margin) -> tuple[float, float]:
    """The least and the most that a margin may be on all sequences, as far as thresholds need to allow for it."""
    if margin.whole and margin.cut is None:
        return margin.estimate.value, margin.estimate.value
    low, high = margin.least, max(margin.least, margin.most)
    least, most = (1.0, 1.0) if margin.cut is None else doubt_of_cut(margin.seen)
    return min(low, low * least), max(high, high * most)


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
    for margin, threshold, surely in zip(margins, thresholds(margins), over(margins), strict=True):
        if margin.estimate.high < threshold.below and margin.whole:
            decided.append("below")
        elif margin.estimate.low > threshold.above and margin.complete and (surely or margin.whole):
            decided.append("above")
        else:
            decided.append("undecided")
    return tuple(decided)


def of_target(margins: Mapping[Place, Margin], target: str) -> dict[int, Margin]:
    """The margins of one kind by block."""
    return {index: margin for (index, kind), margin in margins.items() if kind == target}
