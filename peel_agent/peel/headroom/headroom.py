"""Headroom (method.md 5): how much a block's output matrices, refitted toward lower loss, would win.

One step against the loss's gradient in function space, W - eta (X'X + ridge)^-1 X'G, within the block's own weight
set. Ridge and length of the step are picked on `select`, the win is measured on `confirm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from peel_agent.peel.headroom.gradients import Descent, backwards, descents
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import Streams, score_ids
from peel_agent.peel.references import refit_fault, within
from peel_agent.peel.sweep import splices
from peel_agent.peel.sweep.splices import TARGETS, Site, Target, Variant
from peel_agent.peel.sweep.tails import Tails
from peel_agent.records import FULL_PRECISION, Block, Estimate, PartName, Projection, Skipped, Trace, WeightSet

RIDGES = (1e-1, 1e-3)
"""Relative to the mean diagonal of the Gram matrix."""

LENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Lengths of the step, relative to what the same part of a typical block adds to the stream;"""

LOW_BIT_LENGTHS = (0.1, 0.3, 1.0)
"""longer ones for a low-bit matrix, where a short step rounds back to where it came from."""

SELECT_FRACTION = 4
"""One in so many sequences of `select` picks ridge and length: steps of one direction rise and fall together."""

SELECT_SEQUENCES = 4
"""Never fewer than these."""


@dataclass(frozen=True)
class Better:
    """Other output projections for a block, None where it keeps the trained one."""

    attention: Projection | None
    mlp: Projection | None


@dataclass(frozen=True)
class Headroom:
    """What a better block wins: loss(trained) - loss(better) on confirm, and that block.

    `by_sequence` holds what is won on each confirm sequence. `shares` are a low-bit block's (quantisation,
    optimisation) in nats per token (method.md 5), None for others.
    """

    won: Mapping[Target, Estimate]
    by_sequence: Mapping[Target, Losses]
    better: Mapping[Target, Better]
    shares: tuple[float, float] | None


TRAINED = Better(None, None)


def headrooms(
    trace: Trace,
    trained: Losses,
    added: Sequence[Mapping[PartName, float]],
    stopwatch: Stopwatch,
    only: int | None = None,
) -> tuple[dict[int, Headroom], tuple[Skipped, ...]]:
    """The headroom of every block (or only of one) by index; `trained` are the losses per score sequence.

    `added` holds for each block what its parts add to the stream, root mean square over positions: a step is as long
    as a typical block's, whatever the block itself adds, so that a part that adds nothing is not thought perfect.
    """
    why = refit_fault(trace)
    if why is not None:
        return {}, (Skipped("headroom", why),)
    positions = trace.probe.fit.size
    typical = {part: median(rms[part] for rms in added) * positions**0.5 for part in ("attention", "mlp")}
    rooms: dict[int, Headroom] = {}
    depth = len(trace.block_names)
    stopwatch.progress("headroom, blocks", 0, depth)
    for block, entering, gradient, hand_back in stopwatch.each("solve", backwards(trace)):
        began = stopwatch.now()
        with stopwatch("solve"):
            attention, mlp, further = descents(block, entering.fit, gradient, trace.chunk, typical)
        hand_back(further)
        if only in (None, block.index):
            rooms[block.index] = _headroom(_Scoring(trace, block, entering, trained), block, attention, mlp, stopwatch)
        stopwatch.progress("headroom, blocks", depth - block.index, depth)
        if block.index == only or (block.index and not stopwatch.affords(stopwatch.now() - began)):
            break
    missing = [name for index, name in enumerate(trace.block_names) if only is None and index not in rooms]
    return rooms, tuple(Skipped(f"headroom of {name}", stopwatch.refusal()) for name in missing)


