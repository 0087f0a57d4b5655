"""Next-token cross-entropy of a stream, per sequence, in nats per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from peel_agent.peel.numerics.streams import pieces
from peel_agent.records import Projection, TokenIds, Trace

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Excess:
    """How much more a variant's loss is than the trained model's, per score sequence [N], NaN where not measured.

    On the first `cut` tokens of each sequence, a share `seen` of all; None for whole sequences.
    """

    losses: Losses
    cut: int | None = None
    seen: float = 1.0

    @property
    def measured(self) -> NDArray[np.bool_]:
        return np.isfinite(self.losses)

    def alike(self, other: Excess) -> bool:
        """Whether both were measured on the same tokens."""
        return self.cut == other.cut and bool((self.measured == other.measured).all())


LOGIT_ROWS = 2048
"""Positions whose logits are held at once."""


def sequence_losses(trace: Trace, stream: Tensor, ids: TokenIds, head: Projection | None = None) -> NDArray[np.float64]:
    """Mean loss of each sequence [N] for the last stream [N, S, d], token ids [N, S] and the trained head or `head`.

    Position t predicts token t + 1, so S - 1 positions count.
    """

    def losses(part: Tensor, own_ids: Tensor) -> Tensor:
        features = trace.normalise(part)[:, :-1].flatten(0, 1)
        return position_losses(features, own_ids[:, 1:].flatten(), head or trace.head).view(len(part), -1).mean(dim=1)

    by_piece = pieces(losses, trace.chunk, stream, torch.from_numpy(ids).to(stream.device))
    return torch.cat(list(by_piece)).cpu().numpy()


@torch.no_grad()
def position_losses(features: Tensor, targets: Tensor, head: Projection) -> Tensor:
    """Cross-entropy [n] in float64 for head features [n, d] and token ids [n]."""
    losses = [
        functional.cross_entropy(logits(rows, head), wanted, reduction="none").double()
        for rows, wanted in zip(features.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses)


def logits(features: Tensor, head: Projection) -> Tensor:
    """[n, V] for features [n, d]."""
    product = functional.linear(features, head.weight.T, head.bias)
    return product if head.softcap is None else head.softcap * torch.tanh(product / head.softcap)
