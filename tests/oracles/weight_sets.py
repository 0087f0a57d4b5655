"""Weight sets: plain rounding into one, and error-compensated rounding in the metric of the inputs' Gram matrix.

Matrices are [out, in], a row per output channel. Every weight of a set is scale * code; the scale belongs to a unit:
a row, the matrix, or N consecutive inputs of a row. The codes of an affine set have its zero point already taken off.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tests.oracles.decoder import Array

DAMPING = 0.01


class WeightSet(NamedTuple):
    """A name taken apart: `kind` is sign, ternary, int, e4m3 or e5m2, `unit` is channel, matrix or group."""

    kind: str
    unit: str
    bits: int = 0
    group: int = 0
    affine: bool = False


class Grid(NamedTuple):
    """Scale and zero point of every weight, both [out, in]; a scale of 0 belongs to a unit of zeros."""

    scale: Array
    zero: Array


NAMED = {
    "sign": WeightSet("sign", "channel"),
    "sign-matrix": WeightSet("sign", "matrix"),
    "ternary": WeightSet("ternary", "matrix"),
    "ternary-channel": WeightSet("ternary", "channel"),
    "fp8-e4m3": WeightSet("e4m3", "matrix"),
    "fp8-e5m2": WeightSet("e5m2", "matrix"),
}


def parse(name: str) -> WeightSet:
    """The set of that name."""
    if name in NAMED:
        return NAMED[name]
    match = re.fullmatch(r"int(\d+)-(channel|matrix|g([1-9]\d*))(-affine)?", name)
    if match is None or int(match[1]) < 2:
        raise ValueError(f"no weight set is called {name}")
    group = int(match[3] or 0)
    return WeightSet("int", "group" if group else match[2], int(match[1]), group, match[4] is not None)


def positive_values(kind: str) -> Array:
    """The finite values >= 0 of an fp8 format in the order of their bit patterns."""
    mantissa_bits, bias, patterns = {"e4m3": (3, 7, 127), "e5m2": (2, 15, 124)}[kind]
    values = []
    for pattern in range(patterns):
        exponent, fraction = divmod(pattern, 2**mantissa_bits)
        part = fraction / 2**mantissa_bits
        values.append((1.0 + part) * 2.0 ** (exponent - bias) if exponent else part * 2.0 ** (1 - bias))
    return np.array(values)


def round_to_format(x: Array, kind: str) -> Array:
    """The nearest fp8 value to each x; a tie takes the even bit pattern, and beyond the largest lies the largest."""
    values = positive_values(kind)
    size = np.minimum(np.abs(x), values[-1])
    upper = np.searchsorted(values, size)
    lower = np.maximum(upper - 1, 0)
    to_upper, to_lower = values[upper] - size, size - values[lower]
    take_upper = (to_upper < to_lower) | ((to_upper == to_lower) & (upper % 2 == 0))
    nearest: Array = np.copysign(np.where(take_upper, values[upper], values[lower]), x)
    return nearest


def unit_rows(M: Array, form: WeightSet) -> Array:
    """M with one unit to a row."""
    if form.unit == "matrix":
        return M.reshape(1, -1)
    if form.unit == "channel":
        return M
    if M.shape[1] % form.group:
        raise ValueError(f"{M.shape[1]} inputs do not divide into groups of {form.group}")
    return M.reshape(-1, form.group)


def grid_of(M: Array, form: WeightSet) -> Grid:
    """The scales and zero points that M itself asks for."""
    scales, zeros = [], []
    for unit in unit_rows(M, form):
        zero = 0.0
        if form.kind in ("sign", "ternary"):
            scale = np.abs(unit).mean()
        elif form.kind == "int" and form.affine:
            low, high = min(unit.min(), 0.0), max(unit.max(), 0.0)
            scale = (high - low) / (2**form.bits - 1)
            zero = np.round(-low / scale) if scale > 0 else 0.0
        elif form.kind == "int":
            scale = np.abs(unit).max() / (2 ** (form.bits - 1) - 1)
        else:
            scale = np.abs(unit).max() / positive_values(form.kind)[-1]
        scales.append(scale)
        zeros.append(zero)
    shape = unit_rows(M, form).shape
    return Grid(*(np.broadcast_to(np.array(of_unit)[:, None], shape).reshape(M.shape) for of_unit in (scales, zeros)))


def codes_of(w: Array, scale: Array, zero: Array, form: WeightSet) -> Array:
    """The code of the grid point of each weight; w, scale and zero have one shape."""
    ratio = w / np.where(scale > 0, scale, 1.0)
    if form.kind == "sign":
        codes = np.where(w >= 0, 1.0, -1.0)
    elif form.kind == "ternary":
        codes = np.clip(np.round(ratio), -1, 1)
    elif form.kind == "int" and form.affine:
        codes = np.clip(np.round(ratio) + zero, 0, 2**form.bits - 1) - zero
    elif form.kind == "int":
        largest = 2 ** (form.bits - 1) - 1
        codes = np.clip(np.round(ratio), -largest, largest)
    else:
        codes = round_to_format(ratio, form.kind)
    return np.where(scale > 0, codes, 0.0)


def quantise(M: Array, name: str) -> Array:
    """The effective weights of M [out, in] in the set."""
    form = parse(name)
    grid = grid_of(M, form)
    return grid.scale * codes_of(M, grid.scale, grid.zero, form)


def damped(H: Array) -> Array:
    """H + 0.01 mean(diag H) I."""
    ridge = DAMPING * float(np.diag(H).mean())
    return H + ridge * np.eye(len(H))


def codes_in_gram(M: Array, H: Array, name: str) -> tuple[Array, Array]:
    """Codes and scales of M [out, in], column after column, each column's error passed on to the later ones."""
    form = parse(name)
    grid = grid_of(M, form)
    U = np.linalg.cholesky(np.linalg.inv(damped(H))).T
    w, codes = M.copy(), np.zeros_like(M)
    for i in range(M.shape[1]):
        codes[:, i] = codes_of(w[:, i], grid.scale[:, i], grid.zero[:, i], form)
        error = (w[:, i] - grid.scale[:, i] * codes[:, i]) / U[i, i]
        for j in range(i + 1, M.shape[1]):
            w[:, j] -= error * U[i, j]
    return codes, grid.scale


