"""float32 products made of TF32 halves (peel_agent/precision/products.py): on the CPU with TF32 imitated, on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from peel_agent.precision import products
from peel_agent.precision.products import (
    LEAST_WORK,
    LOW_BITS,
    SplitProducts,
    coarse_products,
    float32_products,
    halves,
)

INNER, LONG = 512, 4096
STEP = 8
"""Terms that a tensor core adds to a sum at once: with so many the imitation is 1.2e-5 off over LONG terms, where an
H200 was 0.96e-5 off.
"""
FLOAT32 = 1e-6
"""By how much a sum of thousands of terms may be off in float32: an H200's own is 8e-7 off."""


def rounded(matrix: Tensor) -> Tensor:
    """Cut off to the bits that TF32 keeps, as a tensor core reads a float32: an oracle by numpy."""
    bits = matrix.contiguous().numpy().view(np.uint32)
    return torch.from_numpy((bits >> LOW_BITS << LOW_BITS).view(np.float32).copy())


def imitated(total: Tensor, left: Tensor, right: Tensor) -> None:
    """What tensor cores do: the factors are rounded, and of a sum that is added to what does not fit is cut off."""
    left, right = rounded(left).double(), rounded(right).double()
    summed = torch.zeros(total.shape)
    for start in range(0, len(right), STEP):
        terms = slice(start, start + STEP)
        summed = cut_off(summed.double() + left[:, terms] @ right[terms])
    total += summed


def cut_off(exact: Tensor) -> Tensor:
    """The nearest float32 toward zero."""
    nearest = exact.float()
    toward_zero = torch.nextafter(nearest, torch.zeros(()))
    return torch.where(nearest.double().abs() > exact.abs(), toward_zero, nearest)


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, W, B = matrix(3, 40, INNER), matrix(INNER, 24, seed=1), matrix(24, seed=2)
FLAT = X.flatten(0, 1)
CALLS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], bool]] = {
    "a linear layer": (lambda x, w, b: functional.linear(x, w.T, b), True),
    "without bias": (lambda x, w, _: functional.linear(x, w.T), True),
    "bias by name": (lambda x, w, b: functional.linear(x, w.T, bias=b), True),
    "of one sequence": (lambda x, w, _: functional.linear(x[0], w.T), True),
    "a layer of GPT-2": (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), True),
    "@": (lambda x, w, _: x @ w, True),
    "matmul": (lambda x, w, _: torch.matmul(x, w), True),
    "a method": (lambda x, w, _: x.matmul(w), True),
    "mm": (lambda x, w, _: torch.mm(x[0], w), True),
    "a Gram matrix": (lambda x, _, __: x.flatten(0, 1).T @ x.flatten(0, 1), True),
    "of a part of its columns": (lambda x, w, _: x[..., ::2] @ w[::2], True),
    "matrices in a batch": (lambda x, _, __: x @ x.mT, False),
    "a vector": (lambda x, w, _: x @ w[:, 0], False),
}


