"""One checkpoint beside the one before it, while the sweep visits its blocks: change, progress and sketches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from peel_agent.errors import TornCheckpoint
from peel_agent.peel.margins.margin import Place
from peel_agent.peel.past.change import Moved, changes, moved
from peel_agent.peel.past.sketch import Sketcher, moved_in_sketches
from peel_agent.peel.sweep.splices import TARGETS, Site, Splice, Target, Variant, with_weights
from peel_agent.records import Block, Change, PartName, Past, PastBlock, Sketches, Skipped

EARLIER = "earlier"
"""The name of the stand-in that is a block's, or a part's, own weights of the checkpoint before."""

BUDGET_PASSES = 0.5
"""Plain forward passes over the whole probe that progress may cost at first."""

LEAST_ROWS = 8
"""An interval needs so many sequences."""


class Comparison:
    """Sees every block once, in order. `past` holds the weights before, `sketches` what is left of them without.

    `dtype` is what the weights are stored as; with `keep` their sketches are made for the next checkpoint.
    """

    def __init__(self, past: Past | None, sketches: Sketches | None, *, dtype: str, keep: bool) -> None:
        self._past = past
        self._before = sketches if past is None else None
        self._dtype = dtype
        self._sketcher = Sketcher() if keep else None
        self._moved: list[Mapping[str, Moved]] = []
        self._part_names: list[Mapping[PartName, Sequence[str]]] = []
        self.skipped: tuple[Skipped, ...] = ()
        if self._before is not None and self._before.dtype != dtype:
            self._leave(f"the checkpoint before was stored in {self._before.dtype}, this one in {dtype}")

    @property
    def stands(self) -> bool:
        """Whether there is something to compare with, and nothing was found that speaks against it."""
        return self._past is not None or self._before is not None

    def visit(self, block: Block) -> None:
        """Compares one block's weights, latents for low-bit ones, with those of before."""
        weights = {**block.parameters, **block.latents}
        self._part_names.append(block.part_names)
        if self._sketcher is not None:
            self._sketcher.add(block, weights)
        by_weight = self._moved_of(block, weights)
        if by_weight is not None:
            self._moved.append(by_weight)

    def _moved_of(self, block: Block, weights: Mapping[str, Tensor]) -> Mapping[str, Moved] | None:
        by_weight = None
        if (before := self._read(block.index)) is not None and self._past is not None:
            rounding = self._past.rounding
            by_weight = moved(_rounded(weights, rounding), _rounded(before.stored, rounding))
        elif self._before is not None:
            by_weight = moved_in_sketches(block, weights, self._before)
            if by_weight is None:
                self._leave(f"the checkpoint before had another architecture: {block.name} had other weights")
        if not all(isfinite(one.difference + one.before) for one in (by_weight or {}).values()):
            self._leave(f"a weight of {block.name} is NaN or infinite here or at the checkpoint before")
            return None
        return by_weight

    def _read(self, index: int) -> PastBlock | None:
        """A block at the checkpoint before, whose files may be torn by now: then nothing is compared any more."""
        try:
            return None if self._past is None else self._past.block(index)
        except TornCheckpoint as error:
            self._leave(error.what)
            return None

    def _leave(self, why: str) -> None:
        """Compares nothing from here on, and says why."""
        self._past = self._before = None
        self._moved = []
        self.skipped = (*self.skipped, Skipped("change and progress", why))

    def progress(self, block: Block, targets: Sequence[Target]) -> dict[Variant, Splice]:
        """The block and its parts with their own weights of before, to be spliced in at this block."""
        if self._past is None:
            return {}
        splices: dict[Variant, Splice] = {}
        for target in targets:
            names = tuple(block.parameters) if target == "block" else block.part_names.get(target, ())
            if names:
                splices[Variant(block.index, target, EARLIER)] = self._earlier(block.index, names)
        return splices

    def _earlier(self, index: int, names: Sequence[str]) -> Splice:
        def splice(site: Site) -> Tensor:
            # The weights are read when they are used: holding those of every block would be holding the whole model.
            before = self._read(index)
            if before is None:
                return site.h  # it counts for nothing: there is no comparison any more
            return with_weights(lambda: {name: before.effective[name] for name in names})(site)

        return splice

    def changes(self) -> dict[Place, Change]:
        """The change of every block and part, once all blocks were visited."""
        if self._before is not None and sum(map(len, self._moved)) != len(self._before.shapes):
            self._leave("the checkpoint before had another architecture: weights of it are missing here")
        return changes(self._moved, self._part_names) if len(self._moved) == len(self._part_names) else {}

    def sketches(self) -> Sketches | None:
        return None if self._sketcher is None else self._sketcher.finished(self._dtype)


def _rounded(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    if dtype is None:
        return weights
    return {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}


def affordable(each: float, rows: int) -> tuple[tuple[Target, ...], int]:
    """What progress is measured on first: of which places, on how many of `rows` sequences.

    `each` are the forward passes for one sequence spliced at every block; at most BUDGET_PASSES are spent.
    """
    for targets in (TARGETS, TARGETS[:1]):
        most = int(BUDGET_PASSES / (len(targets) * each))
        if most >= min(rows, LEAST_ROWS):
            return targets, min(rows, most)
    return TARGETS[:1], min(rows, LEAST_ROWS)
