"""What `status`, `/metrics` and the like read from a ledger, beside a running agent or without one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peel_agent.ledger.alerting import rule_states, silences
from peel_agent.ledger.database import Database, open_beside
from peel_agent.ledger.outbox import Lane, Outbox
from peel_agent.records import Event, RuleState, Silence


@dataclass(frozen=True)
class RunState:
    """One run as the ledger has it. `waiting` and `working` are paths; `oldest_waiting` is when it was written."""

    run: str
    name: str
    place: str
    tallies: dict[str, float]
    waiting: tuple[str, ...]
    working: tuple[str, ...]
    oldest_waiting: float | None
    last_step: int | None
    last_committed: float | None
    firing: tuple[tuple[str, str, int | None], ...]
    """Rule, subject and since which step."""


class Reader:
    """Reads; never writes. Raises LedgerError when there is no ledger, and sqlite3.Error."""

    def __init__(self, state_dir: Path) -> None:
        self._database: Database = open_beside(state_dir)

    def runs(self) -> tuple[RunState, ...]:
        rows = self._database.query("SELECT run, name, place FROM runs WHERE ended = 0 ORDER BY name")
        return tuple(self._run(*row) for row in rows)

    def _run(self, run: str, name: str, place: str) -> RunState:
        query = self._database.query
        jobs = query(
            "SELECT state, coalesce(json_extract(ref, '$.url'), json_extract(ref, '$.path')), "
            "json_extract(ref, '$.committed_at') FROM jobs WHERE run = ? ORDER BY 3",
            (run,),
        )
        last = query(
            "SELECT step, committed_at FROM checkpoints WHERE run = ? AND outcome = 'peeled' "
            "ORDER BY committed_at DESC LIMIT 1",
            (run,),
        )
        firing = query(
            "SELECT rule, subject, since_step FROM rule_states WHERE run = ? AND phase = 'firing' ORDER BY 1, 2", (run,)
        )
        return RunState(
            run,
            name,
            place,
            tallies=dict(query("SELECT what, amount FROM tallies WHERE run = ?", (run,))),
            waiting=tuple(path for state, path, _ in jobs if state == "waiting"),
            working=tuple(path for state, path, _ in jobs if state != "waiting"),
            oldest_waiting=min((at for _, _, at in jobs), default=None),
            last_step=last[0][0] if last else None,
            last_committed=last[0][1] if last else None,
            firing=tuple(firing),
        )

    def alerts(self) -> tuple[tuple[str, RuleState], ...]:
        """The name of its run, and the state, of every alert that fires or may fire soon."""
        named = self._database.query("SELECT run, name FROM runs WHERE ended = 0 ORDER BY name")
        return tuple(
            (name, state)
            for run, name in named
            for state in rule_states(self._database, run)
            if state.phase != "inactive"
        )

    def silences(self, now: float) -> tuple[Silence, ...]:
        """Those in force at the time `now`, in Unix seconds."""
        return silences(self._database, now)

    def owed(self) -> dict[Lane, tuple[int, int]]:
        """How much each lane owes, and how much of it was given up."""
        return Outbox(self._database).owed()

    def why_postponed(self) -> dict[Lane, str]:
        """What each lane was told when it was last put off."""
        outbox = Outbox(self._database)
        heads = {lane: outbox.head(lane) for lane in outbox.lanes()}
        return {lane: head.why for lane, head in heads.items() if head is not None and head.why is not None}

    def events(self, count: int) -> tuple[Event, ...]:
        """The last events, oldest first."""
        rows = self._database.query(
            "SELECT kind, words, at, run, step, level FROM events ORDER BY position DESC LIMIT ?", (count,)
        )
        return tuple(Event(*row) for row in reversed(rows))

    def close(self) -> None:
        self._database.close()
