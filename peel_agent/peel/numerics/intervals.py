"""Paired bootstrap intervals over sequences (method.md 4c)."""

from __future__ import annotations

from functools import cache
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

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


@cache
def tail_percent(count: int) -> float:
    """Percent of the resampled means to leave out at each end, for so many sequences.

    A plain percentile interval is too narrow for few: its resamples have the variance (n-1)/n, and the normal's
    quantiles where Student's are due (the expanded percentile interval, Hesterberg, arXiv 1411.5279).
    """
    student = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2))
    return 100.0 * NormalDist().cdf(-student * sqrt(count / (count - 1)))
