"""What a checkpoint is held against: the one before it in the same run (method.md 4b)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peel_agent.records.checkpoint import CheckpointRef


@dataclass(frozen=True)
class Sketches:
    """A random projection of every weight of every block, small enough to be kept with the state.

    `values` holds float32 numbers in base64 by the weight's full name, `shapes` the shapes of the weights themselves;
    `dtype` is what they were stored as.
    """

    values: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str


@dataclass(frozen=True)
class Before:
    """The checkpoint before: its files while they are at hand, else the sketches of its weights, else why neither.

    `why_not` says for people why nothing can be compared; then the other fields are None.
    """

    step: int | None = None
    ref: CheckpointRef | None = None
    sketches: Sketches | None = None
    why_not: str | None = None
