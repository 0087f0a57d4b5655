"""Which tokens variants are scored on: a heat, as of a race. It is of whole sequences, or a cut: of their first tokens.

Under causal attention the first tokens of a sequence are predicted the same whatever follows them. So the losses on a
cut are exactly those that the same tokens have in the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peel_agent.peel.numerics.streams import score_ids
from peel_agent.records import Probe, TokenIds, Trace

CUT_TOLERANCE = 1e-3
"""By how much a block's output on a cut may differ from its output on the same tokens of the whole sequence, relative
to the largest value: sums in another order differ by less.
"""


@dataclass(frozen=True)
class Heat:
    """The first `length` tokens of the score sequences at `rows`, select first."""

    rows: NDArray[np.int64]
    length: int

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.length

    def ids(self, probe: Probe) -> TokenIds:
        """[rows, length]."""
        ids: TokenIds = score_ids(probe)[self.rows, : self.length]
        return ids

    def of(self, score: Tensor) -> Tensor:
        """These tokens of a stream over the score sequences, [rows, length, d] of [N, S, d]."""
        return score[torch.from_numpy(self.rows), : self.length]

    def spread(self, losses: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        """Losses [rows] at their places among so many score sequences, NaN at the others."""
        spread = np.full(count, np.nan)
        spread[self.rows] = losses
        return spread


def nowhere(trace: Trace) -> Heat:
    """No tokens at all, for a sweep without variants."""
    return Heat(np.arange(0), trace.probe.sequence_length)


def cut_is_exact(trace: Trace, length: int) -> bool:
    """Whether the first block's output on a cut is what it is on the same tokens of the whole sequence.

    It is not where tokens attend to later ones, or where positions depend on the length of the sequence.
    """
    ids = trace.probe.confirm[:1]
    block = next(iter(trace.blocks(stop=1)))
    whole = block.run(trace.embed(ids))[:, :length]
    difference = block.run(trace.embed(ids[:, :length])) - whole
    return bool(difference.abs().max() <= CUT_TOLERANCE * whole.abs().max())