def _headroom(scoring: _Scoring, block: Block, attention: Descent, mlp: Descent, stopwatch: Stopwatch) -> Headroom:
    sets = (block.attention_set, block.mlp_set)
    low_bit = any(weight_set.restricts for weight_set in sets)
    with stopwatch("solve"):
        inside = list(_candidates(attention, mlp, sets, LOW_BIT_LENGTHS if low_bit else LENGTHS))
        free = list(_candidates(attention, mlp, (FULL_PRECISION, FULL_PRECISION), LENGTHS)) if low_bit else []
    with stopwatch("score"):
        better = {
            target: scoring.best([TRAINED, *(_for(target, candidate) for candidate in inside)]) for target in TARGETS
        }
        each = {target: scoring.won(improved) for target, improved in better.items()}
        won = {target: estimate(differences) for target, differences in each.items()}
        if not low_bit:
            return Headroom(won, each, better, None)
        whole = scoring.won(scoring.best([TRAINED, *free, better["block"]]))  # free weights may be low-bit ones too
    shares = (float(whole.mean()) - won["block"].value, won["block"].value)
    return Headroom(won, each, better, shares)


def _for(target: Target, better: Better) -> Better:
    """A candidate for the whole block, with the other part left as trained."""
    return better if target == "block" else replace(better, **{"mlp" if target == "attention" else "attention": None})


def _candidates(
    attention: Descent, mlp: Descent, sets: tuple[WeightSet, WeightSet], lengths: tuple[float, ...]
) -> Iterator[Better]:
    """Both projections after a step of each ridge and length, within their weight sets."""
    for one, other in zip(attention.gram.solve(RIDGES), mlp.gram.solve(RIDGES), strict=True):
        for length in lengths:
            yield Better(_stepped(attention, one.weight, length, sets[0]), _stepped(mlp, other.weight, length, sets[1]))


def _stepped(descent: Descent, direction: torch.Tensor, length: float, weight_set: WeightSet) -> Projection:
    """The projection after a step of this relative length down a direction [p, q], the bias in its last row."""
    reach = descent.gram.norm(direction)
    step = direction * (length * descent.typical / reach if reach > 0 else 0.0)
    trained = descent.projection
    weight = trained.weight.double() - (step if trained.bias is None else step[:-1])
    rounded = within(weight, descent.gram, weight_set).to(trained.weight.dtype)
    return Projection(rounded, None if trained.bias is None else (trained.bias.double() - step[-1]).to(rounded.dtype))


class _Scoring:
    """Measures changed blocks in place of the trained one, on the score sequences."""

    def __init__(self, trace: Trace, block: Block, entering: Streams, trained: Losses) -> None:
        self._trace = trace
        self._block = block
        self._entering = entering
        self._trained = trained
        self._selecting = len(trace.probe.select)

    def best(self, candidates: list[Better]) -> Better:
        """The candidate with the least loss on select; the first among equals."""
        rows = np.arange(min(self._selecting, max(SELECT_SEQUENCES, self._selecting // SELECT_FRACTION)))
        return candidates[int(self._losses(candidates, rows).mean(axis=1).argmin())]

    def won(self, better: Better) -> Losses:
        """loss(trained) - loss(better) on each confirm sequence."""
        rows = np.arange(self._selecting, len(self._trained))
        won: Losses = self._trained[rows] - self._losses([better], rows)[0]
        return won

    def _losses(self, candidates: list[Better], rows: NDArray[np.int64]) -> Losses:
        """[candidates, rows]."""
        trace, index = self._trace, self._block.index
        h = self._entering.score[torch.from_numpy(rows)]
        tails = Tails(trace, score_ids(trace.probe)[rows], 0)
        variants = {
            Variant(index, "block", str(place)): splices.changed(attention=candidate.attention, mlp=candidate.mlp)
            for place, candidate in enumerate(candidates)
            if candidate is not TRAINED
        }
        tails.splice(variants, Site(self._block, h, h, None, trace.chunk))
        measured = {int(variant.reference): losses for variant, losses in tails.losses.items()}
        return np.stack([measured.get(place, self._trained[rows]) for place in range(len(candidates))])
