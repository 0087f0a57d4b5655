"""Boxes in a tensor: what two have in common, and whether many tile it, with no gap, no overlap, nothing outside."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""

MAX_ABREAST = 32
"""Boxes side by side across the sweep, on average, that are compared: a mesh of up to 64 in its smaller dimension."""


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes of the same dimensions have in common, or None."""
    if not _meet(one, other):
        return None
    offsets = tuple(max(pair) for pair in zip(one[0], other[0], strict=True))
    ends = (
        min(one_offset + one_size, other_offset + other_size)
        for one_offset, one_size, other_offset, other_size in zip(*one, *other, strict=True)
    )
    return offsets, tuple(end - offset for offset, end in zip(offsets, ends, strict=True))


def check_tiling(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should tile a tensor of this shape, or None.

    Boxes inside the tensor, pairwise apart and together as large as it is leave no gap.
    """
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"has a chunk at {offsets} of sizes {sizes}, of other dimensions than its shape {shape}"
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            return f"has a chunk at {offsets} of sizes {sizes}, outside its shape {shape}"
    fault = _overlap(boxes, len(shape))
    covered = sum(math.prod(sizes) for _, sizes in boxes)
    if fault is None and covered != math.prod(shape):
        return f"has chunks of {covered:,} numbers where its shape {shape} needs {math.prod(shape):,}: a gap"
    return fault


def _overlap(boxes: Sequence[Box], dimensions: int) -> str | None:
    """Sweeps along the dimension that is cut most often, comparing each box with those that reach past its start."""
    if len(boxes) < 2:
        return None
    if dimensions == 0:
        return "has two chunks that overlap: it is one number"
    axis = max(range(dimensions), key=lambda dimension: len({offsets[dimension] for offsets, _ in boxes}))
    active: list[Box] = []
    comparisons = 0
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        start = box[0][axis]
        active = [other for other in active if other[0][axis] + other[1][axis] > start]
        comparisons += len(active)
        if comparisons > MAX_ABREAST * len(boxes):
            return f"has {len(boxes):,} chunks, too many side by side to be checked"
        for other in active:
            if _meet(box, other):
                return f"has chunks at {other[0]} of sizes {other[1]} and at {box[0]} of sizes {box[1]} that overlap"
        active.append(box)
    return None


def _meet(one: Box, other: Box) -> bool:
    return all(
        one_offset < other_offset + other_size and other_offset < one_offset + one_size
        for one_offset, one_size, other_offset, other_size in zip(*one, *other, strict=True)
    )
