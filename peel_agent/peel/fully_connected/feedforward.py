"""Fully connected ReLU networks: the constructions behind the YES bounds (method.md 7; arXiv 2410.10984).

Data are columns: an input is [n, N], a target [m, N], a layer [rows, columns]; everything is float64. A construction is
a network of as many layers as the trained one. Layer j of it, fed by the construction's own output, is projected onto
the hidden state of the first way-point at or after j, and onto Y after the last way-point; without way-points this is
YES-0, in which every layer has as many rows as Y. The authors' published code treats the layers between way-points in
the same way, and appends a row of ones to a layer's input for a bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peel_agent.errors import ConfigurationError

Waypoints = tuple[int, ...]
"""Hidden layers of the trained network, 1-based and increasing: j is the output of the j-th layer."""

Precision = Literal["full", "one_bit", "one_bit_refined"]
"""What a layer may be: any matrix; lambda * sign(.) of the projection; the same after one ReLU refinement."""

RCOND = 1e-7
"""Singular values below this fraction of the largest count as 0: hidden states are mostly computed in float32, where
such a direction is rounding, and dividing by it would make a reference that explodes on other samples."""

TIE = 1e-9
"""A weight below this fraction of the layer's largest has no sign of its own (a constant input, a dead unit); it
becomes +lambda, so that the result does not hang on rounding. One bit has no 0."""

MOST_SUBSETS = 4096


@dataclass(frozen=True)
class Net:
    """Layers W_1..W_K [rows, columns], ReLU after each but the last; when `biased`, the last column is the bias."""

    layers: tuple[Tensor, ...]
    biased: bool

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Net:
        """The network of weights [rows, columns] and biases [rows], as it computes: one-bit layers come quantised.

        Raises ConfigurationError when the layers do not fit each other.
        """
        if not weights:
            raise ConfigurationError("a network without layers", remedy="give at least one weight matrix")
        shapes = " -> ".join("x".join(map(str, weight.shape)) for weight in weights)
        joints = itertools.pairwise(weights)
        if any(weight.ndim != 2 for weight in weights) or any(
            after.shape[1] != layer.shape[0] for layer, after in joints
        ):
            raise ConfigurationError(
                f"layers of shapes {shapes} do not fit each other", remedy="give each as [rows, columns], first to last"
            )
        if biases is None:
            return cls(tuple(weight.detach().double() for weight in weights), biased=False)
        if [bias.shape for bias in biases] != [weight.shape[:1] for weight in weights]:
            raise ConfigurationError(
                f"biases of shapes {[tuple(bias.shape) for bias in biases]} do not fit layers of shapes {shapes}",
                remedy="give one bias [rows] for each layer, or none",
            )
        pairs = zip(weights, biases, strict=True)
        return cls(tuple(torch.cat([w, b[:, None]], dim=1).detach().double() for w, b in pairs), biased=True)

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of the input and of each layer's output."""
        return self.layers[0].shape[1] - self.biased, *(len(layer) for layer in self.layers)

    @property
    def one_bit(self) -> bool:
        """Whether the weights of every row (biases apart) have one magnitude, up to float32 rounding."""
        magnitudes = [_weights(layer, self.biased).abs() for layer in self.layers]
        return all(bool((weights.amax(1) - weights.amin(1) <= 1e-6 * weights.amax(1)).all()) for weights in magnitudes)

    def outputs(self, X: Tensor) -> tuple[Tensor, ...]:
        """Every layer's output [rows, N] for X [n, N]: the K - 1 hidden states, then the network's answer."""
        states, state = [], X.double()
        for number, layer in enumerate(self.layers, 1):
            state = layer @ augmented(state, self.biased)
            state = state.relu() if number < len(self.layers) else state
            states.append(state)
        return tuple(states)


def augmented(Z: Tensor, biased: bool) -> Tensor:
    """[Z; 1]: a layer's input [p, N] with a row of ones below it when the layer has a bias."""
    return torch.cat([Z, Z.new_ones(1, Z.shape[1])]) if biased else Z


