"""Margins by a race (method.md 8): every reference is scored on a few sequences first. A block or part that even the
least of its references leaves above its threshold is cleared; at the others, the references that may still be the best
are scored on everything. So nothing is accused on a few sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from peel_agent.peel.margins.margin import Margin, Place, by_place, margins_of, of_target, thresholds
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.sweep.forward import Sweep, carry, sweep
from peel_agent.peel.sweep.splices import TARGETS, Variant
from peel_agent.records import Plan, Probe, Skipped, Trace

HEAT_FRACTION = 8
"""The first heat takes one in so many sequences of select and of confirm,"""

HEAT_SELECT_SEQUENCES = 4
HEAT_CONFIRM_SEQUENCES = 8
"""but never fewer than these: an interval needs them."""


def race(trace: Trace, plan: Plan, keep: frozenset[int], stopwatch: Stopwatch) -> tuple[Sweep, dict[Place, Margin]]:
    """Margins as planned, and the sweep that solved their references and kept the hidden states `keep`."""
    selecting, rows = len(trace.probe.select), first_heat(trace.probe)
    swept = sweep(trace, plan, rows, keep, stopwatch)
    margins = margins_of(swept.trained, swept.variants, plan.references, selecting)
    rest = np.setdiff1d(np.arange(len(swept.trained)), rows)
    again = contenders(swept.variants, margins) if len(rest) else ()
    if not again:
        return swept, margins
    work = len(rest) * sum(len(trace.block_names) - variant.block for variant in again)
    if not stopwatch.affords(work * swept.seconds_per_work):
        return replace(
            swept, skipped=(*swept.skipped, Skipped("open margins on all sequences", stopwatch.refusal()))
        ), margins
    carried = carry(trace, {variant: swept.solved[variant] for variant in again}, rest, stopwatch)
    merged = {variant: losses.copy() for variant, losses in swept.variants.items()}
    for variant, losses in carried.items():
        merged[variant][rest] = losses
    return swept, margins_of(swept.trained, merged, plan.references, selecting)


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
            measured = np.isfinite(own)
            if estimate((own - best)[measured]).low <= 0.0:
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
