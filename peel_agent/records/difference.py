"""Two checkpoints or two runs held against each other; every difference is that of the second from the first, b - a.

All losses, margins, headrooms and their differences are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peel_agent.records.report import (
    CheckpointInfo,
    Estimate,
    ModelInfo,
    PartName,
    PeelReport,
    ProbeInfo,
    Skipped,
    Status,
)

DIFFERENCE_SCHEMA = "peel-agent/compare/1"

Pairing = Literal["by sequence", "none"]
"""`by sequence`: both were measured on the same sequences, and the interval is that of the differences. `none`: only
two estimates are known, and the half-widths of their intervals are added: wide enough however they hang together.
"""


@dataclass(frozen=True)
class PairedDifference:
    """The mean of b - a over `sequences` that both were measured on, with its paired interval."""

    value: Estimate
    sequences: int


@dataclass(frozen=True)
class PairedDifferences:
    """The paired differences of two checkpoints: of the loss, and of margins and headroom by place (`3`, `3/mlp`)."""

    loss: PairedDifference
    margins: Mapping[str, PairedDifference]
    headroom: Mapping[str, PairedDifference]


@dataclass(frozen=True)
class Both:
    """One number of both sides and its difference, None where it was not measured.

    `sequences` is how many the difference is paired over, None when it is not paired.
    """

    a: Estimate | None
    b: Estimate | None
    difference: Estimate | None
    sequences: int | None = None


@dataclass(frozen=True)
class PlaceDifference:
    """A block or a part of one in both; a status is None where only the other side has the place."""

    status_a: Status | None
    status_b: Status | None
    margin: Both
    headroom: Both | None = None

    @property
    def status_changed(self) -> bool:
        return self.status_a != self.status_b


@dataclass(frozen=True)
class LayerDifference:
    """Block `index` of both; `weights_differ` is None where weights were not compared."""

    index: int
    name: str
    block: PlaceDifference
    parts: Mapping[PartName, PlaceDifference]
    weights_differ: bool | None = None

    @property
    def places(self) -> Mapping[str, PlaceDifference]:
        """The block, as `block`, and its parts."""
        named: dict[str, PlaceDifference] = {"block": self.block}
        return named | {str(name): part for name, part in self.parts.items()}


@dataclass(frozen=True)
class WeightDifference:
    """Which stored tensors are not equal, value by value: `blocks` by index, `outside` of the blocks by name.

    `why_not` says why they were not compared, if they were not.
    """

    blocks: tuple[int, ...] = ()
    outside: tuple[str, ...] = ()
    compared: int = 0
    why_not: str | None = None


@dataclass(frozen=True)
class StepDifference:
    """Two runs at one step: both losses, and how many blocks and parts have another status."""

    step: int
    loss: Both
    statuses_changed: int
    first_by_margin: int | None


@dataclass(frozen=True)
class Compared:
    """One side: the checkpoint, or a run and its last one. `where` is what was asked for, `run` the run's name."""

    where: str
    checkpoint: CheckpointInfo
    model: ModelInfo
    skipped: tuple[Skipped, ...] = ()
    run: str | None = None


@dataclass(frozen=True)
class Comparable:
    """What is to be compared: a report, and where it came from."""

    where: str
    report: PeelReport
    run: str | None = None


@dataclass(frozen=True)
class DifferenceReport:
    """Two checkpoints, or two runs at their last checkpoints and at every common step.

    `first_by_weights` is the first block with a tensor that is not equal, `first_by_margin` the first one whose
    margin, its own or a part's, differs by an interval that holds for all of them at once; both by index.
    `notes` say what differs of the two besides.
    """

    kind: Literal["checkpoints", "runs"]
    pairing: Pairing
    a: Compared
    b: Compared
    probe: ProbeInfo
    loss: Both
    layers: tuple[LayerDifference, ...]
    first_by_weights: int | None
    first_by_margin: int | None
    weights: WeightDifference
    steps: tuple[StepDifference, ...] = ()
    notes: tuple[str, ...] = ()
    schema: str = DIFFERENCE_SCHEMA
