"""Rules, what the judge answers, and what a tracker is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peel_agent.records.report import Notice, Severity

RuleKind = Literal[
    "layer_below",
    "layer_changed",
    "layer_regressed",
    "layer_dropped",
    "layer_stalled",
    "layer_flooding",
    "layer_improvable",
]

CHECKPOINTS: Mapping[RuleKind, int] = {
    "layer_below": 2,
    "layer_changed": 1,
    "layer_regressed": 1,
    "layer_dropped": 2,
    "layer_stalled": 1,
    "layer_flooding": 1,
    "layer_improvable": 2,
}
"""How many checkpoints in a row raise, and clear, an alert of each kind: an event needs one, a state two."""


@dataclass(frozen=True)
class Rule:
    """`[[rule]]`: raise after `for_checkpoints` in a row, clear after `clear_checkpoints` in a row.

    None is the kind's own number (CHECKPOINTS).
    """

    name: str
    kind: RuleKind
    for_checkpoints: int | None = None
    clear_checkpoints: int | None = None
    after_step: int = 0
    severity: Severity = "warning"

    @property
    def raised_after(self) -> int:
        return CHECKPOINTS[self.kind] if self.for_checkpoints is None else self.for_checkpoints

    @property
    def cleared_after(self) -> int:
        return CHECKPOINTS[self.kind] if self.clear_checkpoints is None else self.clear_checkpoints


@dataclass(frozen=True)
class RuleState:
    """Where one (rule, subject) stands: a block, or a part of one (`model.layers.3/mlp`).

    `streak` counts checkpoints in a row that spoke against the phase.
    """

    rule: str
    subject: str
    phase: Literal["inactive", "pending", "firing"]
    streak: int
    since_step: int | None


@dataclass(frozen=True)
class Verdict:
    """The judge's answer to one report: the states to keep, and what changed."""

    states: tuple[RuleState, ...]
    notices: tuple[Notice, ...]

    @property
    def firing(self) -> tuple[RuleState, ...]:
        return tuple(state for state in self.states if state.phase == "firing")


@dataclass(frozen=True)
class Publication:
    """Everything one checkpoint sends to a tracker. Sending it twice changes nothing.

    `timestamp_ms` comes from the checkpoint, never from the clock. `files` maps artifact paths to text.
    """

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NoticeGroup:
    """All notices of one checkpoint, or of one moment, that one sink is to get; `id` is the same when it comes again.

    `text` is for people, one line a notice; `at` is in Unix seconds.
    """

    id: str
    run: str
    at: float
    notices: tuple[Notice, ...]
    text: str
