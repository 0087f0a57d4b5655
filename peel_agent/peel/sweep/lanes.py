"""Variants that are scored on one heat, on their way from the trained streams that they leave to the head; and variants
of an earlier sweep, carried once more on other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peel_agent.peel.elsewhere import ALONE
from peel_agent.peel.numerics.losses import Excess, sequence_losses
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import pieces
from peel_agent.peel.sweep.heats import Heat
from peel_agent.peel.sweep.splices import Site, Splice, Variant
from peel_agent.peel.sweep.tails import Tails
from peel_agent.records import Block, Helpers, Trace

TAIL_SHARE = 1
"""Spliced streams may take so many times the memory of one hidden state over `fit`."""


@dataclass(frozen=True)
class Trained:
    """One block on the trained streams, [n, S, d] each: `h` enters it, `mid` is between its parts; `before` is the
    block before, with the stream that enters that one.
    """

    block: Block
    h: Tensor
    mid: Tensor
    before: tuple[Block, Tensor] | None


@dataclass(frozen=True)
class Lane:
    """Variants that are all scored on one heat; `at` is where its tokens are in the trained streams at hand."""

    trace: Trace
    heat: Heat
    at: Heat
    tails: Tails
    meter: Meter

    @classmethod
    def of(
        cls,
        trace: Trace,
        heat: Heat,
        meter: Meter,
        stage: str,
        *,
        at: Heat | None = None,
        helpers: Helpers = ALONE,
    ) -> Lane:
        share = TAIL_SHARE * trace.probe.fit.size * trace.width
        tails = Tails(trace, heat.ids(trace.probe), share, meter, stage, helpers=helpers)
        return cls(trace, heat, at or heat, tails, meter)

    def take(self, splices: Mapping[Variant, Splice], trained: Trained) -> None:
        """Runs the block on every stream that was spliced before it, and adds those that leave at it."""
        self.tails.advance(trained.block)
        if splices:
            before = None if trained.before is None else (trained.before[0], self.at.of(trained.before[1]))
            site = Site(trained.block, self.at.of(trained.h), self.at.of(trained.mid), before, self.trace.chunk)
            self.tails.splice(splices, site)

    def passes_ahead(self, block: int, variants: int) -> float:
        """What would be left to do, in forward passes, if so many variants left at this block and none after it."""
        ahead = self.meter.depth - block
        scored = self.tails.waiting + variants * self.heat.tokens
        return ahead * self.meter.blocks(scored, self.heat.length) + self.meter.head(scored)

    def excesses(self, last: Tensor) -> dict[Variant, Excess]:
        """How much higher the losses of each variant are than the trained model's, whose last stream is `last`."""
        self.tails.finish()
        if not self.tails.losses:
            return {}
        probe = self.trace.probe
        trained = sequence_losses(self.trace, self.at.of(last), self.heat.ids(probe))
        cut = self.heat.length if self.heat.length < probe.sequence_length else None
        count = len(probe.select) + len(probe.confirm)
        return {
            variant: Excess(self.heat.spread(losses - trained, count), cut, self.heat.length / probe.sequence_length)
            for variant, losses in self.tails.losses.items()
        }


def carry(
    trace: Trace,
    entries: Sequence[tuple[Heat, Mapping[Variant, Splice]]],
    stopwatch: Stopwatch,
    meter: Meter,
    stage: str = "whole sequences",
    *,
    helpers: Helpers = ALONE,
) -> list[dict[Variant, Excess]]:
    """Variants that an earlier sweep solved, each on its heat: how much higher their losses are than the trained
    model's.
    """
    every = union([heat for heat, _ in entries])
    depth = len(trace.block_names)
    with stopwatch("score"):
        lanes = [Lane.of(trace, heat, meter, stage, at=_within(every, heat), helpers=helpers) for heat, _ in entries]
        h = trace.embed(every.ids(trace.probe))
        meter.spend(restream(every, meter), stage)
        before: tuple[Block, Tensor] | None = None
        stopwatch.progress("open margins, blocks", 0, depth)
        for block in trace.blocks():
            observed = list(pieces(block.observe, trace.chunk, h))
            trained = Trained(block, h, torch.cat([piece.mid for piece in observed]), before)
            for lane, (_, splices) in zip(lanes, entries, strict=True):
                leaving = {variant: splice for variant, splice in splices.items() if variant.block == block.index}
                lane.take(leaving, trained)
            before, h = (block, h), torch.cat([piece.output for piece in observed])
            stopwatch.progress("open margins, blocks", block.index + 1, depth)
        return [lane.excesses(h) for lane in lanes]


def union(heats: Sequence[Heat]) -> Heat:
    """A heat that holds the tokens of all these."""
    return Heat(np.unique(np.concatenate([heat.rows for heat in heats])), max(heat.length for heat in heats))


def _within(every: Heat, heat: Heat) -> Heat:
    """Where a heat's tokens are in the streams of one that holds them."""
    return Heat(np.searchsorted(every.rows, heat.rows), heat.length)


def restream(every: Heat, meter: Meter) -> float:
    """What the trained streams cost once more, in forward passes."""
    return meter.blocks(every.tokens, every.length, meter.depth) + meter.head(every.tokens)
