"""Streams of hidden states, run through functions a few sequences at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peel_agent.records import Probe, TokenIds, Trace


@dataclass(frozen=True)
class Streams:
    """One hidden state over the probe: fit [N_f, S, d], and score [N_s + N_c, S, d], select first, confirm after."""

    fit: Tensor
    score: Tensor
    selecting: int

    @property
    def select(self) -> Tensor:
        return self.score[: self.selecting]

    @property
    def confirm(self) -> Tensor:
        return self.score[self.selecting :]

    def first(self, tokens: int) -> Streams:
        """The same with no more fit sequences than these tokens fill."""
        sequences = -(-tokens // self.fit.shape[1])
        return Streams(self.fit[:sequences], self.score, self.selecting)

    def through(self, function: Callable[[Tensor], Tensor], chunk: int) -> Streams:
        """Both parts run through `function` ([B, S, d] to [B, S, d]), `chunk` sequences at a time."""
        return Streams(through(function, self.fit, chunk), through(function, self.score, chunk), self.selecting)


def through(function: Callable[[Tensor], Tensor], stream: Tensor, chunk: int) -> Tensor:
    """A stream [N, S, d] run through `function`, `chunk` sequences at a time."""
    return torch.cat([function(part) for part in stream.split(chunk)])


def score_ids(probe: Probe) -> TokenIds:
    """Token ids of select, then confirm: [N_s + N_c, S]."""
    ids: TokenIds = np.concatenate([probe.select, probe.confirm])
    return ids


def embedded(trace: Trace) -> Streams:
    """h_0 over the probe."""
    probe = trace.probe
    return Streams(trace.embed(probe.fit), trace.embed(score_ids(probe)), len(probe.select))
