"""What must survive a restart, in one SQLite file: checkpoints done, rule states, alerts, and the outbox.

A checkpoint's report, the states it left, its alerts and everything to be sent are committed in one transaction before
the checkpoint counts as done. Sent items leave the outbox only after the tracker took them.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from peel_agent.errors import ConfigurationError, printable
from peel_agent.records import (
    CheckpointRef,
    Memory,
    Publication,
    RuleState,
    Sketches,
    Verdict,
    decoded,
    plain,
    restored,
)

Outcome = Literal["peeled", "refused", "passed over", "vanished"]

SCHEMA_VERSION = 3

_TABLES = """
CREATE TABLE checkpoints (
    fingerprint TEXT PRIMARY KEY, path TEXT NOT NULL, step INTEGER, committed_at REAL NOT NULL, outcome TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE TABLE rule_states (
    rule TEXT, subject TEXT, phase TEXT NOT NULL, streak INTEGER NOT NULL, since_step INTEGER,
    PRIMARY KEY (rule, subject)
);
CREATE TABLE alerts (position INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, line TEXT NOT NULL);
CREATE TABLE bound_memory (only INTEGER PRIMARY KEY CHECK (only = 1), memory TEXT NOT NULL);
CREATE TABLE outbox (position INTEGER PRIMARY KEY, tracker TEXT NOT NULL, publication TEXT NOT NULL);
CREATE TABLE last_observed (
    only INTEGER PRIMARY KEY CHECK (only = 1), fingerprint TEXT NOT NULL, step INTEGER, sketches TEXT
);
"""

_MIGRATIONS = {
    2: """
ALTER TABLE rule_states RENAME COLUMN layer TO subject;
CREATE TABLE last_observed (
    only INTEGER PRIMARY KEY CHECK (only = 1), fingerprint TEXT NOT NULL, step INTEGER, sketches TEXT
);
""",
}
"""What brings a ledger of each version to the next one."""

HISTORY = 12
"""The reports before a checkpoint that it is diagnosed beside."""


@dataclass(frozen=True)
class LastObserved:
    """The checkpoint that was judged last: what the next one is held against."""

    fingerprint: str
    step: int | None
    sketches: Sketches | None


class Ledger:
    """The ledger of one watched directory, in `state_dir`/ledger.sqlite; reports lie beside it as JSON files."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.reports_dir = state_dir / "reports"
        try:
            self.reports_dir.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._db = sqlite3.connect(state_dir / "ledger.sqlite", isolation_level=None)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(
                f"the state folder {state_dir} cannot be used: {error}",
                remedy="give [state] path (or --state) a folder that this user can write to",
            ) from error

    def _hold(self) -> None:
        """Only one process uses a state folder at a time: two would count one checkpoint twice."""
        self._lock = (self.state_dir / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigurationError(
                f"another peel-agent is at work with the state folder {self.state_dir}",
                remedy="stop it, or give this one a folder of its own with --state",
            ) from error

    def _prepare(self) -> None:
        try:
            version = self._migrate()
        except sqlite3.Error:
            self.close()
            raise
        if version != SCHEMA_VERSION:
            self.close()
            raise ConfigurationError(
                f"{self.state_dir} was written by another version of peel-agent (ledger {version})",
                remedy="use that version, or give [state] path a new folder",
            )

    def _migrate(self) -> int:
        """The ledger's version, once a new one has its tables and one of an earlier version is migrated."""
        self._db.execute("PRAGMA synchronous = FULL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            return SCHEMA_VERSION
        while version in _MIGRATIONS:
            self._db.executescript(f"BEGIN; {_MIGRATIONS[version]} PRAGMA user_version = {version + 1}; COMMIT;")
            version += 1
        return int(version)

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def outcome(self, fingerprint: str) -> Outcome | None:
        """What became of this checkpoint, None for an unknown one."""
        row = self._db.execute("SELECT outcome FROM checkpoints WHERE fingerprint = ?", (fingerprint,)).fetchone()
        return None if row is None else cast(Outcome, row[0])

    def count(self, outcome: Outcome) -> int:
        """How many checkpoints came to this."""
        (count,) = self._db.execute("SELECT count(*) FROM checkpoints WHERE outcome = ?", (outcome,)).fetchone()
        return int(count)

    def is_late(self, ref: CheckpointRef) -> bool:
        """Whether a checkpoint of a later step, written later, has been peeled already."""
        query = (
            "SELECT step, committed_at FROM checkpoints WHERE outcome = 'peeled' AND step IS NOT NULL "
            "ORDER BY committed_at DESC LIMIT 1"
        )
        newest = self._db.execute(query).fetchone()
        return newest is not None and ref.step is not None and ref.step < newest[0] and ref.committed_at < newest[1]

    def refused(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of every checkpoint that could not be used."""
        query = "SELECT path, detail FROM checkpoints WHERE outcome = 'refused' ORDER BY step, path"
        return tuple(self._db.execute(query))

    def rule_states(self) -> tuple[RuleState, ...]:
        rows = self._db.execute(
            "SELECT rule, subject, phase, streak, since_step FROM rule_states ORDER BY rule, subject"
        )
        return tuple(RuleState(*row) for row in rows)

    def alerts_log(self) -> str:
        """Every alert so far, one JSON object a line."""
        return "".join(f"{line}\n" for (line,) in self._db.execute("SELECT line FROM alerts ORDER BY position"))

    def bound_memory(self) -> Memory | None:
        """The running minimum of the bounds, None before the first."""
        row = self._db.execute("SELECT memory FROM bound_memory").fetchone()
        return None if row is None else decoded(Memory, json.loads(row[0]))

    def last_observed(self) -> LastObserved | None:
        """The checkpoint that was judged last, None before the first."""
        row = self._db.execute("SELECT fingerprint, step, sketches FROM last_observed").fetchone()
        if row is None:
            return None
        return LastObserved(row[0], row[1], None if row[2] is None else restored(Sketches, json.loads(row[2])))

    def history(self) -> tuple[dict[str, Any], ...]:
        """The JSON forms of the last reports of checkpoints with a step, in the order in which those were written."""
        query = (
            "SELECT detail FROM checkpoints WHERE outcome = 'peeled' AND step IS NOT NULL "
            "ORDER BY committed_at DESC, step DESC LIMIT ?"
        )
        files = [self.reports_dir / name for (name,) in self._db.execute(query, (HISTORY,))]
        forms = (_read(file) for file in reversed(files))
        return tuple(form for form in forms if form is not None)

    def record(
        self,
        ref: CheckpointRef,
        *,
        report: str,
        verdict: Verdict,
        alert_lines: Mapping[str, str],
        memory: Memory | None,
        publications: Mapping[str, Publication],
        observed: bool = False,
        sketches: Sketches | None = None,
    ) -> Path:
        """Makes one peeled checkpoint final, and returns the path of its report.

        `alert_lines` maps notice ids to lines, `publications` trackers to what they are to get. The next checkpoint is
        held against one that was `observed`, by its files or its `sketches`.
        """
        path = self.reports_dir / self._report_name(ref)
        write_durably(path, report + "\n")
        with _transaction(self._db):
            self._finish(ref, "peeled", path.name)
            self._db.execute("DELETE FROM rule_states")
            self._db.executemany(
                "INSERT INTO rule_states VALUES (?, ?, ?, ?, ?)",
                [(s.rule, s.subject, s.phase, s.streak, s.since_step) for s in verdict.states],
            )
            self._db.executemany("INSERT OR IGNORE INTO alerts (id, line) VALUES (?, ?)", alert_lines.items())
            if memory is not None:
                self._db.execute("INSERT OR REPLACE INTO bound_memory VALUES (1, ?)", (_dumped(memory),))
            if observed:
                kept = (ref.fingerprint, ref.step, None if sketches is None else json.dumps(plain(sketches)))
                self._db.execute("INSERT OR REPLACE INTO last_observed VALUES (1, ?, ?, ?)", kept)
            self._db.executemany(
                "INSERT INTO outbox (tracker, publication) VALUES (?, ?)",
                [(name, _dumped(publication)) for name, publication in publications.items()],
            )
        return path

    def _report_name(self, ref: CheckpointRef) -> str:
        """By its step; with the fingerprint too when another checkpoint of that step has a report."""
        if ref.step is None:
            return f"{ref.fingerprint}.json"
        query = "SELECT 1 FROM checkpoints WHERE outcome = 'peeled' AND step = ? AND fingerprint != ?"
        other = self._db.execute(query, (ref.step, ref.fingerprint)).fetchone()
        return f"step-{ref.step:09d}-{ref.fingerprint}.json" if other else f"step-{ref.step:09d}.json"

    def refuse(self, ref: CheckpointRef, reason: str) -> None:
        """Remembers that this checkpoint cannot be used, so that it is told once."""
        self._note(ref, "refused", reason)

    def pass_over(self, ref: CheckpointRef, reason: str) -> None:
        """Remembers that a newer checkpoint was peeled instead of this one."""
        self._note(ref, "passed over", reason)

    def miss(self, ref: CheckpointRef) -> None:
        """Remembers that this checkpoint was whole once, and removed before it was peeled."""
        self._note(ref, "vanished", "removed before it was peeled")

    def _note(self, ref: CheckpointRef, outcome: Outcome, detail: str) -> None:
        with _transaction(self._db):
            self._finish(ref, outcome, detail)

    def _finish(self, ref: CheckpointRef, outcome: Outcome, detail: str) -> None:
        row = (ref.fingerprint, printable(ref.label), ref.step, ref.committed_at, outcome, detail)
        self._db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?)", row)

    def waiting(self, tracker: str) -> tuple[tuple[int, Publication], ...]:
        """What this tracker has not taken yet, oldest first, each with its receipt."""
        query = "SELECT position, publication FROM outbox WHERE tracker = ? ORDER BY position"
        rows = self._db.execute(query, (tracker,))
        return tuple((position, restored(Publication, json.loads(text))) for position, text in rows)

    def sent(self, receipt: int) -> None:
        """The tracker took it: it leaves the outbox."""
        with _transaction(self._db):
            self._db.execute("DELETE FROM outbox WHERE position = ?", (receipt,))


def _read(file: Path) -> dict[str, Any] | None:
    """A report's JSON form; None for one that was removed or damaged, which only the diagnosis misses."""
    try:
        form = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return form if isinstance(form, dict) else None


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One transaction: all of it is kept, or none."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def write_durably(path: Path, text: str) -> None:
    """The file has all of the text or its old content, whatever happens: temporary file, fsync, rename, fsync."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _dumped(record: Publication | Memory) -> str:
    return json.dumps(plain(record), allow_nan=False)