def fitted_scales(M: Array, Hd: Array, codes: Array, scale: Array, form: WeightSet) -> Array:
    """The scales [out, in] with the least error of scale * codes against M in the metric Hd; the codes stay."""
    if form.unit == "matrix":
        numerator = sum(c @ Hd @ m for c, m in zip(codes, M, strict=True))
        denominator = sum(c @ Hd @ c for c in codes)
        fitted = numerator / denominator if denominator > 0 else 0.0
        return np.full_like(scale, fitted) if acceptable(fitted) else scale
    width = form.group or M.shape[1]
    parts = [slice(start, start + width) for start in range(0, M.shape[1], width)]
    result = scale.copy()
    for row, (c, m) in enumerate(zip(codes, M, strict=True)):
        A = np.array([[c[g] @ Hd[g, h] @ c[h] for h in parts] for g in parts])
        b = np.array([c[g] @ (Hd @ m)[g] for g in parts])
        if not np.diag(A).all():
            continue  # a group whose codes are all 0
        fitted = np.linalg.lstsq(A, b, rcond=None)[0]
        if acceptable(fitted):
            result[row] = np.repeat(fitted, width)
    return result


def acceptable(scales: Array | float) -> bool:
    """All finite and above 0."""
    return bool(np.all(np.isfinite(scales)) and np.all(np.asarray(scales) > 0))


def round_in_gram(M: Array, H: Array, name: str) -> Array:
    """The effective weights in the set that stand in for M [out, in] on inputs with the Gram matrix H [in, in]."""
    form = parse(name)
    if not H.any():
        return quantise(M, name)
    codes, scale = codes_in_gram(M, H, name)
    if form.kind not in ("e4m3", "e5m2"):
        scale = fitted_scales(M, damped(H), codes, scale, form)
    return scale * codes


def residual(M: Array, R: Array, H: Array) -> float:
    """Squared error of the outputs when R stands in for M: sum of diag((M - R) H (M - R)')."""
    return float(np.diag((M - R) @ H @ (M - R).T).sum())