class Projection:
    """One layer's input, its pseudo-inverse taken once (method.md 7), serving any number of targets.

    The pseudo-inverse is the SVD's, with the relative cut RCOND: no normal equations, whose condition is the square,
    and defined for dead units, constant inputs and fewer samples than rows.
    """

    def __init__(self, Z: Tensor, *, biased: bool, precision: Precision) -> None:
        self._input = augmented(Z, biased)
        self._inverse = torch.linalg.pinv(self._input, rtol=RCOND)
        self._biased = biased
        self._precision = precision

    def onto(self, target: Tensor, *, hidden: bool) -> tuple[Tensor, Tensor]:
        """The layer [q, p] projected onto a target [q, N], and its output [q, N], after the ReLU when `hidden`."""
        layer = target @ self._inverse
        if self._precision == "one_bit_refined" and hidden:
            before = layer @ self._input
            layer = layer + ((target - before.relu()) * (before > 0)) @ self._inverse
        if self._precision != "full":
            layer = self._quantised(layer, target)
        output = layer @ self._input
        return layer, output.relu() if hidden else output

    def _quantised(self, layer: Tensor, target: Tensor) -> Tensor:
        """Weights at one bit; a bias stays a number, and is solved anew beside the quantised weights (ours)."""
        weights = one_bit(_weights(layer, self._biased))
        if not self._biased:
            return weights
        bias = (target - weights @ self._input[:-1]).mean(dim=1, keepdim=True)
        return torch.cat([weights, bias], dim=1)


def one_bit(weights: Tensor) -> Tensor:
    """Lambda * sign(W) with lambda = mean |W| over the layer (method.md 7)."""
    size = weights.abs()
    return torch.where(weights < -TIE * size.max(), -1.0, 1.0).to(weights) * size.mean()


def constructions(trained: Net, X: Tensor, Y: Tensor, precision: Precision = "full") -> Iterator[tuple[Waypoints, Net]]:
    """The construction of every subset of the hidden layers, fitted to X [n, N] and Y [m, N].

    Subsets that begin alike share their solves, and one pseudo-inverse serves every target of the same input. Raises
    ConfigurationError when there are more than MOST_SUBSETS.
    """
    hidden = len(trained.layers) - 1
    if 2**hidden > MOST_SUBSETS:
        raise ConfigurationError(
            f"a network of {hidden + 1} layers has {2**hidden:,} subsets of way-points",
            remedy=f"measure its last {MOST_SUBSETS.bit_length()} layers, with the hidden state before them as X",
        )
    targets = (*trained.outputs(X)[:-1], Y.double())
    yield from _Course(targets, trained.biased, precision).onward(X.double(), (), ())


def construct(
    trained: Net, X: Tensor, Y: Tensor, waypoints: Waypoints = (), precision: Precision = "full"
) -> tuple[Net, tuple[Tensor, ...]]:
    """One construction, layer after layer, and each layer's output on X: replays what `constructions` made.

    Raises ConfigurationError when a way-point is no hidden layer, or when they do not increase.
    """
    depth = len(trained.layers)
    if list(waypoints) != sorted({point for point in waypoints if 0 < point < depth}):
        raise ConfigurationError(
            f"way-points {waypoints} in a network of {depth} layers",
            remedy=f"give increasing numbers of hidden layers, from 1 to {depth - 1}",
        )
    targets = (*trained.outputs(X)[:-1], Y.double())
    layers, states, state = [], [], X.double()
    for number in range(1, depth + 1):
        aim = next((point for point in waypoints if point >= number), depth)
        projection = Projection(state, biased=trained.biased, precision=precision)
        layer, state = projection.onto(targets[aim - 1], hidden=number < depth)
        layers.append(layer)
        states.append(state)
    return Net(tuple(layers), trained.biased), tuple(states)


@dataclass(frozen=True)
class _Course:
    """What the layers may aim at: targets[i - 1] is the trained hidden state that layer i ends in, the last one Y."""

    targets: tuple[Tensor, ...]
    biased: bool
    precision: Precision

    def onward(
        self, state: Tensor, layers: tuple[Tensor, ...], waypoints: Waypoints
    ) -> Iterator[tuple[Waypoints, Net]]:
        """Every way on from the last way-point, where the construction's own output is `state`."""
        depth, done = len(self.targets), len(layers)
        shared = self._projection(state)
        for aim in range(depth, done, -1):
            projection, built = shared, layers
            for number in range(done + 1, aim + 1):
                layer, output = projection.onto(self.targets[aim - 1], hidden=number < depth)
                built = (*built, layer)
                if number < aim:
                    projection = self._projection(output)
            if aim == depth:
                yield waypoints, Net(built, self.biased)
            else:
                yield from self.onward(output, built, (*waypoints, aim))

    def _projection(self, Z: Tensor) -> Projection:
        return Projection(Z, biased=self.biased, precision=self.precision)


def _weights(layer: Tensor, biased: bool) -> Tensor:
    return layer[:, :-1] if biased else layer