def error(product: Tensor, truth: Tensor) -> float:
    return float((product.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_float32_s(call: str, stored: torch.dtype) -> None:
    """As near to the truth as float32, where TF32 is a hundred times as far off."""
    compute, is_split = CALLS[call]
    weight = W.to(stored).float()
    truth = compute(X.double(), weight.double(), B.double())
    plain = compute(X, weight, B)
    calls: list[None] = []

    def product(total: Tensor, left: Tensor, right: Tensor) -> None:
        calls.append(None)
        imitated(total, left, right)

    with SplitProducts("cpu", product, least_work=0):
        split = compute(X, weight, B)
    assert bool(calls) == is_split
    assert split.shape == plain.shape
    assert error(split, truth) <= FLOAT32
    if is_split:
        coarse = compute(rounded(X), rounded(weight), B)
        assert error(coarse, truth) > 100 * error(split, truth)


def test_long_sums_are_float32_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed on the tensor cores from end to end they would be ten times as far off, and all in one direction."""
    left, right = matrix(8, LONG), matrix(LONG, 8, seed=1)
    truth = left.double() @ right.double()
    with SplitProducts("cpu", imitated, least_work=0):
        split = left @ right
        monkeypatch.setattr(products, "SUMMED_AT_ONCE", LONG)
        whole = left @ right
    assert error(split, truth) <= FLOAT32
    assert error(whole, truth) > 10 * FLOAT32


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(W, 3), (W.bfloat16().float(), 2), (W.half().float(), 2), (W.T.contiguous().bfloat16().float().T, 2)],
)
def test_weights_of_16_bits_take_two_products(weight: Tensor, expected: int) -> None:
    """They are TF32 as they are; each is looked at once."""
    calls: list[None] = []

    def product(total: Tensor, left: Tensor, right: Tensor) -> None:
        calls.append(None)
        imitated(total, left, right)

    with SplitProducts("cpu", product, least_work=0) as mode:
        for times in (1, 2):
            functional.linear(X, weight.T)
            assert len(calls) == times * expected * INNER // products.SUMMED_AT_ONCE
        assert len(mode._fits) == 1


@pytest.mark.parametrize(
    "left", [X.double(), X.bfloat16(), X.clone().requires_grad_()], ids=["float64", "bfloat16", "with a gradient"]
)
def test_what_is_left_alone(left: Tensor) -> None:
    """Other dtypes and what gradients are recorded of; products too small to be worth it; another device."""
    weight = W.to(left.dtype)

    def refuse(_total: Tensor, _left: Tensor, _right: Tensor) -> None:
        raise AssertionError

    expected = left @ weight
    with SplitProducts("cpu", refuse, least_work=0):
        assert torch.equal(left @ weight, expected)
    with SplitProducts("cpu", refuse, least_work=X.numel() * W.shape[1] + 1):
        assert X[0].matmul(W).shape == (40, 24)
    with SplitProducts("cuda", refuse, least_work=0):
        assert X[0].matmul(W).shape == (40, 24)


def test_halves_add_up() -> None:
    """The high half has TF32's bits, the low one less than half a step of them; zero, signs and ends are kept."""
    ends = torch.tensor([[0.0, -0.0, 1.0, -1.0, 3e38, 1e-38, 1.0 + 2**-11, -1.0 - 3 * 2**-12]])
    for values in (X[0], ends):
        high, low = halves(values)
        assert torch.equal(high + low, values)
        assert torch.equal(rounded(high), high)
        assert bool((low.abs() <= high.abs() * 2**-11).all())


def test_the_cpu_is_left_as_it_is() -> None:
    """There is nothing to be gained."""
    with float32_products(torch.device("cpu")) as nothing, coarse_products(torch.device("cpu")):
        assert nothing is None
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_rounds_while_something_is_fitted() -> None:
    """And no longer, whatever ends it."""
    torch.set_float32_matmul_precision("highest")
    seen = []

    def interrupted() -> None:
        with coarse_products(torch.device("cuda")):
            seen.append(torch.get_float32_matmul_precision())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_products_of_a_gpu(stored: torch.dtype) -> None:
    """On real tensor cores: as near to the truth as the GPU's own float32, where TF32 is not; and TF32 is off after."""
    left, right = matrix(2048, 4096).cuda(), matrix(4096, 1024, seed=1).to(stored).float().cuda()
    assert left.numel() * right.shape[1] >= LEAST_WORK
    truth = left.double() @ right.double()
    torch.set_float32_matmul_precision("highest")
    plain = left @ right
    with float32_products(left.device):
        split = functional.linear(left, right.T)
        gram = left.T @ left
    assert error(split, truth) <= 4 * error(plain, truth)
    assert error(gram, left.double().T @ left.double()) <= 4 * error(left.T @ left, left.double().T @ left.double())
    with coarse_products(left.device):
        assert error(left @ right, truth) > 20 * error(split, truth)
    assert torch.equal(left @ right, plain)
