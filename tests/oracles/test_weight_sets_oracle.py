"""The weight-set oracle against exact small cases, torch's own fp8 and the optimality conditions of its rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.oracles import weight_sets
from tests.oracles.weight_sets import codes_in_gram, damped, parse, quantise, residual, round_in_gram

SIGNS = ["sign", "sign-matrix"]
TERNARY = ["ternary", "ternary-channel"]
INTS = [
    f"int{bits}-{unit}{kind}" for bits in (3, 4, 8) for unit in ("channel", "matrix", "g4") for kind in ("", "-affine")
]
FP8 = ["fp8-e4m3", "fp8-e5m2"]
EVERY = SIGNS + TERNARY + INTS + FP8


def problem(seed: int, rows: int = 6, width: int = 12, inputs: int = 60) -> tuple[Any, Any]:
    """Weights [rows, width] and the Gram matrix of strongly correlated inputs."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(inputs, width)) @ (rng.normal(size=(width, width)) * rng.uniform(0.1, 2.0, size=width))
    return rng.normal(size=(rows, width)), X.T @ X


# ---------------------------------------------------------------- quantise


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sign", [[1.5, -1.5, 1.5, -1.5], [0.5, 0.5, 0.5, -0.5]]),
        ("sign-matrix", [[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, -1.0]]),
        ("ternary", [[1.0, -1.0, 0.0, -1.0], [1.0, 0.0, 0.0, -1.0]]),
        ("ternary-channel", [[1.5, -1.5, 0.0, -1.5], [0.5, 0.0, 0.0, -0.5]]),
        ("int3-channel", [[3.0, -2.0, 0.0, -1.0], [1.0, 0.0, 1 / 3, -2 / 3]]),
        ("int3-matrix", [[3.0, -2.0, 0.0, -1.0], [1.0, 0.0, 0.0, -1.0]]),
        ("int2-g2", [[3.0, -3.0, 0.0, -1.0], [1.0, 0.0, 0.0, -0.75]]),
        ("int2-channel-affine", [[10 / 3, -5 / 3, 0.0, -5 / 3], [7 / 6, 0.0, 0.0, -7 / 12]]),
        ("int2-matrix-affine", [[10 / 3, -5 / 3, 0.0, -5 / 3], [5 / 3, 0.0, 0.0, 0.0]]),
    ],
)
def test_quantise_is_what_the_definition_gives(name: str, expected: Any) -> None:
    """Two rows worked out by hand, with zeros, a tie and weights outside of the grid."""
    M = np.array([[3.0, -2.0, 0.0, -1.0], [1.0, 0.0, 0.25, -0.75]])
    np.testing.assert_allclose(quantise(M, name), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", SIGNS + INTS + FP8)
def test_quantise_keeps_what_is_in_the_set(name: str) -> None:
    """Sign, int and fp8 sets are idempotent; ternary is not, because its scale is a mean over the zeros as well."""
    for seed in range(5):
        once = quantise(problem(seed)[0], name)
        np.testing.assert_allclose(quantise(once, name), once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_keeps_its_codes(name: str) -> None:
    """A second ternary rounding keeps every sign and zero and only shrinks the scale."""
    once = quantise(problem(0)[0], name)
    twice = quantise(once, name)
    np.testing.assert_array_equal(np.sign(twice), np.sign(once))
    assert np.abs(twice).max() < np.abs(once).max()


@pytest.mark.parametrize("name", EVERY)
def test_quantise_scales_with_its_argument(name: str) -> None:
    """Twice the weights give exactly twice the result: no set has a fixed grid."""
    M, _ = problem(1)
    np.testing.assert_array_equal(quantise(2 * M, name), 2 * quantise(M, name))


@pytest.mark.parametrize("name", EVERY)
def test_zeros_stay_zero(name: str) -> None:
    """A matrix of zeros gives zeros in every set, and so does a unit of zeros among others, compensated or not."""
    M, H = problem(2)
    assert not quantise(np.zeros_like(M), name).any()
    assert not round_in_gram(np.zeros_like(M), H, name).any()
    if parse(name).unit == "channel":
        M[2] = 0.0
        assert not quantise(M, name)[2].any()
        assert not round_in_gram(M, H, name)[2].any()


@pytest.mark.parametrize("name", INTS)
def test_int_error_is_at_most_half_a_step(name: str) -> None:
    """No weight moves by more than half of its scale (a whole scale where a rounded zero point shifts the grid)."""
    M, _ = problem(3)
    scale = weight_sets.grid_of(M, parse(name)).scale
    bound = 1.0 if name.endswith("-affine") else 0.5
    assert (np.abs(quantise(M, name) - M) <= bound * scale * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_fp8_rounding_is_torchs(kind: str, dtype: Any) -> None:
    """Rounding agrees with torch's cast on normals, subnormals and every midpoint, whose even neighbour wins."""
    values = weight_sets.positive_values(kind)
    assert values[-1] == torch.finfo(dtype).max
    rng = np.random.default_rng(4)
    drawn = np.exp(rng.uniform(np.log(values[1] / 4), np.log(values[-1]), size=4000)).astype(np.float32)
    x = np.concatenate([drawn, values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    x = np.concatenate([x, -x])
    expected = torch.from_numpy(x).to(dtype).to(torch.float64).numpy()
    np.testing.assert_array_equal(weight_sets.round_to_format(x.astype(np.float64), kind), expected)


@pytest.mark.parametrize("name", ["int1-channel", "int4", "int4-g0", "int4-g", "fp8", "int4-channel-affine-x", ""])
def test_an_unknown_set_is_refused(name: str) -> None:
    """A name that is none of the sets, or a set without a grid, is an error."""
    with pytest.raises(ValueError, match="no weight set"):
        quantise(np.ones((2, 4)), name)


def test_groups_must_divide_the_inputs() -> None:
    """A group length that does not divide the inputs is an error."""
    with pytest.raises(ValueError, match="groups of 5"):
        quantise(np.ones((2, 12)), "int4-g5")


# ---------------------------------------------------------------- round_in_gram


@pytest.mark.parametrize("name", EVERY)
def test_identity_gram_is_plain_rounding_before_the_scales(name: str) -> None:
    """Uncorrelated inputs pass no error on: the codes are those of quantise."""
    M, _ = problem(5)
    codes, scale = codes_in_gram(M, 3.0 * np.eye(M.shape[1]), name)
    np.testing.assert_array_equal(scale * codes, quantise(M, name))


def test_damping_is_a_hundredth_of_the_mean_diagonal() -> None:
    """The diagonal grows by 0.01 of its own mean, and nothing else changes."""
    np.testing.assert_allclose(damped(np.array([[1.0, 0.5], [0.5, 3.0]])), [[1.02, 0.5], [0.5, 3.02]])


@pytest.mark.parametrize("name", EVERY)
def test_each_code_rounds_the_best_answer_to_the_earlier_ones(name: str) -> None:
    """Column i is rounded from the weights that, with the columns before it fixed, have the least error in the metric.

    Those weights are solved for directly, without a Cholesky factor.
    """
    M, H = problem(6)
    form, Hd = parse(name), damped(H)
    codes, scale = codes_in_gram(M, H, name)
    zero = weight_sets.grid_of(M, form).zero
    for i in range(M.shape[1]):
        done = scale[:, :i] * codes[:, :i] - M[:, :i]
        wanted = M[:, i:] - np.linalg.solve(Hd[i:, i:], Hd[i:, :i] @ done.T).T
        expected = weight_sets.codes_of(wanted[:, 0], scale[:, i], zero[:, i], form)
        np.testing.assert_array_equal(codes[:, i], expected)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in FP8])
def test_fitted_scales_are_the_least_squares_ones(name: str) -> None:
    """No other positive scale, of one row, one group or the matrix, has less error with the same codes."""
    M, H = problem(7)
    form, Hd = parse(name), damped(H)
    codes, scale = codes_in_gram(M, H, name)
    fitted = weight_sets.fitted_scales(M, Hd, codes, scale, form)
    assert residual(M, fitted * codes, Hd) <= residual(M, scale * codes, Hd) * (1 + 1e-12)
    width = {"matrix": M.shape[1], "channel": M.shape[1], "group": form.group}[form.unit]
    rows = M.shape[0] if form.unit == "matrix" else 1
    for row in range(0, M.shape[0], rows):
        if (fitted[row] == scale[row]).all():
            continue  # the best scales of this row were not all positive
        for start in range(0, M.shape[1], width):
            for factor in (0.99, 1.01):
                other = fitted.copy()
                other[row : row + rows, start : start + width] *= factor
                assert residual(M, fitted * codes, Hd) < residual(M, other * codes, Hd)


@pytest.mark.parametrize("name", EVERY)
def test_compensation_helps_on_average(name: str) -> None:
    """On correlated inputs the error of the outputs is below plain rounding's over 20 draws."""
    plain, compensated = [], []
    for seed in range(100, 120):
        M, H = problem(seed)
        plain.append(residual(M, quantise(M, name), H))
        compensated.append(residual(M, round_in_gram(M, H, name), H))
    assert np.mean(compensated) < np.mean(plain)


@pytest.mark.parametrize("name", INTS)
def test_an_int_result_has_few_values(name: str) -> None:
    """Every weight of the result is one of its codes times its own scale."""
    M, H = problem(8)
    codes, _ = weight_sets.codes_in_gram(M, H, name)
    R = round_in_gram(M, H, name)
    live = codes != 0
    assert np.allclose(R[~live], 0)
    for row, row_codes, kept in zip(R, codes, live, strict=True):
        assert len(np.unique(np.round(row[kept] / row_codes[kept], 9))) <= max(1, M.shape[1] // 4)


@pytest.mark.parametrize("name", FP8)
def test_fp8_keeps_its_scale(name: str) -> None:
    """Every weight of the result is a value of the format times the scale of the wanted weights."""
    M, H = problem(9)
    form = parse(name)
    ratio = round_in_gram(M, H, name) / weight_sets.grid_of(M, form).scale
    np.testing.assert_allclose(ratio, weight_sets.round_to_format(ratio, form.kind), rtol=1e-12)


def test_finer_ints_come_closer() -> None:
    """With 16 bits the wanted weights come back to four digits, and every bit given up costs error."""
    M, H = problem(10)
    errors = [residual(M, round_in_gram(M, H, f"int{bits}-channel"), H) for bits in (16, 8, 4, 3)]
    assert errors == sorted(errors)
    np.testing.assert_allclose(round_in_gram(M, H, "int16-channel"), M, atol=1e-3)


def test_dead_inputs_do_no_harm() -> None:
    """Damping keeps the result finite where inputs are always 0, and where all are the result is quantise's."""
    M, H = problem(11)
    H[3], H[:, 3] = 0.0, 0.0
    assert np.isfinite(round_in_gram(M, H, "int4-g4")).all()
    np.testing.assert_array_equal(round_in_gram(M, np.zeros_like(H), "sign"), quantise(M, "sign"))


def test_residual_is_the_error_of_the_outputs() -> None:
    """With H = X'X the residual is ||X (M - R)'||_F^2."""
    rng = np.random.default_rng(12)
    X, M, R = rng.normal(size=(20, 5)), rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    assert residual(M, R, X.T @ X) == pytest.approx(np.linalg.norm(X @ (M - R).T) ** 2)
