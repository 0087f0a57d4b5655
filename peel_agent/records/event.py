"""What happened, for the log, for `status` and for metrics; and what is owed to a destination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

EventKind = Literal[
    "started",
    "stopping",
    "reloaded",
    "repaired",
    "watching",
    "ended",
    "found",
    "missed",
    "passed over",
    "unreadable",
    "refused",
    "torn",
    "peeling",
    "measured",
    "worker died",
    "gave way",
    "failed",
    "alert",
    "device",
    "space",
    "delivered",
    "delivery failed",
    "delivery dead",
    "trouble began",
    "trouble ended",
]

Level = Literal["info", "warning", "error"]

LaneKind = Literal["numbers", "files", "pages", "notices"]


@dataclass(frozen=True)
class Event:
    """One thing that happened at the time `at`, in Unix seconds, to a run or (None) to the agent, in a sentence."""

    kind: EventKind
    words: str
    at: float
    run: str | None = None
    step: int | None = None
    level: Level = "info"


@dataclass(frozen=True)
class Debt:
    """One thing that a destination is to get; `body` is the frozen JSON form of a Publication or a NoticeGroup.

    `key` is the same when it is sent again. With `with_alerts` the log of the run's alerts goes with it; `with_history`
    it is made, when it is sent, of all that is known of the run now. One that `replaces` is owed instead of what is
    still owed under the same key.
    """

    destination: str
    lane: LaneKind
    key: str
    body: Mapping[str, Any]
    with_alerts: bool = False
    replaces: bool = False
    with_history: bool = False
