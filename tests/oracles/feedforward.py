"""YES bounds of ReLU networks, written straight from method.md 7: one subset at a time, nothing shared, plain numpy.

X [n, N] and Y [m, N] are columns. A network is a list of matrices W [rows, columns] with an equally long list of biases
[rows], or None for a network without them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.oracles.decoder import Array

CUT = 1e-7  # singular values below this fraction of the largest count as 0

Layers = list[tuple["Array", "Array | None"]]


def relu(Z: Array) -> Array:
    return np.maximum(Z, 0.0)


def forward(layers: Layers, X: Array) -> list[Array]:
    """Every layer's output; ReLU after each but the last."""
    outputs, Z = [], X
    for k, (W, b) in enumerate(layers):
        Z = W @ Z if b is None else W @ Z + b[:, None]
        if k < len(layers) - 1:
            Z = relu(Z)
        outputs.append(Z)
    return outputs


def solve(T: Array, Z: Array, *, biased: bool, bits: str, hidden: bool) -> tuple[Array, Array | None]:
    """W (and b) with W Z (+ b) near T; `bits` is "full", "one_bit" or "one_bit_refined"."""
    A = np.vstack([Z, np.ones(Z.shape[1])]) if biased else Z
    U, s, Vt = np.linalg.svd(A, full_matrices=False)
    s_inv = np.array([1.0 / x if x > CUT * s[0] else 0.0 for x in s])
    A_pinv = Vt.T @ np.diag(s_inv) @ U.T
    W = T @ A_pinv
    if bits == "one_bit_refined" and hidden:
        W = W + ((T - relu(W @ A)) * (W @ A > 0)) @ A_pinv
    W, b = (W[:, :-1], W[:, -1]) if biased else (W, None)
    if bits != "full":
        lam = np.abs(W).mean()
        has_sign = np.abs(W) > 1e-9 * np.abs(W).max()
        W = lam * np.where(has_sign, np.sign(W), 1.0)
        if biased:
            b = (T - W @ Z).mean(axis=1)
    return W, b


def construction(trained: Layers, X: Array, Y: Array, waypoints: tuple[int, ...], bits: str) -> Layers:
    """The network whose layers aim at the way-points (1-based hidden layers of the trained net) in turn, then at Y."""
    hidden_states = forward(trained, X)
    depth, biased = len(trained), trained[0][1] is not None
    made: Layers = []
    for j in range(1, depth + 1):
        later = [i for i in waypoints if i >= j]
        T = hidden_states[later[0] - 1] if later else Y
        Z = relu(forward(made, X)[-1]) if made else X  # `forward` leaves the last layer linear; here it is hidden
        made.append(solve(T, Z, biased=biased, bits=bits, hidden=j < depth))
    return made


def losses(layers: Layers, X: Array, Y: Array) -> Array:
    """Squared error of each sample, summed over outputs."""
    return np.array([((Y[:, i] - forward(layers, X[:, i : i + 1])[-1][:, 0]) ** 2).sum() for i in range(X.shape[1])])


def yes(
    trained: Layers, fit: tuple[Array, Array], select: tuple[Array, Array], confirm: tuple[Array, Array], bits: str
) -> list[tuple[tuple[int, ...], float, Array]]:
    """For k = 0..K-1: the best of all subsets of at most k way-points on select, its mean there, its confirm losses."""
    hidden = range(1, len(trained))
    table: list[tuple[tuple[int, ...], float, Array]] = []
    best: tuple[tuple[int, ...], float, Array] = ((), np.inf, np.empty(0))
    for k in range(len(trained)):
        for waypoints in itertools.combinations(hidden, k):
            net = construction(trained, *fit, waypoints, bits)
            on_select = float(losses(net, *select).mean())
            if on_select < best[1]:
                best = (waypoints, on_select, losses(net, *confirm))
        table.append(best)
    return table
