"""Margins by a race (method.md 8): every reference is scored on a few sequences first. A block or part that even the
least of its references leaves above its threshold is cleared; at the others, the references that may still be the best
are scored on everything. So nothing is accused on a few sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from peel_agent.peel.margins.margin import Margin, Place, by_place, margins_of, may_be_better, of_target, thresholds
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.past.comparison import EARLIER, Comparison
from peel_agent.peel.sweep.forward import Sweep, carry, sweep
from peel_agent.peel.sweep.splices import TARGETS, Variant
from peel_agent.records import Estimate, Plan, Probe, Skipped, Trace

HEAT_FRACTION = 8
"""The first heat takes one in so many sequences of select and of confirm,"""

LEAST_WORSE, MOST_WORSE = 3, 8
"""So many blocks and parts that seem to have got worse are measured on all of confirm."""

HEAT_SELECT_SEQUENCES = 4
HEAT_CONFIRM_SEQUENCES = 8
"""but never fewer than these: an interval needs them."""


@dataclass(frozen=True)
class Raced:
    """The sweep that solved the stand-ins, the margin of every block and part, and the progress of each."""

    swept: Sweep
    margins: Mapping[Place, Margin]
    progress: Mapping[Place, Estimate]


def race(
    trace: Trace,
    plan: Plan,
    keep: frozenset[int],
    stopwatch: Stopwatch,
    *,
    comparison: Comparison | None = None,
) -> Raced:
    """Margins as planned, and progress over the checkpoint before if there is a comparison with it.

    The sweep keeps the hidden states `keep`.
    """
    rows = first_heat(trace.probe)
    swept = sweep(trace, plan, rows, keep, stopwatch, comparison=comparison)
    if not np.isfinite(swept.trained).all():
        return Raced(swept, {}, {})  # there is nothing to hold against anything
    raced = _raced(trace, plan, swept, comparison)
    again = contenders(swept.variants, raced.margins) if len(rows) < len(swept.trained) else ()
    worse = seeming_worse(raced.progress)
    rest = _unmeasured(swept, rows, len(trace.probe.select), again=bool(again), worse=bool(worse))
    if not len(rest):
        return raced
    work = len(rest) * sum(len(trace.block_names) - variant.block for variant in (*again, *worse))
    if not stopwatch.affords(work * swept.seconds_per_work):
        left_out = Skipped("open margins on all sequences", stopwatch.refusal())
        return replace(raced, swept=replace(swept, skipped=(*swept.skipped, left_out)))
    carried = carry(trace, {variant: swept.solved[variant] for variant in (*again, *worse)}, rest, stopwatch)
    merged = {variant: losses.copy() for variant, losses in {**swept.variants, **swept.progress}.items()}
    for variant, losses in carried.items():
        merged[variant][rest] = losses
    stand_ins = {variant: merged[variant] for variant in swept.variants}
    earlier = {variant: merged[variant] for variant in swept.progress}
    return _raced(trace, plan, replace(swept, variants=stand_ins, progress=earlier), comparison)


def _raced(trace: Trace, plan: Plan, swept: Sweep, comparison: Comparison | None) -> Raced:
    selecting = len(trace.probe.select)
    margins = margins_of(swept.trained, swept.variants, plan.references, selecting, unsure_of_best=plan.few_sequences)
    progress: dict[Place, Estimate] = {}
    # What was measured before the comparison fell counts for nothing: its files may be torn.
    for variant, losses in swept.progress.items() if comparison is not None and comparison.stands else ():
        measured = np.isfinite(losses[selecting:])
        if measured.any():
            progress[variant.block, variant.target] = estimate((losses - swept.trained)[selecting:][measured])
    return Raced(swept, margins, progress)


def _unmeasured(
    swept: Sweep, rows: NDArray[np.int64], selecting: int, *, again: bool, worse: bool
) -> NDArray[np.int64]:
    """Where references that are measured `again`, and places that seem `worse`, have not been measured yet.

    Progress may have been measured on fewer `rows` than references were, and on none of select, where nothing is
    chosen by it.
    """
    everything = np.arange(len(swept.trained))
    rest = np.setdiff1d(everything, rows) if again else everything[:0]
    if not worse:
        return rest
    measured = np.asarray(np.isfinite(np.stack(list(swept.progress.values()))).any(axis=0))
    return np.union1d(rest, everything[selecting:][~measured[selecting:]])


def seeming_worse(progress: Mapping[Place, Estimate]) -> tuple[Variant, ...]:
    """What is to be measured on all of confirm: the places that seem worse than at the checkpoint before.

    Those that are worse for certain on a few sequences, MOST_WORSE of them at most, and the next lowest up to
    LEAST_WORSE; the lowest first.
    """
    lowest = sorted((own for own in progress if progress[own].value < 0.0), key=lambda own: progress[own].value)
    certain = sum(progress[place].high < 0.0 for place in lowest)
    return tuple(Variant(*place, EARLIER) for place in lowest[: min(MOST_WORSE, max(LEAST_WORSE, certain))])


def first_heat(probe: Probe) -> NDArray[np.int64]:
    """Places of the score sequences in the first heat, select first: all of them, if few would be spared."""
    selecting, confirming = len(probe.select), len(probe.confirm)
    select = min(selecting, max(HEAT_SELECT_SEQUENCES, selecting // HEAT_FRACTION))
    confirm = min(confirming, max(HEAT_CONFIRM_SEQUENCES, confirming // HEAT_FRACTION))
    if 4 * (select + confirm) > 3 * (selecting + confirming):
        select, confirm = selecting, confirming
    return np.concatenate([np.arange(select), selecting + np.arange(confirm)])


def contenders(variants: Mapping[Variant, Losses], margins: Mapping[Place, Margin]) -> tuple[Variant, ...]:
    """What is to be measured on everything: at each open place, the references that may yet be its best."""
    found = []
    losses = by_place(variants)
    for place in still_open(margins):
        best = losses[place][margins[place].best]
        for name, own in losses[place].items():
            if may_be_better(own, best):
                found.append(Variant(*place, name))
    return tuple(found)


def still_open(margins: Mapping[Place, Margin]) -> tuple[Place, ...]:
    """The blocks and parts that are not above their threshold with every one of their references."""
    found = []
    for target in TARGETS:
        own = of_target(margins, target)
        limits = thresholds(list(own.values()))
        found += [(index, target) for index, limit in zip(own, limits, strict=True) if own[index].least <= limit]
    return tuple(found)
