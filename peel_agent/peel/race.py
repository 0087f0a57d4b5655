"""Margins by a race (METHOD 8): every candidate is scored on a few sequences first, and again on all of them only where
that leaves the answer open.
"""

from __future__ import annotations

import numpy as np

from peel_agent.peel.margins import Margin, margins_of, of_target, thresholds
from peel_agent.peel.stopwatch import Stopwatch
from peel_agent.peel.sweep import Order, Sweep, Target, sweep
from peel_agent.records import Probe, Trace

HEAT_FRACTION = 4
"""The first heat takes one in so many of the select and of the confirm sequences,"""

HEAT_CONFIRM_SEQUENCES = 8
"""but never fewer confirm sequences than these: an interval needs them."""

TARGETS: tuple[Target, ...] = ("block", "attention", "mlp")


def race(
    trace: Trace, references: tuple[str, ...], keep: frozenset[int], stopwatch: Stopwatch
) -> tuple[Sweep, dict[tuple[int, Target], Margin]]:
    """Margins of every block and part, and the sweep that gave them with the hidden states `keep`."""
    final = everything(trace.probe, references)
    order = (first_heat(trace.probe, references) if references else None) or final
    swept = sweep(trace, order, keep, stopwatch)
    margins = margins_of(swept, order)
    if order is not final and (still := undecided(margins, len(trace.block_names))):
        order = Order(references, final.rows, final.selecting, only=still)
        margins |= margins_of(sweep(trace, order, frozenset(), stopwatch), order)
    return swept, margins


def everything(probe: Probe, references: tuple[str, ...]) -> Order:
    """All score sequences."""
    return Order(references, np.arange(len(probe.select) + len(probe.confirm)), len(probe.select))


def first_heat(probe: Probe, references: tuple[str, ...]) -> Order | None:
    """The first of the score sequences, a fraction of each part; None when that would spare less than half of them."""
    select = max(1, len(probe.select) // HEAT_FRACTION)
    confirm = max(HEAT_CONFIRM_SEQUENCES, len(probe.confirm) // HEAT_FRACTION)
    if 2 * confirm > len(probe.confirm):
        return None
    rows = np.concatenate([np.arange(select), len(probe.select) + np.arange(confirm)])
    return Order(references, rows, select)


def undecided(margins: dict[tuple[int, Target], Margin], depth: int) -> frozenset[tuple[int, Target]]:
    """The blocks and parts whose interval straddles its threshold: more sequences may tell."""
    found = set()
    for target in TARGETS:
        own = of_target(margins, target, depth)
        for index, threshold in enumerate(thresholds(own)):
            if own[index].estimate.low <= threshold <= own[index].estimate.high:
                found.add((index, target))
    return frozenset(found)
