"""Ridge and affine fits, solved on the explicit augmented matrices (method.md 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.oracles.decoder import Array

GRID = (1e-8, 1e-6, 1e-4, 1e-2)
DEAD = 1e-12


def ridge(X: Array, Y: Array, r: float) -> Array:
    """A [p, q] that minimises ||X A - Y||_F^2 + lam ||A||_F^2 with lam = r * mean(diag(X'X)).

    X [n, p], Y [n, q]. Columns of X that carry nothing (diagonal <= 1e-12 of the largest) get zero rows in A.
    """
    diagonal = (X**2).sum(axis=0)
    alive = diagonal > DEAD * diagonal.max()
    lam = r * diagonal.mean()
    A = np.zeros((X.shape[1], Y.shape[1]))
    if alive.any():
        columns = X[:, alive]
        width = columns.shape[1]
        augmented = np.concatenate([columns, np.sqrt(lam) * np.eye(width)])
        target = np.concatenate([Y, np.zeros((width, Y.shape[1]))])
        A[alive] = np.linalg.lstsq(augmented, target, rcond=None)[0]
    return A


def tokens(stream: Array) -> Array:
    """[N, S, d] as one row per token [N*S, d], sequences in order."""
    return stream.reshape(-1, stream.shape[-1])


def with_ones(X: Array) -> Array:
    """[X, 1]."""
    return np.concatenate([X, np.ones((len(X), 1))], axis=1)


def mean_squared_error(estimate: Array, target: Array) -> float:
    """Mean over tokens and features."""
    return float(((estimate - target) ** 2).mean())


def apply_affine(H: Array, A: Array) -> Array:
    """H + [H, 1] A for a stream H [N, S, d] and A [d+1, d]."""
    return H + (with_ones(tokens(H)) @ A).reshape(H.shape)


def affine(H_fit: Array, T_fit: Array, H_sel: Array, T_sel: Array) -> tuple[Array, float]:
    """The affine reference A [d+1, d] and the r of the grid with the least error on select; ties take the larger r.

    All four are streams [N, S, d].
    """
    X = with_ones(tokens(H_fit))
    Y = tokens(T_fit) - tokens(H_fit)
    best_error, best_A, best_r = np.inf, np.zeros((X.shape[1], Y.shape[1])), max(GRID)
    for r in sorted(GRID, reverse=True):
        A = ridge(X, Y, r)
        error = mean_squared_error(apply_affine(H_sel, A), T_sel)
        if error < best_error:
            best_error, best_A, best_r = error, A, r
    return best_A, best_r
