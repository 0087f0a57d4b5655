"""One connection to a ledger's SQLite file, and the care that the file needs: a lock, a copy, a way back."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from peel_agent.errors import LedgerError
from peel_agent.ledger.schema import SCHEMA_VERSION, migrate
from peel_agent.mounts import SILENT, kind_of

FILE = "ledger.sqlite"
COPY = "ledger.copy.sqlite"
DAMAGED = "ledger.damaged.sqlite"

BUSY_SECONDS = 20.0
"""How long one process waits for another's transaction."""


class Database:
    """A connection that several threads share, one statement or transaction at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = threading.RLock()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows."""
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is kept, or none."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def copy_to(self, file: Path) -> None:
        """A copy of all that is committed, whole whenever it is there."""
        part = file.with_suffix(".part")
        part.unlink(missing_ok=True)
        with self._lock:
            self._connection.execute("VACUUM INTO ?", (str(part),))
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)

    def reopen(self, state_dir: Path) -> str:
        """The last good copy takes the place of the file; what to say of that. Raises as `open_database`."""
        with self._lock:
            self._connection.close()
            repaired = _put_back_copy(state_dir)
            self._connection = _connect(state_dir / FILE)
            _choose_journal(self._connection, state_dir)
        return repaired

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def hold(state_dir: Path) -> IO[str]:
    """The lock of a state folder: two agents would count one checkpoint twice. Raises LedgerError."""
    lock = (state_dir / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise LedgerError(
            f"another peel-agent is at work with the state folder {state_dir}",
            remedy="stop it, or give this one a folder of its own with --state",
        ) from error
    return lock


def is_held(state_dir: Path) -> bool:
    """Whether an agent is at work with this state folder."""
    try:
        with (state_dir / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def open_database(state_dir: Path) -> tuple[Database, str | None]:
    """The ledger of a state folder, of this version, made when there is none; and what is to be said of its repair.

    A damaged file is put aside, and its last good copy takes its place. Raises LedgerError, OSError and sqlite3.Error.
    """
    repaired = None
    if _is_lost(state_dir) or _is_damaged(state_dir / FILE):
        repaired = _put_back_copy(state_dir)
    connection = _connect(state_dir / FILE)
    try:
        version = migrate(connection)
        _choose_journal(connection, state_dir)
    except sqlite3.Error:
        connection.close()
        raise
    if version != SCHEMA_VERSION:
        connection.close()
        raise LedgerError(
            f"{state_dir} was written by another version of peel-agent (ledger {version})",
            remedy="use that version, or give [state] path a new folder",
        )
    return Database(connection), repaired


def open_beside(state_dir: Path, *, writing: bool = False) -> Database:
    """A further connection, beside the agent's own or where none runs. Raises LedgerError."""
    file = state_dir / FILE
    if not file.exists():
        raise LedgerError(
            f"there is no ledger in {state_dir}", remedy="give the state folder of an agent with --state or -c"
        )
    try:
        is_ours = writing or os.access(state_dir, os.W_OK)
        connection = _connect(file) if is_ours else _connect_read_only(file)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise LedgerError(f"{file} cannot be read: {error}", remedy="start the agent: it repairs its ledger") from error
    if version == 0:
        connection.close()
        raise LedgerError(f"the ledger in {state_dir} is empty: its agent has just begun", remedy="ask again later")
    if version != SCHEMA_VERSION:
        connection.close()
        raise LedgerError(
            f"{state_dir} was written by another version of peel-agent (ledger {version})",
            remedy="start this version of the agent on it once, or use that version",
        )
    return Database(connection)


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _connect_read_only(file: Path) -> sqlite3.Connection:
    """A connection to a file of somebody else: without its write-ahead log, if that cannot be opened."""
    uri = f"{file.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        connection = sqlite3.connect(f"{uri}&immutable=1", uri=True, check_same_thread=False)
    return connection


def _choose_journal(connection: sqlite3.Connection, state_dir: Path) -> None:
    """A write-ahead log lets others read beside us; on a network's file system it is not safe."""
    mode = "DELETE" if kind_of(state_dir) in SILENT else "WAL"
    connection.execute(f"PRAGMA journal_mode = {mode}")


def _is_lost(state_dir: Path) -> bool:
    """Whether the file is gone, or empty, where there was a ledger: SQLite would take that for a new one."""
    file, copy = state_dir / FILE, state_dir / COPY
    if not file.exists():
        return copy.exists() and not _is_damaged(copy)
    return file.stat().st_size == 0 and (copy.exists() or (state_dir / "runs").exists())


def _is_damaged(file: Path) -> bool:
    """Whether SQLite finds the file unfit; one that cannot be opened now (no rights, no room) is not judged."""
    if not file.exists():
        return False
    connection = sqlite3.connect(file, timeout=BUSY_SECONDS)
    try:
        (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return True
    finally:
        connection.close()
    return bool(answer != "ok")


def _put_back_copy(state_dir: Path) -> str:
    """The last good copy in the place of the damaged file, which is kept beside it; what to say of it."""
    file, copy = state_dir / FILE, state_dir / COPY
    if not copy.exists() or _is_damaged(copy):
        raise LedgerError(
            f"the ledger {file} is damaged, and there is no good copy of it",
            remedy=f"move {file} away: the agent begins anew, peels again what is still there, and sends nothing twice",
        )
    for suffix in ("", "-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            file.with_name(file.name + suffix).rename(state_dir / (DAMAGED + suffix))
    part = file.with_suffix(".part")
    part.write_bytes(copy.read_bytes())
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(file)
    return (
        "the ledger was damaged or gone: its last copy was put back, and a damaged file is kept as "
        f"{state_dir / DAMAGED}; "
        "what is missing in the copy is peeled again"
    )
