"""Spliced streams on their way to the head (method.md 8): each leaves the trained one at its block and runs through
every later trained block.

Streams wait in memory for the next block, so that a block's weights are read once for all of them, until they take
more than their share; then they are run to the end at once, for which the later blocks are read once more. So memory
does not grow with the depth of the model. Where there are helpers, streams that leave at one block are handed out as
one piece; it gets the losses that it would have had here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from peel_agent.peel.elsewhere import ALONE, collected
from peel_agent.peel.numerics.losses import Losses, sequence_losses
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.streams import rewrite
from peel_agent.peel.sweep.splices import Site, Splice, Variant
from peel_agent.records import Block, HandedOut, Helpers, TailPiece, TokenIds, Trace

Bundle = tuple[tuple[Variant, ...], Tensor]
"""Variants that left at one block, and their streams one after the other."""


def tail_losses(trace: Trace, piece: TailPiece, alive: Callable[[], None] = lambda: None) -> Losses:
    """The losses [V n] of a piece's streams, for its n token ids: what Tails computes of one bundle, step by step."""
    bundle = torch.tensor(piece.stream, device=trace.head.weight.device)  # a copy, in torch's own alignment
    for block in trace.blocks(piece.block):
        rewrite(block.run, bundle, trace.chunk)
        alive()
    return np.concatenate([sequence_losses(trace, stream, piece.ids) for stream in bundle.split(len(piece.ids))])


MAPS = ("skip", "affine")
"""References that run no block themselves where they stand in for a whole one."""


class Tails:
    """Streams spliced so far, and the losses of those that have reached the head.

    `ids` [n, S] are the tokens on which variants are scored, `share` is the most elements that streams may hold between
    two blocks. What they cost is told to the `meter` as it is done, as work of a `stage`; `work` is the sum of what is
    done here, in plain forward passes. `helpers` compute what they take.
    """

    def __init__(
        self,
        trace: Trace,
        ids: TokenIds,
        share: int,
        meter: Meter | None = None,
        stage: str = "",
        *,
        helpers: Helpers = ALONE,
    ) -> None:
        self.losses: dict[Variant, Losses] = {}
        self.work = 0.0
        self._meter = meter
        self._stage = stage
        self._trace = trace
        self._ids = ids
        self._share = share
        self._helpers = helpers
        self._bundles: list[Bundle] = []
        self._order: list[Variant] = []
        self._out: dict[tuple[Variant, ...], HandedOut] = {}

    @property
    def waiting(self) -> int:
        """Tokens on their way here, over all variants."""
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
            bundle = torch.cat([splice(site) for splice in splices.values()])
            if self._meter is not None:
                blocks = sum(stand_in(variant, self._meter) for variant in splices)
                self._count(self._meter.blocks(self._ids.size, self._ids.shape[1], blocks))
            self._order += splices
            self._bundles += self._left(tuple(splices), bundle, site.block.index + 1)
        if sum(bundle.numel() for _, bundle in self._bundles) > self._share:  # a share of 0 lets none wait
            for block in self._trace.blocks(site.block.index + 1):
                self.advance(block)
            self.score()

    def _left(self, variants: tuple[Variant, ...], bundle: Tensor, block: int) -> list[Bundle]:
        """The bundle, to be run here from this block on, unless a helper has taken it."""

        def piece() -> TailPiece:
            return TailPiece(self._trace.chunk.sequences, block, bundle.cpu().numpy(), self._ids)

        taken = self._helpers.hand_out(piece)
        if taken is None:
            return [(variants, bundle)]
        self._out[variants] = taken
        if self._meter is not None:
            self._meter.spend(self._meter.tail(block, len(variants) * self._ids.size, self._ids.shape[1]), self._stage)
        return []

    def finish(self) -> None:
        """Scores the streams, and waits for those that are elsewhere; `losses` are then in the order of the splices."""
        self.score()
        out = collected(self._out, self._helpers, lambda piece: tail_losses(self._trace, piece))
        for variants, losses in out.items():
            self.losses |= zip(variants, np.split(losses, len(variants)), strict=True)
        self._out = {}
        self.losses = {variant: self.losses[variant] for variant in self._order}

    def score(self) -> None:
        """Scores the streams here, which have passed the last block, with the trained head."""
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


def stand_in(variant: Variant, meter: Meter) -> float:
    """What a stand-in costs at most, in blocks: for a part the other part runs, for `previous` another block."""
    return min(1.0, meter.affine) if variant.target == "block" and variant.reference in MAPS else 1.0
