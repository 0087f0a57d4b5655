"""Margins by a race (METHOD 8): every candidate is scored on a few sequences first; where these do not already clear a
block or part, the candidate that won there is scored on all of confirm. So nothing is accused on a few sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from peel_agent.peel.intervals import estimate
from peel_agent.peel.margins import Margin, margins_of, of_target, thresholds
from peel_agent.peel.splices import Target, Variant
from peel_agent.peel.stopwatch import Stopwatch
from peel_agent.peel.sweep import TARGETS, Sweep, carry, sweep
from peel_agent.records import Probe, Trace

HEAT_FRACTION = 4
"""The first heat takes all of select, for the choice of a reference hangs on it, and one in so many of confirm,"""

HEAT_CONFIRM_SEQUENCES = 8
"""but never fewer than these: an interval needs them."""


def race(
    trace: Trace, references: tuple[str, ...], keep: frozenset[int], stopwatch: Stopwatch
) -> tuple[Sweep, dict[tuple[int, Target], Margin]]:
    """Margins of every block and part, and the sweep that solved their references and kept the hidden states `keep`."""
    selecting, rows = len(trace.probe.select), first_heat(trace.probe)
    swept = sweep(trace, references, rows, keep, stopwatch)
    margins = margins_of(swept.trained[rows], swept.variants, references, selecting)
    if len(rows) < len(swept.trained):
        margins |= _second_heat(trace, swept, margins, stopwatch)
    return swept, margins


def first_heat(probe: Probe) -> NDArray[np.int64]:
    """Places of the score sequences in the first heat, select first: all of them, if few would be spared."""
    select, confirm = len(probe.select), len(probe.confirm)
    heat = max(HEAT_CONFIRM_SEQUENCES, confirm // HEAT_FRACTION)
    return np.arange(select + (heat if 2 * heat <= confirm else confirm))


def _second_heat(
    trace: Trace, swept: Sweep, margins: Mapping[tuple[int, Target], Margin], stopwatch: Stopwatch
) -> dict[tuple[int, Target], Margin]:
    """The margins that are still open, measured on the whole of confirm."""
    winners = {Variant(*place, margins[place].best): place for place in still_open(margins, len(trace.block_names))}
    if not winners:
        return {}
    confirm = np.arange(len(trace.probe.select), len(swept.trained))
    losses = carry(trace, {variant: swept.solved[variant] for variant in winners}, confirm, stopwatch)
    found = {}
    for variant, place in winners.items():
        worse = losses[variant] - swept.trained[confirm]
        references = {**margins[place].references, variant.reference: float(worse.mean())}
        found[place] = dataclasses.replace(margins[place], estimate=estimate(worse), references=references)
    return found


def still_open(margins: Mapping[tuple[int, Target], Margin], depth: int) -> frozenset[tuple[int, Target]]:
    """The blocks and parts that a few sequences do not show to be above their threshold."""
    found = set()
    for target in TARGETS if margins else ():
        own = of_target(margins, target, depth)
        for index, threshold in enumerate(thresholds(own)):
            if own[index].estimate.low <= threshold:
                found.add((index, target))
    return frozenset(found)
