"""Paired bootstrap intervals over sequences (method.md 4c)."""

from __future__ import annotations

from functools import cache
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from peel_agent.records import Estimate

RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95


def estimate(per_sequence: NDArray[np.float64]) -> Estimate:
    """Mean of one number a sequence [N] with its 95 % bootstrap interval, expanded for small N.

    Give the *differences* of two losses for a paired comparison. The resamples are the same at every call with the
    same N, so two estimates over the same sequences are comparable.
    """
    count = len(per_sequence)
    if count == 1:
        only = float(per_sequence[0])
        return Estimate(only, only, only)
    draws = np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, count))
    tail = tail_percent(count)
    low, high = np.percentile(per_sequence[draws].mean(axis=1), [tail, 100.0 - tail])
    return Estimate(float(per_sequence.mean()), float(low), float(high))


def doubt_of_excess(per_sequence: NDArray[np.float64]) -> float:
    """How likely so high a mean of numbers [N] is if the true one is not above 0: one-sided, by Student's t."""
    count, mean = len(per_sequence), float(per_sequence.mean())
    error = float(per_sequence.std(ddof=1)) / sqrt(count) if count > 1 else 0.0
    if error == 0.0:
        return 0.0 if mean > 0.0 else 1.0
    return float(stdtr(count - 1, -mean / error))


@cache
def tail_percent(count: int) -> float:
    """Percent of the resampled means to leave out at each end, for so many sequences.

    A plain percentile interval is too narrow for few: its resamples have the variance (n-1)/n, and the normal's
    quantiles where Student's are due (the expanded percentile interval, Hesterberg, arXiv 1411.5279).
    """
    student = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2))
    return 100.0 * NormalDist().cdf(-student * sqrt(count / (count - 1)))
