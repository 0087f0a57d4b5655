"""Products of float32 matrices on a GPU's tensor cores, to float32's own precision.

Tensor cores multiply numbers of 11 significant bits (TF32) about eight times as fast as a GPU multiplies float32. A
float32 number is the sum of two of them, up to 2^-22 of it, so a product is a sum of three of their products:
high * high + low * high + high * low. Weights that are stored in 16 bits are such numbers as they are, and two products
are enough. What is left out is less than what sums in another order differ by (method.md 2).

Tensor cores cut off what does not fit into a sum: over 4,096 terms an H200 lost 1e-5 of it, where float32 is 8e-7 off.
So they add up SUMMED_AT_ONCE terms at most, and the sums go on in float32 as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

LOW_BITS = 13
"""The bits of a float32's 24 that TF32 does not keep."""

LEAST_WORK = 2**28
"""Multiplications below which a product is not worth the splitting."""

SUMMED_AT_ONCE = 256
"""Terms of a sum that tensor cores add up."""

Product = Callable[[Tensor, Tensor, Tensor], object]
"""Adds to the first, [n, m], the second, [n, k], times the third, [k, m]."""


def float32_products(device: torch.device) -> AbstractContextManager[object]:
    """While open, float32 matrix products of this thread on the device are made on its tensor cores, if it has them."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return nullcontext()
    return SplitProducts(device.type, Tensor.addmm_, LEAST_WORK)


@contextmanager
def coarse_products(device: torch.device) -> Iterator[None]:
    """While open, a GPU rounds the factors of float32 products to TF32, in every thread of the process.

    For fits: whatever they find is measured elsewhere, in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class SplitProducts(TorchFunctionMode):
    """Makes every product of float32 matrices on devices of this type from `product`s of their TF32 halves.

    Of those of `least_work` multiplications or more, and only where no gradient is recorded.
    """

    def __init__(self, device_type: str, product: Product, least_work: int) -> None:
        super().__init__()
        self._device_type = device_type
        self._product = product
        self._least_work = least_work
        self._fits: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and len(args) > 1:
            return self._linear(*args, **(kwargs or {}))
        if func in _MATMULS and not kwargs and self._is_ours(*args):
            return self._multiplied(*args, fits=False)
        if func in _ADDMMS and not kwargs and self._is_ours(*args[1:]):
            return args[0] + self._multiplied(args[1], args[2], fits=self._fits_tf32(args[2]))
        return func(*args, **(kwargs or {}))

    def _linear(self, left: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._is_ours(left, weight.T):
            return functional.linear(left, weight, bias)
        product = self._multiplied(left, weight.T, fits=self._fits_tf32(weight))
        return product if bias is None else product + bias

    def _is_ours(self, left: object, right: object) -> bool:
        """Whether these are matrices to be multiplied here: [..., k] and [k, m]."""
        if not (isinstance(left, Tensor) and isinstance(right, Tensor) and left.ndim >= 2 and right.ndim == 2):
            return False
        if left.dtype != torch.float32 or right.dtype != torch.float32 or left.device.type != self._device_type:
            return False
        if left.shape[-1] != len(right) or left.numel() * right.shape[1] < self._least_work:
            return False
        return not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))

    def _multiplied(self, left: Tensor, right: Tensor, *, fits: bool) -> Tensor:
        rows = left.flatten(0, -2)
        high, low = halves(rows)
        right_high, right_low = (right, None) if fits else halves(right)
        total = rows.new_zeros(len(rows), right.shape[1])
        with coarse_products(total.device):
            for start in range(0, len(right), SUMMED_AT_ONCE):
                terms = slice(start, start + SUMMED_AT_ONCE)
                self._product(total, high[:, terms], right_high[terms])
                self._product(total, low[:, terms], right_high[terms])
                if right_low is not None:
                    self._product(total, high[:, terms], right_low[terms])
        return total.view(*left.shape[:-1], right.shape[1])

    def _fits_tf32(self, weight: Tensor) -> bool:
        """Whether a weight is TF32 as it is; it is looked at once, for a GPU has to be waited for."""
        whole = weight if weight._base is None else weight._base  # of a transposed one, the one that stays
        fits = self._fits.get(whole)
        if fits is None:
            fits = self._fits[whole] = not bool((whole.view(torch.int32) & (2**LOW_BITS - 1)).any())
        return bool(fits)


_MATMULS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm})
_ADDMMS = frozenset({torch.addmm, Tensor.addmm})


def halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest TF32 numbers to a float32 matrix, and what they leave over."""
    bits = matrix.contiguous().view(torch.int32) + 2 ** (LOW_BITS - 1)
    high = bits.bitwise_and_(-(2**LOW_BITS)).view(torch.float32)
    return high, matrix - high
