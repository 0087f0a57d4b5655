"""What the ledger holds of one run: its jobs, its checkpoints, its rules' states, its alerts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from peel_agent.errors import printable
from peel_agent.ledger.alerting import Alerting, keep_rule_states, rule_states
from peel_agent.ledger.database import Database
from peel_agent.ledger.files import read_json, write_durably
from peel_agent.records import (
    CheckpointRef,
    Debt,
    LaneKind,
    Memory,
    Peeled,
    RuleState,
    Sketches,
    Verdict,
    decoded,
    plain,
    restored,
)

Outcome = Literal["peeled", "refused", "failed", "passed over", "vanished"]
"""What became of a checkpoint: done, not usable, given up after its worker died, or lost in one of two ways."""

JobState = Literal["waiting", "working", "answered"]

HISTORY = 12
"""The reports before a checkpoint that it is diagnosed beside."""

PAST = 5000
"""The reports that a tracker which is added later gets, the last ones."""


@dataclass(frozen=True)
class LastObserved:
    """The checkpoint that was judged last: what the next one is held against."""

    fingerprint: str
    step: int | None
    sketches: Sketches | None


@dataclass(frozen=True)
class Job:
    """A checkpoint that is not done yet.

    `deaths` counts workers that died of it, `interruptions` the agents that ended while it was in work; it is not begun
    before the time `not_before`, in Unix seconds.
    """

    ref: CheckpointRef
    state: JobState
    deaths: int
    interruptions: int
    not_before: float


class RunLedger:
    """One run's part of the ledger; its files are in `folder`."""

    def __init__(self, database: Database, run: str, folder: Path) -> None:
        self._database = database
        self.run = run
        self.folder = folder
        self.reports_dir = folder / "reports"
        self.alerting = Alerting(database, run)

    # ---------------------------------------------------------------- what is known

    def outcome(self, fingerprint: str) -> Outcome | None:
        """What became of this checkpoint, None for an unknown one."""
        rows = self._rows("SELECT outcome FROM checkpoints WHERE run = ? AND fingerprint = ?", fingerprint)
        return cast(Outcome, rows[0][0]) if rows else None

    def count(self, outcome: Outcome) -> int:
        """How many checkpoints came to this."""
        return int(self._rows("SELECT count(*) FROM checkpoints WHERE run = ? AND outcome = ?", outcome)[0][0])

    def is_late(self, ref: CheckpointRef) -> bool:
        """Whether a checkpoint of a later step, written later, has been peeled already."""
        rows = self._rows(
            "SELECT step, committed_at FROM checkpoints WHERE run = ? AND outcome = 'peeled' AND step IS NOT NULL "
            "ORDER BY committed_at DESC LIMIT 1"
        )
        if not rows or ref.step is None:
            return False
        step, committed_at = rows[0]
        return bool(ref.step < step and ref.committed_at < committed_at)

    def last_peeled(self) -> tuple[int | None, float] | None:
        """Step and time of the checkpoint that was written last of those peeled, None before the first."""
        rows = self._rows(
            "SELECT step, committed_at FROM checkpoints WHERE run = ? AND outcome = 'peeled' "
            "ORDER BY committed_at DESC LIMIT 1"
        )
        return (rows[0][0], rows[0][1]) if rows else None

    def refused(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of every checkpoint that could not be used."""
        return tuple(
            self._rows(
                "SELECT path, detail FROM checkpoints WHERE run = ? AND outcome IN ('refused', 'failed') "
                "ORDER BY step, path"
            )
        )

    def rule_states(self) -> tuple[RuleState, ...]:
        return rule_states(self._database, self.run)

    def bound_memory(self) -> Memory | None:
        """The running minimum of the bounds, None before the first."""
        rows = self._rows("SELECT memory FROM bound_memory WHERE run = ?")
        return decoded(Memory, json.loads(rows[0][0])) if rows else None

    def last_observed(self) -> LastObserved | None:
        """The checkpoint that was judged last, None before the first."""
        rows = self._rows("SELECT fingerprint, step, sketches FROM last_observed WHERE run = ?")
        if not rows:
            return None
        fingerprint, step, sketches = rows[0]
        return LastObserved(fingerprint, step, None if sketches is None else restored(Sketches, json.loads(sketches)))

    def history(self) -> tuple[dict[str, Any], ...]:
        """The JSON forms of the last reports of checkpoints with a step, in the order in which those were written.

        One that was removed or damaged is left out: only the diagnosis misses it.
        """
        rows = self._rows(
            "SELECT detail FROM checkpoints WHERE run = ? AND outcome = 'peeled' AND step IS NOT NULL "
            "ORDER BY committed_at DESC, step DESC LIMIT ?",
            HISTORY,
        )
        forms = (read_json(self.reports_dir / name) for (name,) in reversed(rows))
        return tuple(form for form in forms if form is not None)

    def series(self) -> frozenset[str]:
        """The keys of all metrics that this run was ever published under."""
        return series(self._database, self.run)

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        return self._database.query(sql, (self.run, *values))

    # ---------------------------------------------------------------- the life of a job

    def jobs(self) -> tuple[Job, ...]:
        """All that is not done yet."""
        rows = self._rows("SELECT ref, state, deaths, interruptions, not_before FROM jobs WHERE run = ?")
        return tuple(Job(restored(CheckpointRef, json.loads(ref)), *rest) for ref, *rest in rows)

    def await_turn(self, ref: CheckpointRef) -> None:
        """A checkpoint was found whole and waits; or waits again."""
        with self._database.transaction() as db:
            row = (self.run, ref.fingerprint, json.dumps(plain(ref)))
            added = db.execute("INSERT OR IGNORE INTO jobs VALUES (?, ?, ?, 'waiting', 0, 0, 0, NULL)", row).rowcount
            if added:
                tally(db, self.run, "found")
            else:
                self._set(db, ref, "state = 'waiting', ref = ?", json.dumps(plain(ref)))

    def begin(self, ref: CheckpointRef) -> None:
        """It is about to be peeled: should the agent end meanwhile, that counts."""
        with self._database.transaction() as db:
            self._set(db, ref, "state = 'working', interruptions = interruptions + 1")

    def answered(self, ref: CheckpointRef, peeled: Peeled) -> None:
        """The worker's answer: from now on it is judged, and never peeled again."""
        with self._database.transaction() as db:
            answer = json.dumps(plain(peeled), allow_nan=False)
            self._set(db, ref, "state = 'answered', interruptions = 0, answer = ?", answer)
            tally(db, self.run, "answered")
            for stage, seconds in plain(peeled.report.timing).items():
                tally(db, self.run, f"seconds/{stage}", seconds)

    def answer(self, ref: CheckpointRef) -> Peeled:
        """The answer that was kept."""
        rows = self._rows("SELECT answer FROM jobs WHERE run = ? AND fingerprint = ?", ref.fingerprint)
        return restored(Peeled, json.loads(rows[0][0]))

    def count_deaths(self, ref: CheckpointRef) -> int:
        """How many workers died of it."""
        rows = self._rows("SELECT deaths FROM jobs WHERE run = ? AND fingerprint = ?", ref.fingerprint)
        return int(rows[0][0]) if rows else 0

    def died(self, ref: CheckpointRef, not_before: float) -> None:
        """Its worker died: it waits until then."""
        with self._database.transaction() as db:
            change = "state = 'waiting', interruptions = 0, deaths = deaths + 1, not_before = ?"
            self._set(db, ref, change, not_before)
            tally(db, self.run, "worker_died")

    def put_back(self, ref: CheckpointRef, *, why: str | None = None) -> None:
        """It waits again through no fault of its own; `why` is tallied."""
        with self._database.transaction() as db:
            self._set(db, ref, "state = 'waiting', interruptions = max(0, interruptions - 1)")
            if why is not None:
                tally(db, self.run, why)

    def forget(self, ref: CheckpointRef, *, why: str | None = None) -> None:
        """Nothing is owed to it: it was torn, and comes back as another."""
        with self._database.transaction() as db:
            self._end_job(db, ref)
            if why is not None:
                tally(db, self.run, why)

    def _set(self, db: sqlite3.Connection, ref: CheckpointRef, change: str, *values: Any) -> None:
        sql = f"UPDATE jobs SET {change} WHERE run = ? AND fingerprint = ?"  # noqa: S608 -- our own words
        db.execute(sql, (*values, self.run, ref.fingerprint))

    def _end_job(self, db: sqlite3.Connection, ref: CheckpointRef) -> None:
        db.execute("DELETE FROM jobs WHERE run = ? AND fingerprint = ?", (self.run, ref.fingerprint))

    # ---------------------------------------------------------------- its end

    def record(
        self,
        ref: CheckpointRef,
        *,
        report: str,
        verdict: Verdict,
        alert_lines: Mapping[str, str],
        memory: Memory | None,
        debts: Iterable[Debt],
        observed: bool = False,
        sketches: Sketches | None = None,
        charted: Iterable[str] = (),
    ) -> Path:
        """Makes one peeled checkpoint final, and returns the path of its report.

        `alert_lines` maps notice ids to lines; `debts` are what destinations are to get. The next checkpoint is held
        against one that was `observed`, by its files or its `sketches`. `charted` are the keys of its metrics.
        """
        path = self.reports_dir / self._report_name(ref)
        write_durably(path, report + "\n")
        with self._database.transaction() as db:
            self._finish(db, ref, "peeled", path.name)
            self._keep_verdict(db, verdict, alert_lines)
            if memory is not None:
                row = (self.run, json.dumps(plain(memory), allow_nan=False))
                db.execute("INSERT OR REPLACE INTO bound_memory VALUES (?, ?)", row)
            if observed:
                kept = (self.run, ref.fingerprint, ref.step, None if sketches is None else json.dumps(plain(sketches)))
                db.execute("INSERT OR REPLACE INTO last_observed VALUES (?, ?, ?, ?)", kept)
            db.executemany("INSERT OR IGNORE INTO series VALUES (?, ?)", [(self.run, key) for key in charted])
            self._owe(db, debts)
        return path

    def keep_verdict(self, verdict: Verdict, alert_lines: Mapping[str, str], debts: Iterable[Debt]) -> None:
        """States and alerts that changed without a checkpoint, and what is owed for that."""
        with self._database.transaction() as db:
            self._keep_verdict(db, verdict, alert_lines)
            self._owe(db, debts)

    def owe(self, debts: Iterable[Debt]) -> None:
        """What is owed for time that has passed."""
        with self._database.transaction() as db:
            self._owe(db, debts)

    def owe_past(self, tracker: str, *, max_series: int, debts: Iterable[Debt]) -> int:
        """A tracker that was never owed anything is owed every report that is kept, in order, and then `debts`.

        Returns how many reports that are; 0 for a tracker that is known, and while there are no reports.
        """
        lanes: tuple[LaneKind, ...] = ("numbers", "files")
        with self._database.transaction() as db:
            if any(self._is_known(db, tracker, lane) for lane in lanes):
                return 0
            reports = db.execute(
                "SELECT fingerprint, detail, committed_at FROM (SELECT * FROM checkpoints "
                "WHERE run = ? AND outcome = 'peeled' ORDER BY committed_at DESC, step DESC LIMIT ?) "
                "ORDER BY committed_at, step",
                (self.run, PAST),
            ).fetchall()
            for fingerprint, report, committed_at in reports:
                body = {"report": report, "committed_at": committed_at, "max_series": max_series}
                self._owe(db, (Debt(tracker, lane, fingerprint, body) for lane in lanes))
            if reports:
                self._owe(db, debts)
        return len(reports)

    def _is_known(self, db: sqlite3.Connection, tracker: str, lane: str) -> bool:
        """Whether the tracker was ever owed anything of this lane."""
        owed = "SELECT 1 FROM deliveries WHERE run = ? AND destination = ? AND lane = ? LIMIT 1"
        tried = "SELECT 1 FROM tallies WHERE run = ? AND what IN (?, ?) LIMIT 1"
        tallies = (f"delivered/{tracker}/{lane}", f"postponed/{tracker}/{lane}")
        rows = (db.execute(owed, (self.run, tracker, lane)), db.execute(tried, (self.run, *tallies)))
        return any(row.fetchone() is not None for row in rows)

    def _keep_verdict(self, db: sqlite3.Connection, verdict: Verdict, alert_lines: Mapping[str, str]) -> None:
        keep_rule_states(db, self.run, verdict.states)
        db.executemany(
            "INSERT OR IGNORE INTO alerts (run, id, line) VALUES (?, ?, ?)",
            [(self.run, *entry) for entry in alert_lines.items()],
        )

    def _owe(self, db: sqlite3.Connection, debts: Iterable[Debt]) -> None:
        """Freezes what is owed; the log of alerts and the history, which are made at delivery, end as they do now."""
        (position,) = db.execute("SELECT max(position) FROM alerts WHERE run = ?", (self.run,)).fetchone()
        last = "SELECT max(committed_at) FROM checkpoints WHERE run = ? AND outcome = 'peeled'"
        (until,) = db.execute(last, (self.run,)).fetchone()
        for debt in debts:
            if debt.with_history and until is None:  # nothing is known yet
                continue
            if debt.replaces:
                db.execute(
                    "DELETE FROM deliveries WHERE run = ? AND destination = ? AND lane = ? AND key = ? AND dead = 0",
                    (self.run, debt.destination, debt.lane, debt.key),
                )
            body = dict(debt.body) | ({"alerts_until": position} if debt.with_alerts else {})
            body |= {"history_until": until} if debt.with_history else {}
            db.execute(
                "INSERT INTO deliveries (run, destination, lane, key, body) VALUES (?, ?, ?, ?, ?)",
                (self.run, debt.destination, debt.lane, debt.key, json.dumps(body, allow_nan=False)),
            )

    def _report_name(self, ref: CheckpointRef) -> str:
        """By its step; with the fingerprint too when another checkpoint of that step has a report."""
        if ref.step is None:
            return f"{ref.fingerprint}.json"
        query = "SELECT 1 FROM checkpoints WHERE run = ? AND outcome = 'peeled' AND step = ? AND fingerprint != ?"
        other = self._rows(query, ref.step, ref.fingerprint)
        return f"step-{ref.step:09d}-{ref.fingerprint}.json" if other else f"step-{ref.step:09d}.json"

    def refuse(self, ref: CheckpointRef, reason: str) -> None:
        """The checkpoint cannot be used."""
        self._note(ref, "refused", reason)

    def fail(self, ref: CheckpointRef, reason: str) -> None:
        """It is given up, for good: peeling it was tried often enough."""
        self._note(ref, "failed", reason)

    def pass_over(self, ref: CheckpointRef, reason: str) -> None:
        """A newer checkpoint was peeled instead of this one."""
        self._note(ref, "passed over", reason)

    def miss(self, ref: CheckpointRef) -> None:
        """The checkpoint was whole once, and removed before it was peeled."""
        self._note(ref, "vanished", "removed before it was peeled")

    def _note(self, ref: CheckpointRef, outcome: Outcome, detail: str) -> None:
        with self._database.transaction() as db:
            self._finish(db, ref, outcome, detail)

    def _finish(self, db: sqlite3.Connection, ref: CheckpointRef, outcome: Outcome, detail: str) -> None:
        self._end_job(db, ref)
        row = (self.run, ref.fingerprint, printable(ref.label), ref.step, ref.committed_at, outcome, detail)
        db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        tally(db, self.run, outcome.replace(" ", "_"))


def tally(db: sqlite3.Connection, run: str, what: str, amount: float = 1.0) -> None:
    """Adds to a sum that outlives the agent."""
    db.execute(
        "INSERT INTO tallies VALUES (?, ?, ?) ON CONFLICT (run, what) DO UPDATE SET amount = amount + excluded.amount",
        (run, what, amount),
    )


def series(database: Database, run: str) -> frozenset[str]:
    """The keys of all metrics that a run was ever published under."""
    return frozenset(key for (key,) in database.query("SELECT key FROM series WHERE run = ?", (run,)))
