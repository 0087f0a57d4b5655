"""The interval of a mean over sequences: the oracle's, resample for resample, and as wide as it says."""

from __future__ import annotations

import numpy as np
import pytest

from peel_agent.peel.numerics.intervals import estimate
from peel_agent.records import Estimate
from tests.oracles import intervals as oracle


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_it_is_the_oracles(draw: str) -> None:
    """Value and both ends agree to 1e-12 for every number of sequences from 2 to 200."""
    for count in range(2, 201):
        values = getattr(np.random.default_rng(count), draw)(size=count)
        ours, theirs = estimate(values), oracle.paired(values)
        np.testing.assert_allclose([ours.value, ours.low, ours.high], theirs, rtol=0, atol=1e-12, err_msg=str(count))
        assert ours.low < ours.value < ours.high


def test_one_sequence_has_no_width() -> None:
    """From one number nothing is known of the spread: the interval is that number."""
    assert estimate(np.array([0.25])) == Estimate(0.25, 0.25, 0.25)


@pytest.mark.parametrize("count", [8, 16])
def test_it_covers_as_often_as_it_says(count: int) -> None:
    """Of 3000 samples of so few normal numbers the 95 % interval covers the mean in 92.5 to 97 %."""
    samples = np.random.default_rng(7).normal(loc=1.0, size=(3000, count))
    intervals = [estimate(sample) for sample in samples]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.925 <= covered <= 0.97
