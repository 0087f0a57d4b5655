"""The agent's own hold on its ledger."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

from peel_agent.errors import LedgerError
from peel_agent.ledger.database import COPY, FILE, hold, open_database
from peel_agent.ledger.outbox import Outbox
from peel_agent.ledger.run import RunLedger
from peel_agent.ledger.schema import UNCLAIMED
from peel_agent.records import Event

EVENTS_KEPT = 2000
CHECKPOINTS_KEPT = 20_000
"""Rows of checkpoints that came to nothing which are kept a run; those of peeled ones and all alerts are kept."""

_MOVED = ("reports", "pins", "mirror", "mlflow-run.json", "publications.jsonl")
"""What version 0.1 kept in the state folder itself, which holds several runs now."""


class Ledger:
    """The ledger in `state_dir`, held by one agent at a time. `repaired` says so when a damaged one was mended."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            self._lock = hold(state_dir)
            try:
                self._database, self.repaired = open_database(state_dir)
            except BaseException:
                self._lock.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(
                f"the state folder {state_dir} cannot be used: {error}",
                remedy="give [state] path (or --state) a folder that this user can write to, with room",
            ) from error
        self.outbox = Outbox(self._database)
        self._copied_at: float | None = None

    def run(self, key: str, name: str, place: str) -> RunLedger:
        """The part of a run; one that is new here takes over what an unnamed run of the same place left."""
        folder = self.state_dir / "runs" / key
        (folder / "reports").mkdir(parents=True, exist_ok=True)
        with self._database.transaction() as db:
            is_new = db.execute("SELECT 1 FROM runs WHERE run = ?", (key,)).fetchone() is None
            sql = "INSERT INTO runs (run, name, place) VALUES (?, ?, ?) ON CONFLICT (run) DO UPDATE SET ended = 0"
            db.execute(sql, (key, name, place))
            unclaimed = "SELECT path FROM checkpoints WHERE run = ? LIMIT 1"
            row = db.execute(unclaimed, (UNCLAIMED,)).fetchone() if is_new else None
            if row is not None and _is_in(row[0], place):
                for table in ("checkpoints", "rule_states", "alerts", "bound_memory", "last_observed", "deliveries"):
                    db.execute(f"UPDATE {table} SET run = ? WHERE run = ?", (key, UNCLAIMED))  # noqa: S608
        self._move_in(folder)
        return RunLedger(self._database, key, folder)

    def _move_in(self, folder: Path) -> None:
        """Files of version 0.1 go to the run that took over its rows; a move that was cut short is ended."""
        claimed = not self._database.query("SELECT 1 FROM checkpoints WHERE run = ? LIMIT 1", (UNCLAIMED,))
        for name in _MOVED if claimed else ():
            old, new = self.state_dir / name, folder / name
            if name == "reports" and old.is_dir():
                for file in old.iterdir():
                    file.rename(new / file.name)
                old.rmdir()
            elif old.exists() and not new.exists():
                old.rename(new)

    def others(self, keys: tuple[str, ...]) -> tuple[tuple[str, str, str], ...]:
        """Key, name and place of runs that were watched here, have not ended, and are not among these."""
        rows = self._database.query("SELECT run, name, place FROM runs WHERE ended = 0 ORDER BY run")
        return tuple(row for row in rows if row[0] not in keys)

    def owing(self, keys: tuple[str, ...]) -> tuple[tuple[str, str, str], ...]:
        """Key, name and place of runs that have ended and still owe something, and are not among these."""
        rows = self._database.query(
            "SELECT run, name, place FROM runs WHERE ended = 1 AND run IN (SELECT run FROM deliveries WHERE dead = 0)"
        )
        return tuple(row for row in rows if row[0] not in keys)

    def end(self, run: RunLedger) -> None:
        """The run is not watched any more."""
        with self._database.transaction() as db:
            db.execute("UPDATE runs SET ended = 1 WHERE run = ?", (run.run,))
            db.execute("DELETE FROM jobs WHERE run = ?", (run.run,))

    def note(self, event: Event) -> None:
        """Keeps an event for those who ask later; without room for it, it is only in the log."""
        row = (event.at, event.run, event.kind, event.level, event.step, event.words)
        with suppress(sqlite3.Error), self._database.transaction() as db:
            db.execute("INSERT INTO events (at, run, kind, level, step, words) VALUES (?, ?, ?, ?, ?, ?)", row)

    def tend(self, now: float, *, every: float) -> None:
        """Copies the ledger when the last copy is older than `every` seconds, and drops what nobody will ask for."""
        if self._copied_at is not None and 0 <= now - self._copied_at < every:
            return
        with self._database.transaction() as db:
            db.execute("DELETE FROM events WHERE position <= (SELECT max(position) FROM events) - ?", (EVENTS_KEPT,))
            db.execute(
                "DELETE FROM checkpoints WHERE outcome != 'peeled' "
                "AND rowid <= (SELECT max(rowid) FROM checkpoints) - ?",
                (CHECKPOINTS_KEPT,),
            )
        self._database.copy_to(self.state_dir / COPY)
        self._copied_at = now

    def mend(self) -> str | None:
        """Puts the last copy in the place of a ledger that is damaged; what to say of that, None when it is sound."""
        if self.is_sound():
            return None
        return self._database.reopen(self.state_dir)

    def is_sound(self) -> bool:
        """Whether SQLite still finds the file whole."""
        try:
            return bool(self._database.query("PRAGMA quick_check(1)")[0][0] == "ok")
        except sqlite3.OperationalError:
            return (self.state_dir / FILE).exists()
        except sqlite3.DatabaseError:
            return False

    def close(self) -> None:
        self._database.close()
        self._lock.close()


def _is_in(path: str, place: str) -> bool:
    """Whether a checkpoint's path or URL is that of the place, or in it."""
    place = place.rstrip("/")
    return path == place or path.startswith(f"{place}/")
