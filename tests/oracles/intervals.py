"""The bootstrap interval of a mean over sequences (method.md 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tests.oracles.decoder import Array


class Interval(NamedTuple):
    """A mean in nats per token with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def paired(differences: Array, resamples: int = 1000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of per-sequence differences (or losses) [N]."""
    count = len(differences)
    rng = np.random.default_rng(seed)
    idx = rng.integers(0, count, size=(resamples, count))
    means = np.array([differences[row].mean() for row in idx])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(differences.mean()), float(low), float(high))
