"""The ledger's tables, and what brings those of an earlier version to this one."""

from __future__ import annotations

import sqlite3

SCHEMA_VERSION = 7

_CHECKPOINTS = """
CREATE TABLE checkpoints (
    run TEXT NOT NULL, fingerprint TEXT NOT NULL, path TEXT NOT NULL, step INTEGER, committed_at REAL NOT NULL,
    outcome TEXT NOT NULL, detail TEXT NOT NULL, PRIMARY KEY (run, fingerprint)
);
"""
_RULE_STATES = """
CREATE TABLE rule_states (
    run TEXT NOT NULL, rule TEXT NOT NULL, subject TEXT NOT NULL, phase TEXT NOT NULL, streak INTEGER NOT NULL,
    since_step INTEGER, PRIMARY KEY (run, rule, subject)
);
"""
_RULE_STATES_5 = """
CREATE TABLE rule_states (
    run TEXT NOT NULL, rule TEXT NOT NULL, subject TEXT NOT NULL, phase TEXT NOT NULL, streak INTEGER NOT NULL,
    since_step INTEGER, began TEXT NOT NULL, words TEXT NOT NULL, causes TEXT NOT NULL, severity TEXT NOT NULL,
    told INTEGER NOT NULL, untold INTEGER NOT NULL, PRIMARY KEY (run, rule, subject)
);
"""
_NEW_IN_6 = "ALTER TABLE rule_states ADD COLUMN kind TEXT NOT NULL DEFAULT '';\n"
_NEW_IN_7 = "CREATE TABLE series (run TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (run, key));\n"
_ALERTS = """
CREATE TABLE alerts (
    position INTEGER PRIMARY KEY, run TEXT NOT NULL, id TEXT NOT NULL, line TEXT NOT NULL, UNIQUE (run, id)
);
"""
_BOUND_MEMORY = "CREATE TABLE bound_memory (run TEXT PRIMARY KEY, memory TEXT NOT NULL);\n"
_LAST_OBSERVED = """
CREATE TABLE last_observed (run TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, step INTEGER, sketches TEXT);
"""
_NEW_IN_4 = """
CREATE TABLE runs (run TEXT PRIMARY KEY, name TEXT NOT NULL, place TEXT NOT NULL, ended INTEGER NOT NULL DEFAULT 0);
CREATE TABLE jobs (
    run TEXT NOT NULL, fingerprint TEXT NOT NULL, ref TEXT NOT NULL, state TEXT NOT NULL, deaths INTEGER NOT NULL,
    interruptions INTEGER NOT NULL, not_before REAL NOT NULL, answer TEXT, PRIMARY KEY (run, fingerprint)
);
CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, destination TEXT NOT NULL, lane TEXT NOT NULL, key TEXT NOT NULL,
    body TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, next_try REAL NOT NULL DEFAULT 0, why TEXT,
    dead INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX deliveries_in_order ON deliveries (run, destination, lane, dead, id);
CREATE TABLE tallies (run TEXT NOT NULL, what TEXT NOT NULL, amount REAL NOT NULL, PRIMARY KEY (run, what));
CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, run TEXT, kind TEXT NOT NULL, level TEXT NOT NULL,
    step INTEGER, words TEXT NOT NULL
);
"""

_NEW_IN_5 = """
CREATE TABLE silences (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, rule TEXT NOT NULL, subject TEXT NOT NULL, until REAL NOT NULL,
    why TEXT NOT NULL
);
CREATE TABLE training_loss (run TEXT NOT NULL, step INTEGER NOT NULL, value REAL NOT NULL, PRIMARY KEY (run, step));
CREATE TABLE training (run TEXT PRIMARY KEY, status TEXT NOT NULL);
"""

TABLES = (
    _CHECKPOINTS
    + _RULE_STATES_5
    + _ALERTS
    + _BOUND_MEMORY
    + _LAST_OBSERVED
    + _NEW_IN_4
    + _NEW_IN_5
    + _NEW_IN_6
    + _NEW_IN_7
)

UNCLAIMED = ""
"""The run of what a ledger of one watched place held: the first run that watches that place takes it over."""


def _moved(table: str, create: str, columns: str) -> str:
    """SQL that gives a table of one run a column for the run."""
    return (
        f"ALTER TABLE {table} RENAME TO old_{table};{create}"
        f"INSERT INTO {table} (run, {columns}) SELECT '', {columns} FROM old_{table};"
        f"DROP TABLE old_{table};"
    )


_TO_4 = (
    _moved("checkpoints", _CHECKPOINTS, "fingerprint, path, step, committed_at, outcome, detail")
    + _moved("rule_states", _RULE_STATES, "rule, subject, phase, streak, since_step")
    + _moved("alerts", _ALERTS, "position, id, line")
    + _moved("bound_memory", _BOUND_MEMORY, "memory")
    + _moved("last_observed", _LAST_OBSERVED, "fingerprint, step, sketches")
    + _NEW_IN_4
    + """
INSERT INTO deliveries (run, destination, lane, key, body)
    SELECT '', tracker, 'numbers', 'outbox-' || position, json_set(publication, '$.files', json('{}'))
    FROM outbox ORDER BY position;
INSERT INTO deliveries (run, destination, lane, key, body)
    SELECT '', tracker, 'files', 'outbox-' || position,
        json_set(publication, '$.metrics', json('{}'), '$.tags', json('{}'))
    FROM outbox ORDER BY position;
DROP TABLE outbox;
"""
)

_MIGRATIONS = {
    2: """
ALTER TABLE rule_states RENAME COLUMN layer TO subject;
CREATE TABLE last_observed (
    only INTEGER PRIMARY KEY CHECK (only = 1), fingerprint TEXT NOT NULL, step INTEGER, sketches TEXT
);
""",
    3: _TO_4,
    4: f"""
ALTER TABLE rule_states RENAME TO old_rule_states;{_RULE_STATES_5}
INSERT INTO rule_states
    SELECT run, rule, subject, phase, streak, since_step, coalesce(since_step, ''),
        iif(phase = 'firing', subject || ' fired before peel-agent was updated; the next checkpoint tells more', ''),
        '[]', 'warning', phase = 'firing', 0
    FROM old_rule_states;
DROP TABLE old_rule_states;{_NEW_IN_5}""",
    5: _NEW_IN_6,
    6: _NEW_IN_7,
}
"""What brings a ledger of each version to the next one; 2 is that of the first version that was released."""


def migrate(db: sqlite3.Connection) -> int:
    """The ledger's version, once a new one has its tables and one of an earlier version is migrated."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version == 0:
        db.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        return SCHEMA_VERSION
    while version in _MIGRATIONS:
        try:
            db.executescript(f"BEGIN; {_MIGRATIONS[version]} PRAGMA user_version = {version + 1}; COMMIT;")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        version += 1
    return int(version)
