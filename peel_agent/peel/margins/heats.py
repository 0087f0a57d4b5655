"""How many tokens margins are measured on: few at first, and more where a few decide nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.sweep.heats import Heat, cut_is_exact
from peel_agent.peel.sweep.visits import trained_work
from peel_agent.records import Plan, Probe, Trace

HEAT_FRACTION = 8
"""The first heat takes one in so many sequences of select and of confirm."""

HEAT_SELECT_SEQUENCES = 4
HEAT_CONFIRM_SEQUENCES = 8
"""The first heat takes no fewer sequences than these: an interval needs them."""

WHOLE_PASSES = 2.0
"""What the first heat may cost on whole sequences, in plain forward passes over the whole probe. Fewer sequences are
taken to stay under it; where the fewest cost more still, only the first tokens of sequences are, which is a cut.
"""

CUT_PASSES = 0.75
"""What the first heat may cost on a cut, in the same unit."""

QUICK_TOKENS = 8_500
"""Effort quick costs plain forward passes over so many tokens, where the first heat clears every block. One block of
twelve that it leaves open, measured in full, costs some 1,100 more.
"""

CUT_SEQUENCES = 16
"""A cut is of so many sequences if CUT_PASSES allow LEAST_CUT tokens of each, else of HEAT_CONFIRM_SEQUENCES."""

LEAST_CUT = 64
"""Tokens of a sequence. No cut is shorter than half of this, whatever it costs."""

PICKING_TOKENS = 4096
"""Where a cut left several stand-ins, the best is picked on so many tokens of select, in no fewer sequences than
HEAT_SELECT_SEQUENCES.
"""

GROWTH = 4
"""Each longer cut has so many times the tokens of the one before."""


def quick_passes(trace: Trace, plan: Plan, meter: Meter) -> float | None:
    """What the first heat may cost under effort quick: QUICK_TOKENS less what the sweep costs without stand-ins.

    None for the other efforts, whose heats cost WHOLE_PASSES or CUT_PASSES.
    """
    if not plan.few_sequences:
        return None
    probe = trace.probe
    scored = probe.select.size + probe.confirm.size
    trained = meter.depth * trained_work(trace, plan, meter) + meter.head(scored)
    return QUICK_TOKENS / (probe.fit.size + scored) - trained


def first_heat(trace: Trace, meter: Meter, variants: int, passes: float | None = None) -> Heat:
    """The tokens on which every variant is scored first; `variants` is how many a block has.

    Whole sequences of select and confirm, or, where these are too dear, the first tokens of confirm sequences. It costs
    no more than `passes`, if the fewest tokens do not.
    """
    probe = trace.probe
    length = probe.sequence_length
    selecting, confirming = len(probe.select), len(probe.confirm)
    select, confirm = usual_sequences(selecting, confirming)
    whole, short = (WHOLE_PASSES, CUT_PASSES) if passes is None else (passes, passes)
    stand_in = 1.0 if passes is None else meter.affine
    affordable = _sequences(meter, variants, length, whole, stand_in)
    fewest = min(selecting, HEAT_SELECT_SEQUENCES) + min(confirming, HEAT_CONFIRM_SEQUENCES)
    if affordable < fewest and length > LEAST_CUT // 2:
        cut = _cut(probe, meter, variants, short, stand_in)
        if cut.length < length and cut_is_exact(trace, cut.length):
            return cut
    if affordable < select + confirm:
        confirm = max(min(confirming, HEAT_CONFIRM_SEQUENCES), min(confirm, affordable * 2 // 3))
        select = max(min(selecting, HEAT_SELECT_SEQUENCES), min(select, affordable - confirm))
        if passes is not None and affordable < fewest:
            select = 0
        if 4 * (select + confirm) > 3 * (selecting + confirming):  # little would be spared
            select, confirm = selecting, confirming
    return Heat(np.concatenate([np.arange(select), selecting + np.arange(confirm)]), length)


def usual_sequences(selecting: int, confirming: int) -> tuple[int, int]:
    """How many whole sequences of select and of confirm the first heat takes: all of them, if few would be spared."""
    select = min(selecting, max(HEAT_SELECT_SEQUENCES, selecting // HEAT_FRACTION))
    confirm = min(confirming, max(HEAT_CONFIRM_SEQUENCES, confirming // HEAT_FRACTION))
    return (select, confirm) if 4 * (select + confirm) <= 3 * (selecting + confirming) else (selecting, confirming)


def picking_rows(probe: Probe) -> int:
    """How many select sequences tell several stand-ins apart."""
    return min(len(probe.select), max(HEAT_SELECT_SEQUENCES, -(-PICKING_TOKENS // probe.sequence_length)))


def longer_heats(probe: Probe, first: Heat) -> Iterator[Heat]:
    """Cuts between the first heat and whole sequences, each GROWTH times as large."""
    rows = len(probe.select) + np.arange(min(CUT_SEQUENCES, len(probe.confirm)))
    tokens = GROWTH * first.tokens
    while first.length < probe.sequence_length and 2 * tokens <= len(rows) * probe.sequence_length:
        yield Heat(rows, tokens // len(rows))
        tokens *= GROWTH


def _sequences(meter: Meter, variants: int, length: int, passes: float, stand_in: float) -> int:
    """With how many sequences of this length the first heat costs so many forward passes."""
    each = variants * sum(meter.tail(block, length, length, stand_in) for block in range(meter.depth))
    return int(passes / each) if each > 0.0 else sys.maxsize


def _cut(probe: Probe, meter: Meter, variants: int, passes: float, stand_in: float) -> Heat:
    """The longest first tokens that so many passes are enough for."""
    many, few = (min(count, len(probe.confirm)) for count in (CUT_SEQUENCES, HEAT_CONFIRM_SEQUENCES))
    count = many if _sequences(meter, variants, LEAST_CUT, passes, stand_in) >= many else few
    lengths = range(LEAST_CUT // 2, probe.sequence_length + 1)
    fits = [length for length in lengths if _sequences(meter, variants, length, passes, stand_in) >= count]
    return Heat(len(probe.select) + np.arange(count), max(fits, default=LEAST_CUT // 2))
