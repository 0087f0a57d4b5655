"""Rules, what the judge answers, and what a tracker is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peel_agent.records.report import Notice, Severity

RuleKind = Literal["layer_below"]


@dataclass(frozen=True)
class Rule:
    """`[[rule]]`: raise after `for_checkpoints` in a row, clear after `clear_checkpoints` in a row."""

    name: str
    kind: RuleKind
    for_checkpoints: int = 2
    clear_checkpoints: int = 2
    after_step: int = 0
    severity: Severity = "warning"


@dataclass(frozen=True)
class RuleState:
    """Where one (rule, layer) stands. `streak` counts checkpoints in a row that spoke against the phase."""

    rule: str
    layer: str
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
