"""The numbers of one checkpoint sequence by sequence, from which it is paired with another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SequenceLosses:
    """What a checkpoint's numbers are the means of: one value for each confirm sequence, in the probe's order.

    `margins` are those of every stand-in that may be the best one, by place (`3`, `3/mlp`) and stand-in, None on
    sequences where it was not measured; `headroom` goes by place. `probe` is the fingerprint. `cuts` has the places
    whose margins are of the first so many tokens of each sequence.
    """

    probe: str
    loss: tuple[float, ...]
    margins: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    headroom: Mapping[str, tuple[float, ...]]
    cuts: Mapping[str, int] = field(default_factory=dict)
