"""What rules read besides reports, and what holds alerts back: the watching itself, the training's loss, silences."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import astuple
from itertools import pairwise
from typing import Any

from peel_agent.ledger.database import Database
from peel_agent.records import RuleState, Silence, TickObservation

PACE_CHECKPOINTS = 200
"""The longest pause between checkpoints is looked for among so many of the last ones."""

TRAINING_POINTS = 5000
"""Points of the training loss that are kept a run, the last ones."""


class Alerting:
    """One run's part, through any connection to the ledger."""

    def __init__(self, database: Database, run: str) -> None:
        self._database = database
        self._run = run

    def observed(self, now: float) -> TickObservation:
        """How the watching stands at the time `now`; what is wrong now, the journal knows."""
        query = self._database.query
        rows = query(
            "SELECT committed_at, step FROM checkpoints WHERE run = ? UNION ALL "
            "SELECT json_extract(ref, '$.committed_at'), json_extract(ref, '$.step') FROM jobs WHERE run = ? "
            "ORDER BY 1 DESC LIMIT ?",
            (self._run, self._run, PACE_CHECKPOINTS),
        )
        in_order = [(at, step) for at, step in rows if step is not None]
        pauses = [later - earlier for (later, _), (earlier, _) in pairwise(in_order)]
        concluded = query(
            "SELECT outcome, step, path, detail FROM checkpoints WHERE run = ? "
            "AND outcome IN ('peeled', 'refused', 'failed') ORDER BY rowid DESC LIMIT 1",
            (self._run,),
        )
        return TickObservation(
            now,
            last_checkpoint_at=rows[0][0] if rows else None,
            last_step=in_order[0][1] if in_order else None,
            longest_pause=max(pauses, default=None),
            waiting=int(query("SELECT count(*) FROM jobs WHERE run = ? AND state = 'waiting'", (self._run,))[0][0]),
            unusable=_unusable(*concluded[0]) if concluded else None,
            given_up=int(query("SELECT count(*) FROM deliveries WHERE run = ? AND dead = 1", (self._run,))[0][0]),
            ended=self._ended(rows[0][1] is None if rows and in_order else False),
        )

    def _ended(self, is_export: bool) -> str | None:
        rows = self._database.query("SELECT status FROM training WHERE run = ?", (self._run,))
        if rows:
            return f"the tracker has it as {rows[0][0]}"
        return "a last save without a step followed its checkpoints" if is_export else None

    def training_loss(self) -> tuple[tuple[int, float], ...]:
        """(step, nats per token) as the training logged them, in order."""
        rows = self._database.query("SELECT step, value FROM training_loss WHERE run = ? ORDER BY step", (self._run,))
        return tuple((step, value) for step, value in rows)

    def keep_training(self, loss: Sequence[tuple[int, float]], *, ended: str | None) -> None:
        """What a tracker knows of the training: its loss, and with which status it ended, None while it goes on."""
        with self._database.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO training_loss VALUES (?, ?, ?)", [(self._run, *point) for point in loss]
            )
            db.execute(
                "DELETE FROM training_loss WHERE run = ? AND step NOT IN "
                "(SELECT step FROM training_loss WHERE run = ? ORDER BY step DESC LIMIT ?)",
                (self._run, self._run, TRAINING_POINTS),
            )
            if ended is None:
                db.execute("DELETE FROM training WHERE run = ?", (self._run,))
            else:
                db.execute("INSERT OR REPLACE INTO training VALUES (?, ?)", (self._run, ended))

    def silences(self, now: float) -> tuple[Silence, ...]:
        """Those in force at the time `now`, of every run."""
        return silences(self._database, now)


def _unusable(outcome: str, step: int | None, path: str, detail: str) -> str | None:
    if outcome == "peeled":
        return None
    which = f"the checkpoint of step {step}" if step is not None else path
    return f"{which} could not be peeled: {detail}"


def rule_states(database: Database, run: str) -> tuple[RuleState, ...]:
    """The state of every (rule, subject) of a run."""
    rows = database.query(
        "SELECT rule, subject, phase, streak, since_step, began, words, causes, severity, told, untold, kind "
        "FROM rule_states WHERE run = ? ORDER BY rule, subject",
        (run,),
    )
    return tuple(map(_state_of, rows))


def _state_of(row: Sequence[Any]) -> RuleState:
    rule, subject, phase, streak, since_step, began, words, causes, severity, told, untold, kind = row
    parsed = tuple(json.loads(causes))
    return RuleState(rule, subject, phase, streak, since_step, began, words, parsed, severity, told, untold, kind)


def keep_rule_states(db: sqlite3.Connection, run: str, states: Sequence[RuleState]) -> None:
    """These states instead of those before."""
    db.execute("DELETE FROM rule_states WHERE run = ?", (run,))
    rows = [
        (run, *(json.dumps(value) if isinstance(value, tuple) else value for value in astuple(state)))
        for state in states
    ]
    db.executemany("INSERT INTO rule_states VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def silences(database: Database, now: float) -> tuple[Silence, ...]:
    """Those in force at the time `now`, in Unix seconds, the first to end first."""
    rows = database.query(
        "SELECT id, run, rule, subject, until, why FROM silences WHERE until > ? ORDER BY until, id", (now,)
    )
    return tuple(Silence(*row) for row in rows)


def silence(database: Database, *, run: str, rule: str, subject: str, until: float, why: str) -> int:
    """Holds back the alerts that fit these globs until then; the number by which it can be ended."""
    with database.transaction() as db:
        row = (run, rule, subject, until, why)
        cursor = db.execute("INSERT INTO silences (run, rule, subject, until, why) VALUES (?, ?, ?, ?, ?)", row)
        return int(cursor.lastrowid or 0)


def unsilence(database: Database, numbers: Sequence[int]) -> int:
    """Ends these silences; how many there were. A number that none has is no error."""
    with database.transaction() as db:
        ended = "DELETE FROM silences WHERE id IN (SELECT value FROM json_each(?))"
        return db.execute(ended, (json.dumps(numbers),)).rowcount
