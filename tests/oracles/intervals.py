"""The bootstrap interval of a mean over sequences (method.md 1), widened for small samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from tests.oracles.decoder import Array


class Interval(NamedTuple):
    """A mean in nats per token with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def resampled_means(values: Array, resamples: int = 1000, seed: int = 0) -> Array:
    """The means [resamples] of samples drawn with replacement from `values` [n]; n and the seed fix the draws."""
    count = len(values)
    drawn = np.random.default_rng(seed).integers(0, count, size=(resamples, count))
    means: Array = values[drawn].mean(axis=1)
    return means


def lower_quantile(count: int) -> float:
    """Phi(-t sqrt(n/(n-1))) with t the 97.5 % point of Student's t of n-1 degrees of freedom, for n >= 2 numbers.

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", the expanded percentile interval.
    """
    t = stats.t.ppf(0.975, df=count - 1)
    return float(stats.norm.cdf(-t * np.sqrt(count / (count - 1))))


def paired(differences: Array, resamples: int = 1000, seed: int = 0) -> Interval:
    """Expanded percentile interval of the mean of per-sequence differences (or losses) [n]; no width for n = 1."""
    value = float(differences.mean())
    if len(differences) == 1:
        return Interval(value, value, value)
    q = lower_quantile(len(differences))
    low, high = np.quantile(resampled_means(differences, resamples, seed), [q, 1 - q])
    return Interval(value, float(low), float(high))
