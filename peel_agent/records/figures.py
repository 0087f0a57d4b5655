"""What the agent shows of itself: the numbers behind `/metrics` and `/readyz`.

Times are Unix seconds. A float counts what happened since the ledger began, an int counts what is there now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peel_agent.records.event import LaneKind


@dataclass(frozen=True)
class RunFigures:
    """One watched run.

    `outcomes` counts checkpoints by what became of them: found, peeled, failed, refused, passed_over, lost, torn,
    worker_died. `waiting` counts those in the queue, `lag_seconds` is the age of the oldest of them (0 without one).
    `seconds_by_stage` is the time spent in each stage. `firing` counts the subjects of each firing rule.
    """

    run: str
    outcomes: Mapping[str, float] = field(default_factory=dict)
    waiting: int = 0
    lag_seconds: float = 0.0
    last_step: int | None = None
    last_peeled_at: float | None = None
    seconds_by_stage: Mapping[str, float] = field(default_factory=dict)
    firing: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DeliveryFigures:
    """What one run sends to one destination, in one lane.

    `postponed` counts attempts that were put off, `dead` deliveries given up for good, `owed` those still to be made.
    """

    run: str
    destination: str
    lane: LaneKind
    delivered: float = 0.0
    postponed: float = 0.0
    dead: int = 0
    owed: int = 0


@dataclass(frozen=True)
class AgentFigures:
    """The whole agent. `child_memory_bytes` is the resident memory of the peeling child, None without one.

    `unready` holds one sentence for each reason why `ready` is false.
    """

    version: str
    started_at: float
    runs: tuple[RunFigures, ...] = ()
    deliveries: tuple[DeliveryFigures, ...] = ()
    child_memory_bytes: int | None = None
    ready: bool = True
    unready: tuple[str, ...] = ()
