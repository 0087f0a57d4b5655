"""Alerts: what a rule may look at, where each (rule, subject) stands, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peel_agent.records.report import Notice, PeelReport, Severity
from peel_agent.records.rule import RuleKind

Phase = Literal["inactive", "pending", "firing"]


@dataclass(frozen=True)
class ReportObservation:
    """A checkpoint's diagnosed report beside the `history` of the run, oldest first.

    `metrics` are what trackers get for it, by key. `training_loss` holds (step, nats per token) as the training itself
    logged them, in order; empty when nobody knows them.
    """

    report: PeelReport
    history: tuple[PeelReport, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    training_loss: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TrainingLog:
    """What a tracker knows of the training itself: its loss as (step, value), and its status once it has ended."""

    loss: tuple[tuple[int, float], ...] = ()
    ended: str | None = None


@dataclass(frozen=True)
class TickObservation:
    """How the watching itself stands at the time `now`; all times are Unix seconds.

    `last_checkpoint_at` is when the newest checkpoint was written, of step `last_step`; `longest_pause` the most
    seconds between two of them so far. `waiting` checkpoints are whole and not peeled yet, None when it does not matter
    how many. `troubles` are what is wrong now, in words, with the time since when. `unusable` says why the newest
    checkpoint could not be peeled, None when it could. `given_up` deliveries will not be tried again. `ended` says how
    it is known that the training is over.
    """

    now: float
    last_checkpoint_at: float | None = None
    last_step: int | None = None
    longest_pause: float | None = None
    waiting: int | None = 0
    troubles: tuple[tuple[str, float], ...] = ()
    unusable: str | None = None
    given_up: int = 0
    ended: str | None = None


@dataclass(frozen=True)
class RuleState:
    """Where one (rule, subject) stands: a block, a part of one (`model.layers.3/mlp`), `run` or `agent`.

    `streak` counts checkpoints in a row that spoke against the phase. `began` tells this alert from an earlier one of
    the same rule and subject. `words` say why it fires, or why it does not any more, and `causes` what the likely
    reasons are. It was told `told` times that it fires, 0 when nobody was told, `untold` checkpoints ago the last time.
    `kind` is its rule's; empty where an earlier version did not keep it, or nothing has been said yet.
    """

    rule: str
    subject: str
    phase: Phase
    streak: int
    since_step: int | None
    began: str = ""
    words: str = ""
    causes: tuple[str, ...] = ()
    severity: Severity = "warning"
    told: int = 0
    untold: int = 0
    kind: RuleKind | Literal[""] = ""


@dataclass(frozen=True)
class Silence:
    """Alerts whose run, rule and subject fit these globs are not told until the time `until`, in Unix seconds."""

    id: int
    run: str
    rule: str
    subject: str
    until: float
    why: str


@dataclass(frozen=True)
class Verdict:
    """What comes of one observation: the states to keep, and what is told."""

    states: tuple[RuleState, ...]
    notices: tuple[Notice, ...]

    @property
    def firing(self) -> tuple[RuleState, ...]:
        return tuple(state for state in self.states if state.phase == "firing")


@dataclass(frozen=True)
class Moment:
    """When something is told: at the time `now`, in Unix seconds, and training step `step`.

    `is_checkpoint` says whether a checkpoint was judged just now. `unchecked` are checks that it did without, in words,
    and `command` is what shows more.
    """

    now: float
    step: int | None = None
    is_checkpoint: bool = False
    unchecked: tuple[str, ...] = ()
    command: str | None = None
