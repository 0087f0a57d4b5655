"""Spliced streams on their way to the head (method.md 8): each leaves the trained one at its block and runs through
every later trained block.

Streams wait in memory for the next block, so that a block's weights are read once for all of them, until they take
more than their share; then they are run to the end at once, for which the later blocks are read once more. So memory
does not grow with the depth of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peel_agent.peel.numerics.losses import Losses, sequence_losses
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.streams import rewrite
from peel_agent.peel.sweep.splices import Site, Splice, Variant
from peel_agent.records import Block, TokenIds, Trace


class Tails:
    """Streams spliced so far, and the losses of those that have reached the head.

    `ids` [n, S] are the tokens on which variants are scored, `share` is the most elements that streams may hold between
    two blocks. What they cost is told to the `meter` as it is done, as work of a `stage`; `work` is the sum, in plain
    forward passes.
    """

    def __init__(self, trace: Trace, ids: TokenIds, share: int, meter: Meter | None = None, stage: str = "") -> None:
        self.losses: dict[Variant, Losses] = {}
        self.work = 0.0
        self._meter = meter
        self._stage = stage
        self._trace = trace
        self._ids = ids
        self._share = share
        self._bundles: list[tuple[tuple[Variant, ...], Tensor]] = []

    @property
    def waiting(self) -> int:
        """Tokens on their way, over all variants."""
        return sum(len(bundle) for _, bundle in self._bundles) * int(self._ids.shape[1])

    @property
    def ahead(self) -> float:
        """What it costs to run the waiting streams through one more block."""
        return 0.0 if self._meter is None else self._meter.blocks(self.waiting, self._ids.shape[1])

    def advance(self, block: Block) -> None:
        """Runs the block on every stream that was spliced before it."""
        for _, bundle in self._bundles:
            rewrite(block.run, bundle, self._trace.chunk)
        self._count(self.ahead)

    def splice(self, splices: Mapping[Variant, Splice], site: Site) -> None:
        """Adds the streams that leave the trained one at this site; runs all to the end when they hold too much."""
        if splices:
            self._bundles.append((tuple(splices), torch.cat([splice(site) for splice in splices.values()])))
            if self._meter is not None:  # a stand-in costs a block at most
                self._count(self._meter.blocks(len(splices) * self._ids.size, self._ids.shape[1]))
        if sum(bundle.numel() for _, bundle in self._bundles) > self._share:  # a share of 0 lets none wait
            for block in self._trace.blocks(site.block.index + 1):
                self.advance(block)
            self.score()

    def score(self) -> None:
        """Scores the streams, which have passed the last block, with the trained head."""
        if self._meter is not None:
            self._count(self._meter.head(self.waiting))
        for variants, bundle in self._bundles:
            for variant, stream in zip(variants, bundle.split(len(self._ids)), strict=True):
                self.losses[variant] = sequence_losses(self._trace, stream, self._ids)
        self._bundles = []

    def _count(self, passes: float) -> None:
        self.work += passes
        if self._meter is not None:
            self._meter.spend(passes, self._stage)
