"""Weight sets: quantisers, rounding in the Gram metric, latents, and telling a set from values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peel_agent.precision import Quantisers, latents_of, quantise, recognise, round_in_gram, straight_through
from peel_agent.records import FULL_PRECISION, WeightSet
from tests.oracles import weight_sets as oracle

NAMES = (
    *("sign", "sign-matrix", "ternary", "ternary-channel", "int2-channel", "int3-g16", "int4-channel", "int4-g32"),
    *("int4-g16-affine", "int8-channel", "int8-matrix", "int4-channel-affine", "fp8-e4m3", "fp8-e5m2"),
)


def case(seed: int, rows: int = 12, columns: int = 64) -> tuple[Any, Any]:
    """A matrix of latents, and the Gram of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, columns)) @ (rng.normal(size=(columns, columns)) / 8 + np.eye(columns))
    return rng.normal(size=(rows, columns)) * rng.uniform(0.2, 2, size=(rows, 1)), x.T @ x


@pytest.mark.parametrize("name", NAMES)
def test_quantise(name: str) -> None:
    """Effective weights are the oracle's."""
    matrix, _ = case(1)
    matrix[3] = 0.0
    ours = quantise(torch.from_numpy(matrix), WeightSet.named(name))
    np.testing.assert_allclose(ours, oracle.quantise(matrix, name), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_round_in_gram(name: str) -> None:
    """Error-compensated rounding is the oracle's, column by column, scales solved anew included."""
    matrix, gram = case(2)
    ours = round_in_gram(torch.from_numpy(matrix), torch.from_numpy(gram), WeightSet.named(name)).numpy()
    theirs = oracle.round_in_gram(matrix, gram, name)
    np.testing.assert_allclose(ours, theirs, atol=1e-8)
    assert oracle.residual(matrix, ours, gram) < oracle.residual(matrix, oracle.quantise(matrix, name), gram)


def test_more_columns_than_a_block() -> None:
    """Bringing the rest up to date once in 128 columns is the same as after each."""
    matrix, gram = case(3, rows=3, columns=300)
    ours = round_in_gram(torch.from_numpy(matrix), torch.from_numpy(gram), WeightSet.named("int4-channel")).numpy()
    np.testing.assert_allclose(ours, oracle.round_in_gram(matrix, gram, "int4-channel"), atol=1e-8)


def test_inputs_that_never_fire() -> None:
    """Dead inputs, even all of them, leave a finite result within the set."""
    matrix, gram = case(4)
    for dead in (gram * 0, np.where((np.arange(64) < 5)[:, None] | (np.arange(64) < 5)[None, :], 0.0, gram)):
        rounded = round_in_gram(torch.from_numpy(matrix), torch.from_numpy(dead), WeightSet.named("ternary"))
        assert rounded.isfinite().all()
        assert recognise(rounded).name == "ternary"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("int")])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_rounded_weights_can_be_stored(name: str, seed: int) -> None:
    """The quantiser gives back what rounding chose when it is fed the latents that are stored for it.

    Not promised of integer sets, whose quantiser takes its scale from the largest entry: rounding may have moved that.
    """
    matrix, gram = case(seed, rows=4)
    weight_set = WeightSet.named(name)
    rounded = round_in_gram(torch.from_numpy(matrix), torch.from_numpy(gram), weight_set)
    np.testing.assert_allclose(quantise(latents_of(rounded, weight_set), weight_set), rounded, atol=1e-9)


@pytest.mark.parametrize("name", ["sign", "sign-matrix", "ternary", "ternary-channel", "int3-channel", "int4-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recognise(name: str, dtype: torch.dtype) -> None:
    """Effective weights of few levels are recognised in the precisions in which they are stored."""
    matrix, _ = case(5, rows=32, columns=256)
    stored = quantise(torch.from_numpy(matrix).float(), WeightSet.named(name)).to(dtype)
    assert recognise(stored).name == name


def test_free_weights_are_in_no_set() -> None:
    """Trained, constant or empty matrices of full precision are not mistaken for low-bit ones."""
    matrix, _ = case(6, rows=32, columns=256)
    assert recognise(torch.from_numpy(matrix).bfloat16()) == FULL_PRECISION
    assert recognise(torch.zeros(8, 8)) == FULL_PRECISION
    assert recognise(torch.from_numpy(matrix).to(torch.float8_e4m3fn)) == FULL_PRECISION


@pytest.mark.parametrize(
    "name", ["binary", "int4", "int9-channel", "int1-channel", "int4-g0", "sign-g16", "", "none-x"]
)
def test_unknown_names(name: str) -> None:
    """A name that no set has is refused."""
    with pytest.raises(ValueError, match=f"^{name}$"):
        WeightSet.named(name)


def test_groups_must_divide() -> None:
    """A group size that leaves a rest is refused by numbers."""
    with pytest.raises(ValueError, match="groups of 48 do not divide a width of 64"):
        quantise(torch.zeros(2, 64), WeightSet.named("int4-g48"))


def test_straight_through() -> None:
    """Forward is the quantiser, backward the identity."""
    latents = torch.randn(4, 8, requires_grad=True)
    effective = straight_through(latents, WeightSet.named("ternary"))
    assert torch.allclose(effective, quantise(latents.detach(), WeightSet.named("ternary")))
    effective.sum().backward()
    assert torch.equal(latents.grad, torch.ones(4, 8))


def test_globs_name_latents_and_the_first_wins() -> None:
    """A named set stands before what values say; vectors are in none; transposed matrices are turned."""
    quantisers = Quantisers(
        {"h.0.*": WeightSet.named("sign"), "h.*": WeightSet.named("ternary-channel")}, transposed=True
    )
    matrix = torch.randn(16, 8)
    assert quantisers.of("h.0.weight", matrix).name == "sign"
    assert quantisers.of("h.1.weight", matrix).name == "ternary-channel"
    assert quantisers.of("h.1.bias", torch.ones(4)) == FULL_PRECISION
    assert quantisers.of("other", matrix) == quantisers.of("other", matrix) == FULL_PRECISION
    effective = quantisers.effective(matrix, WeightSet.named("sign"))
    assert len(effective[:, 0].abs().unique()) == 1  # an output channel is a column here
