"""Streams of hidden states, run through functions a few sequences at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from peel_agent.records import Chunk, Probe, TokenIds, Trace

Result = TypeVar("Result")


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

    def first(self, fit: int, select: int | None = None) -> Streams:
        """The same with no more fit sequences than these tokens fill; with `select` no more of that, and no confirm."""
        few = self.fit[: -(-fit // self.fit.shape[1])]
        if select is None:
            return Streams(few, self.score, self.selecting)
        selecting = min(self.selecting, -(-select // self.fit.shape[1]))
        return Streams(few, self.select[:selecting], selecting)

    def through(self, function: Callable[[Tensor], Tensor], chunk: Chunk) -> Streams:
        """Both parts run through `function` ([B, S, d] to [B, S, d]), `chunk` sequences at a time."""
        return Streams(through(function, self.fit, chunk), through(function, self.score, chunk), self.selecting)


def pieces(function: Callable[..., Result], chunk: Chunk, *streams: Tensor) -> Iterator[Result]:
    """Results of `function` for one piece after another of streams [N, S, ...] of one length, a `chunk` each.

    When a piece does not fit into the device's memory the chunk is halved, for everything that comes after too, and
    the same sequences are run again; a single sequence that does not fit is torch's own error.
    """
    start = 0
    while start < len(streams[0]):
        stop = start + chunk.of(streams[0].shape[1])
        try:
            result = function(*(stream[start:stop] for stream in streams))
        except RuntimeError as error:
            if not out_of_memory(error) or not chunk.halve():
                raise
        else:
            yield result
            start = stop
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that something did not fit into the memory of this process or the device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def through(function: Callable[[Tensor], Tensor], stream: Tensor, chunk: Chunk) -> Tensor:
    """A stream [N, S, d] run through `function`, `chunk` sequences at a time."""
    return torch.cat(list(pieces(function, chunk, stream)))


def rewrite(function: Callable[[Tensor], Tensor], stream: Tensor, chunk: Chunk) -> None:
    """The same in place."""
    start = 0
    for result in pieces(function, chunk, stream):
        stream[start : start + len(result)] = result
        start += len(result)


def score_ids(probe: Probe) -> TokenIds:
    """Token ids of select, then confirm: [N_s + N_c, S]."""
    ids: TokenIds = np.concatenate([probe.select, probe.confirm])
    return ids


def embedded(trace: Trace) -> Streams:
    """h_0 over the probe."""
    probe = trace.probe
    return Streams(trace.embed(probe.fit), trace.embed(score_ids(probe)), len(probe.select))
