"""Paired bootstrap intervals over sequences (method.md 1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peel_agent.records import Estimate

RESAMPLES = 1000
SEED = 0


def estimate(per_sequence: NDArray[np.float64]) -> Estimate:
    """Mean of one number a sequence [N] with its 95 % percentile bootstrap interval.

    Give the *differences* of two losses for a paired comparison. The resamples are the same at every call with the
    same N, so two estimates over the same sequences are comparable.
    """
    count = len(per_sequence)
    draws = np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, count))
    low, high = np.percentile(per_sequence[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(per_sequence.mean()), float(low), float(high))
