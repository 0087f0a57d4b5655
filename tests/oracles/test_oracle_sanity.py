"""The ridge, affine and bootstrap oracles against exact small cases and known truths."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.oracles import intervals, least_squares
from tests.oracles.intervals import Interval


def exact_ridge(X: Any, Y: Any, r: float, alive: list[int]) -> Any:
    """(X'X + lam I)^-1 X'Y on the live columns in rational arithmetic, lam over all columns."""
    rows = [[Fraction(float(x)) for x in row] for row in X]
    targets = [[Fraction(float(y)) for y in row] for row in Y]
    p, q = len(rows[0]), len(targets[0])
    zero = Fraction(0)
    lam = Fraction(r) * sum((x * x for row in rows for x in row), zero) / p
    table: list[list[Fraction]] = []
    for a in alive:
        gram = [sum((row[a] * row[b] for row in rows), lam if a == b else zero) for b in alive]
        cross = [sum((row[a] * target[k] for row, target in zip(rows, targets, strict=True)), zero) for k in range(q)]
        table.append(gram + cross)
    for k in range(len(alive)):
        table[k] = [x / table[k][k] for x in table[k]]
        for j in range(len(alive)):
            if j != k:
                table[j] = [x - table[j][k] * y for x, y in zip(table[j], table[k], strict=True)]
    A = np.zeros((p, q))
    A[alive] = [[float(x) for x in row[len(alive) :]] for row in table]
    return A


def design(kind: str) -> tuple[Any, list[int]]:
    rng = np.random.default_rng(4)
    X = rng.normal(size=(4, 7) if kind == "wide" else (12, 5))
    alive = list(range(X.shape[1]))
    if kind == "ill-conditioned":
        X[:, 3] = X[:, 1] + 1e-7 * X[:, 3]
        X[:, 4] *= 1e-5
    if kind == "dead columns":
        X[:, 1] = 0.0
        X[:, 3] *= 1e-8
        alive = [0, 2, 4]
    return X, alive


@pytest.mark.parametrize("r", least_squares.GRID)
@pytest.mark.parametrize("kind", ["tall", "wide", "ill-conditioned", "dead columns"])
def test_ridge_is_the_closed_form(kind: str, r: float) -> None:
    """ridge agrees with the normal equations solved in rational arithmetic; dead columns get zero rows."""
    X, alive = design(kind)
    Y = np.random.default_rng(5).normal(size=(len(X), 2))
    expected = exact_ridge(X, Y, r, alive)
    np.testing.assert_allclose(least_squares.ridge(X, Y, r), expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_ridge_of_nothing_is_zero() -> None:
    """A design matrix of zeros gives A = 0, not an error."""
    assert not least_squares.ridge(np.zeros((5, 3)), np.ones((5, 2)), 1e-8).any()


def test_affine_recovers_an_affine_map() -> None:
    """When the target is an affine map of the input, the affine reference reproduces it on unseen tokens."""
    rng = np.random.default_rng(6)
    B, c = rng.normal(size=(5, 5)), rng.normal(size=5)
    fit, select, unseen = (rng.normal(size=(n, 7, 5)) for n in (9, 3, 4))
    A, r = least_squares.affine(fit, fit @ B + c, select, select @ B + c)
    np.testing.assert_allclose(least_squares.apply_affine(unseen, A), unseen @ B + c, atol=1e-6)
    assert r == 1e-8


def test_affine_takes_the_larger_r_of_equals() -> None:
    """A target equal to the input is met by every r alike; the largest wins."""
    H = np.random.default_rng(7).normal(size=(4, 6, 3))
    A, r = least_squares.affine(H, H, H, H)
    assert r == 1e-2
    assert not A.any()


def test_affine_is_picked_on_select() -> None:
    """With noise that only a weak ridge can fit, the error on select picks a strong one."""
    rng = np.random.default_rng(8)
    H_fit, H_sel = rng.normal(size=(1, 20, 8)), rng.normal(size=(1, 200, 8))
    H_fit[..., 4:] *= 0.01
    H_sel[..., 4:] *= 0.01
    _, r = least_squares.affine(H_fit, H_fit + rng.normal(size=H_fit.shape), H_sel, H_sel)
    assert r == 1e-2


def test_interval_covers_the_mean_about_95_times_in_100() -> None:
    """Over 600 samples of 80 numbers of known distributions the interval holds the true mean 92 to 97 times in 100."""
    rng = np.random.default_rng(11)
    for drawn in (rng.normal(0.3, 2.0, size=(600, 80)), rng.uniform(-0.7, 1.3, size=(600, 80))):
        samples = [intervals.paired(sample) for sample in drawn]
        covered = np.mean([sample.low <= 0.3 <= sample.high for sample in samples])
        assert 0.92 <= covered <= 0.97


def test_interval_covers_the_mean_of_small_samples() -> None:
    """Over 5000 samples of 8 normal numbers it holds the true mean 93 to 97 times in 100; plain percentiles do not."""
    expanded, plain = 0, 0
    for sample in np.random.default_rng(17).normal(0.3, 2.0, size=(5000, 8)):
        interval = intervals.paired(sample)
        low, high = np.quantile(intervals.resampled_means(sample), [0.025, 0.975])
        expanded += interval.low <= 0.3 <= interval.high
        plain += low <= 0.3 <= high
    assert 0.93 * 5000 <= expanded <= 0.97 * 5000
    assert plain < 0.90 * 5000


def test_interval_widens_as_samples_shrink() -> None:
    """The lower quantile is 2.5 % for very many numbers, less for fewer, and 0.57 % for 8."""
    quantiles = [intervals.lower_quantile(count) for count in (2, 3, 8, 32, 1000, 10**7)]
    assert quantiles == sorted(quantiles)
    assert quantiles[2] == pytest.approx(0.0057, abs=5e-5)
    assert quantiles[-2] == pytest.approx(0.025, rel=0.01)
    assert quantiles[-1] == pytest.approx(0.025, rel=1e-6)


def test_interval_ends_are_quantiles_of_resampled_means() -> None:
    """As many resampled means lie outside the interval on either side as its quantile says, to one."""
    sample = np.random.default_rng(18).normal(size=16)
    interval, means = intervals.paired(sample), intervals.resampled_means(sample)
    for outside in ((means < interval.low).sum(), (means > interval.high).sum()):
        assert abs(outside - 1000 * intervals.lower_quantile(16)) <= 1


def test_interval_draws_are_fixed() -> None:
    """The resamples are the rows of integers(0, n, (1000, n)) of numpy's generator seeded with 0."""
    sample = np.random.default_rng(19).normal(size=9)
    drawn = np.random.default_rng(0).integers(0, 9, size=(1000, 9))
    np.testing.assert_allclose(intervals.resampled_means(sample), [sample[row].sum() / 9 for row in drawn], atol=1e-15)


def test_interval_of_one_number_has_no_width() -> None:
    """A single sequence says nothing of its spread: both ends are its value."""
    assert intervals.paired(np.array([0.3])) == Interval(0.3, 0.3, 0.3)


def test_interval_of_a_constant_has_no_width() -> None:
    """Equal differences leave nothing to resample."""
    for count in (2, 7, 100):
        interval = intervals.paired(np.full(count, 0.1))
        assert interval.low == interval.value == interval.high == pytest.approx(0.1)


def test_interval_is_the_same_every_time() -> None:
    """The seed is fixed: the same losses give the same interval."""
    losses = np.random.default_rng(12).normal(size=40)
    assert intervals.paired(losses) == intervals.paired(losses)
