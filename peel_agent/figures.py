"""The agent's figures for `/metrics` and `peel-agent status`, read from the ledger when somebody asks."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peel_agent.ledger import Lane, Reader, RunState, is_held, read_json
from peel_agent.records import AgentFigures, DeliveryFigures, Event, RunFigures, plain

OUTCOMES = {
    "found": "found",
    "peeled": "peeled",
    "failed": "failed",
    "refused": "refused",
    "passed_over": "passed_over",
    "vanished": "lost",
    "torn": "torn",
    "worker_died": "worker_died",
    "gave_way": "gave_way",
}
"""What the ledger tallies, and what it is called outside."""

LANES = {"numbers", "files", "pages", "notices"}


class Figures:
    """`unready` says what is wrong now, `memory_bytes` what the peeling child holds."""

    def __init__(
        self,
        state_dir: Path,
        started_at: float,
        unready: Callable[[], tuple[str, ...]],
        memory_bytes: Callable[[], int | None],
        now: Callable[[], float],
    ) -> None:
        self._state_dir = state_dir
        self._started_at = started_at
        self._unready = unready
        self._memory_bytes = memory_bytes
        self._now = now

    def read(self) -> AgentFigures:
        """As they are now. Raises LedgerError and sqlite3.Error."""
        reader = Reader(self._state_dir)
        try:
            runs = reader.runs()
            owed = reader.owed()
        finally:
            reader.close()
        unready = self._unready()
        now = self._now()
        return AgentFigures(
            version=version("peel-agent"),
            started_at=self._started_at,
            runs=tuple(_run(run, now) for run in runs),
            deliveries=tuple(delivery for run in runs for delivery in _deliveries(run, owed)),
            child_memory_bytes=self._memory_bytes(),
            ready=not unready,
            unready=unready,
        )


def _run(run: RunState, now: float) -> RunFigures:
    seconds = {what.partition("/")[2]: amount for what, amount in run.tallies.items() if what.startswith("seconds/")}
    return RunFigures(
        run=run.name,
        outcomes={name: run.tallies.get(what, 0.0) for what, name in OUTCOMES.items()},
        waiting=len(run.waiting) + len(run.working),
        lag_seconds=max(0.0, now - run.oldest_waiting) if run.oldest_waiting is not None else 0.0,
        last_step=run.last_step,
        last_peeled_at=run.last_committed,
        seconds_by_stage=seconds,
        firing=Counter(rule for rule, _, _ in run.firing),
    )


def _deliveries(run: RunState, owed: dict[Lane, tuple[int, int]]) -> list[DeliveryFigures]:
    """One for each lane that has ever sent, or owes, anything."""
    lanes = {(lane.destination, lane.kind) for lane in owed if lane.run == run.run}
    for what in run.tallies:
        kind, _, rest = what.partition("/")
        if kind in ("delivered", "postponed"):
            destination, _, lane = rest.rpartition("/")
            lanes.add((destination, lane))
    figures = []
    for destination, lane in sorted(lanes):
        if lane not in LANES:
            continue
        alive, dead = owed.get(Lane(run.run, destination, lane), (0, 0))
        figures.append(
            DeliveryFigures(
                run=run.name,
                destination=destination,
                lane=lane,  # type: ignore[arg-type]
                delivered=run.tallies.get(f"delivered/{destination}/{lane}", 0.0),
                postponed=run.tallies.get(f"postponed/{destination}/{lane}", 0.0),
                dead=dead,
                owed=alive,
            )
        )
    return figures


# ---------------------------------------------------------------- status

HEARTBEAT = "agent.json"
FRESH_SECONDS = 60.0
"""An agent that was not heard of for longer is not ready."""

EVENTS_SHOWN = 12


@dataclass(frozen=True)
class Standing:
    """What `peel-agent status` tells; `silent_seconds` since the agent was heard of, None when it never was."""

    state_dir: Path
    is_running: bool
    pid: int | None
    silent_seconds: float | None
    troubles: tuple[str, ...]
    device: str
    runs: tuple[dict[str, Any], ...]
    events: tuple[Event, ...]

    @property
    def is_ready(self) -> bool:
        """Whether an agent is at work and nothing is wrong."""
        fresh = self.silent_seconds is not None and self.silent_seconds <= FRESH_SECONDS
        return self.is_running and fresh and not self.troubles

    def form(self) -> dict[str, Any]:
        """As JSON values."""
        return {"ready": self.is_ready, **plain(self)}


def write_heartbeat(state_dir: Path, now: float, troubles: Sequence[str], device: str) -> None:
    """Leaves for `status` that this agent lives, what is wrong, and which device it has. Raises OSError."""
    form = {"pid": os.getpid(), "at": now, "troubles": list(troubles), "device": device}
    part = state_dir / (HEARTBEAT + ".part")
    part.write_text(json.dumps(form), encoding="utf-8")
    part.replace(state_dir / HEARTBEAT)


def standing_of(state_dir: Path, now: float) -> Standing:
    """How the agent of a state folder stands at the time `now`. Raises LedgerError and sqlite3.Error."""
    reader = Reader(state_dir)
    try:
        runs, owed, why, events = reader.runs(), reader.owed(), reader.why_postponed(), reader.events(EVENTS_SHOWN)
    finally:
        reader.close()
    beat = read_json(state_dir / HEARTBEAT) or {}
    running = is_held(state_dir)
    return Standing(
        state_dir=state_dir,
        is_running=running,
        pid=beat.get("pid") if running else None,
        silent_seconds=abs(now - beat["at"]) if "at" in beat else None,
        troubles=tuple(beat.get("troubles", ())) if running else (),
        device=str(beat.get("device", "")),
        runs=tuple(_standing(run, now, owed, why) for run in runs),
        events=events,
    )


def _standing(run: RunState, now: float, owed: dict[Lane, tuple[int, int]], why: dict[Lane, str]) -> dict[str, Any]:
    figures = _run(run, now)
    return {
        "name": run.name,
        "place": run.place,
        "checkpoints": figures.outcomes,
        "working": run.working,
        "waiting": run.waiting,
        "lag_seconds": figures.lag_seconds,
        "last_step": run.last_step,
        "firing": [{"rule": rule, "subject": subject, "since_step": step} for rule, subject, step in run.firing],
        "deliveries": [
            {
                "destination": delivery.destination,
                "lane": delivery.lane,
                "delivered": delivery.delivered,
                "owed": delivery.owed,
                "dead": delivery.dead,
                "why": why.get(Lane(run.run, delivery.destination, delivery.lane)),
            }
            for delivery in _deliveries(run, owed)
        ],
    }
