"""Which tensors of two checkpoints are not equal, value by value."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peel_agent.records import Snapshot, WeightDifference


def differing_weights(a: Snapshot, b: Snapshot, progress: Callable[[int, int], object]) -> WeightDifference:
    """What is stored in both, tensor by tensor, one of each in memory at a time; `progress` gets done and total.

    Blocks are held against each other by index, as far as both have them. Values of two dtypes are compared in one that
    holds both.
    """
    if a.family != b.family:
        return WeightDifference(why_not=f"the two have other tensors: one is {a.family}, the other {b.family}")
    shapes_a, shapes_b = a.weights.shapes(), b.weights.shapes()
    common = min(_depth(a), _depth(b))
    names = [
        name for name in shapes_a.keys() | shapes_b.keys() if (index := _block_of(a, name)) is None or index < common
    ]
    blocks, outside = set[int](), set[str]()
    for done, name in enumerate(sorted(names)):
        progress(done, len(names))
        index = _block_of(a, name)
        if index is not None and index in blocks:
            continue  # nothing more to learn of this block
        if shapes_a.get(name) == shapes_b.get(name) and _are_equal(a, b, name):
            continue
        if index is None:
            outside.add(name)
        else:
            blocks.add(index)
    progress(len(names), len(names))
    return WeightDifference(tuple(sorted(blocks)), tuple(sorted(outside)), len(names))


def _depth(snapshot: Snapshot) -> int:
    return len(list(snapshot.model.get_submodule(snapshot.anatomy.blocks).children()))


def _block_of(snapshot: Snapshot, name: str) -> int | None:
    """The index of the block that a tensor is in; None for one outside of them."""
    prefix = f"{snapshot.anatomy.blocks}."
    index = name.removeprefix(prefix).partition(".")[0]
    return int(index) if name.startswith(prefix) and index.isdecimal() else None


def _are_equal(a: Snapshot, b: Snapshot, name: str) -> bool:
    of_a, of_b = a.weights.read(name), b.weights.read(name)
    if of_a.dtype != of_b.dtype or of_a.itemsize == 1:  # there is no torch.equal of every small type
        of_a, of_b = of_a.double(), of_b.double()
    return torch.equal(of_a, of_b)
