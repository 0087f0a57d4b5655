"""Fully connected ReLU networks (method.md 7): layers, samples, and the best constructions so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """Where the layers of a fully connected network are: every matrix whose name ends in `weight`, in the order of the
    numbers in the names, with the vector whose name ends in `bias` instead as its bias.
    """

    weight: str = "weight"
    bias: str = "bias"


@dataclass(frozen=True)
class Network:
    """A fully connected ReLU network opened: weights [rows, columns] first to last, biases [rows] or None."""

    family: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None
    precision: str


@dataclass(frozen=True)
class Part:
    """X [n, N] and Y [m, N], a sample a column."""

    X: Tensor
    Y: Tensor


@dataclass(frozen=True)
class Samples:
    """Three disjoint parts, the same at every checkpoint; `fingerprint` says which."""

    fit: Part
    select: Part
    confirm: Part
    fingerprint: str


@dataclass(frozen=True)
class Best:
    """A construction that is the best for some k: its mean loss on select, its loss on each confirm sample.

    `within_class` says whether it is a point of the trained network's own class (method.md 9): no layer wider, so that
    units which do nothing make up the difference; where the network is one-bit, one-bit too, and an even difference.
    """

    waypoints: tuple[int, ...]
    select: float
    confirm: tuple[float, ...]
    within_class: bool


@dataclass(frozen=True)
class YesMemory:
    """The best construction so far for k = 0, 1, ..: what a checkpoint hands to the next one.

    It counts only for the same samples, the same kind of network and the same precision of the references.
    """

    probe: str
    network: str
    best: tuple[Best, ...]
