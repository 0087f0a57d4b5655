"""Ledgers of earlier versions: every row and every file survives, and goes to the run that it was of."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from peel_agent.deliver import ALERTS_FILE, Carrier
from peel_agent.destinations import Address
from peel_agent.errors import LedgerError
from peel_agent.identity import run_key
from peel_agent.ledger import SCHEMA_VERSION, Lane, LastObserved, Ledger, RunLedger
from peel_agent.records import CheckpointRef, FileStamp, Memory, Publication, RuleState, plain
from peel_agent.watch import Pins
from tests.rooms.test_ledger import MEMORY, SKETCHES, YES, checkpoint, everything, opened, owed, record

PLACE = "/run"
LOG = '{"id": "n1", "layer": "model.layers.3"}\n'
SENT = Publication(5, 12_500, {"peel/loss": 1.5}, {"peel.zone": "caution"}, {ALERTS_FILE: LOG, "peel/x.json": "{}"})
LATER = dataclasses.replace(SENT, step=6, timestamp_ms=13_500)

VERSION_2 = """
CREATE TABLE checkpoints (
    fingerprint TEXT PRIMARY KEY, path TEXT NOT NULL, step INTEGER, committed_at REAL NOT NULL, outcome TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE TABLE rule_states (
    rule TEXT, layer TEXT, phase TEXT NOT NULL, streak INTEGER NOT NULL, since_step INTEGER, PRIMARY KEY (rule, layer)
);
CREATE TABLE alerts (position INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, line TEXT NOT NULL);
CREATE TABLE bound_memory (only INTEGER PRIMARY KEY CHECK (only = 1), memory TEXT NOT NULL);
CREATE TABLE outbox (position INTEGER PRIMARY KEY, tracker TEXT NOT NULL, publication TEXT NOT NULL);
PRAGMA user_version = 2;
"""
VERSION_3 = (
    VERSION_2.replace("layer TEXT", "subject TEXT")
    .replace("rule, layer", "rule, subject")
    .replace("user_version = 2", "user_version = 3")
    + """
CREATE TABLE last_observed (
    only INTEGER PRIMARY KEY CHECK (only = 1), fingerprint TEXT NOT NULL, step INTEGER, sketches TEXT
);
"""
)
"""What the versions before made, word for word."""

ROWS = """
INSERT INTO checkpoints VALUES ('f1', '/run/checkpoint-5', 5, 12.5, 'peeled', 'step-000000005.json');
INSERT INTO checkpoints VALUES ('f0', '/run/checkpoint-4', 4, 11.5, 'refused', 'why');
INSERT INTO checkpoints VALUES ('f-', '/run/checkpoint-3', 3, 10.5, 'passed over', 'backlog = latest');
INSERT INTO checkpoints VALUES ('f=', '/run/final', NULL, 14.5, 'vanished', 'removed before it was peeled');
INSERT INTO rule_states VALUES ('layer_below', 'model.layers.3', 'firing', 1, 3);
INSERT INTO rule_states VALUES ('layer_below', 'model.layers.2', 'inactive', 0, NULL);
INSERT INTO alerts (position, id, line) VALUES (4, 'n1', '{"id": "n1", "layer": "model.layers.3"}');
"""

UPDATED = "model.layers.3 fired before peel-agent was updated; the next checkpoint tells more"
"""What an alert says that fired when no words were kept of it: Alertmanager is told it again before any checkpoint."""

VERSIONS = {2: VERSION_2, 3: VERSION_3}


def of_version(folder: Path, version: int, rows: str = ROWS, *, memory: Memory = MEMORY) -> None:
    """A state folder as version 0.1 left it, with something in every table and every file beside it."""
    (folder / "reports").mkdir(parents=True)
    (folder / "reports" / "step-000000005.json").write_text('{"step": 5}\n')
    (folder / "mlflow-run.json").write_text('{"run_id": "r"}')
    (folder / "publications.jsonl").write_text("{}\n")
    with closing(sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)) as db:
        db.executescript(VERSIONS[version] + rows)
        db.execute("INSERT INTO bound_memory VALUES (1, ?)", (json.dumps(plain(memory)),))
        for sent in (SENT, LATER):
            for tracker in ("mlflow", "jsonl"):
                entry = (tracker, json.dumps(plain(sent)))
                db.execute("INSERT INTO outbox (tracker, publication) VALUES (?, ?)", entry)
        if version == 3:
            db.execute("INSERT INTO last_observed VALUES (1, 'f1', 5, ?)", (json.dumps(plain(SKETCHES)),))


def held_by_0_1(folder: Path, root: Path) -> CheckpointRef:
    """A checkpoint that version 0.1 held for the next start."""
    (root / "c" / "config.json").parent.mkdir(parents=True)
    (root / "c" / "model.safetensors").write_bytes(b"weights")
    status = (root / "c" / "model.safetensors").stat()
    stamp = FileStamp("model.safetensors", status.st_size, status.st_mtime_ns, status.st_ino)
    ref = CheckpointRef(root / "c", 9, "transformers", "f9", 20.0, (stamp,))
    return Pins(root, folder).pin(ref)


def check_all_of_it(run: RunLedger, version: int, memory: Memory) -> None:
    assert run.rule_states() == (
        RuleState("layer_below", "model.layers.2", "inactive", 0, None, ""),
        RuleState("layer_below", "model.layers.3", "firing", 1, 3, "3", UPDATED, told=1),
    )
    assert run.bound_memory() == memory
    assert [run.outcome(one) for one in ("f1", "f0", "f-", "f=")] == ["peeled", "refused", "passed over", "vanished"]
    assert run.refused() == (("/run/checkpoint-4", "why"),)
    assert run.history() == ({"step": 5},)
    assert run.last_peeled() == (5, 12.5)
    assert run.last_observed() == (LastObserved("f1", 5, SKETCHES) if version == 3 else None)
    assert run.jobs() == ()


@pytest.mark.parametrize("memory", [MEMORY, YES], ids=["transformer", "fully connected"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_row_of_an_earlier_ledger_survives(tmp_path: Path, version: int, memory: Memory) -> None:
    """Checkpoints, states, memory, what was observed last and alerts are the run's, now and at any later start."""
    of_version(tmp_path, version, memory=memory)
    for _ in range(2):  # as it is migrated, and at a later start
        with opened(tmp_path, "a-key") as run:
            check_all_of_it(run, version, memory)
        assert [row[:3] for row in everything(tmp_path)["alerts"]] == [(4, "a-key", "n1")]
    with opened(tmp_path, "a-key") as run:
        record(run, checkpoint(6, 13.5), observed=True, sketches=SKETCHES)
        assert run.last_observed() == LastObserved("f6", 6, SKETCHES)
        assert owed(tmp_path)[Lane("a-key", "mlflow", "files")].body["files"] == dict(SENT.files)  # type: ignore[union-attr]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_owed_is_sent_in_two_lanes(tmp_path: Path, version: int) -> None:
    """Each publication of the outbox is sent, in order: its numbers and tags in one lane, its files in the other."""
    of_version(tmp_path, version)
    (tmp_path / "p.jsonl").write_text("")
    with closing(Ledger(tmp_path)) as ledger:
        ledger.run("a-key", "a", PLACE)
        assert ledger.outbox.owed() == dict.fromkeys(
            [Lane("a-key", tracker, kind) for tracker in ("jsonl", "mlflow") for kind in ("files", "numbers")], (2, 0)
        )
        options = {"path": str(tmp_path / "p.jsonl")}
        address = Address("tracker", "jsonl", "jsonl", options, "a-key", PLACE, tmp_path)
        for kind in ("numbers", "files"):
            carrier = Carrier(Lane("a-key", "jsonl", kind), address, ledger.outbox, lambda: 0.0)
            while carrier.step().sent:
                pass
    sent = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    numbers = [dataclasses.replace(one, files={}) for one in (SENT, LATER)]
    files = [dataclasses.replace(one, metrics={}, tags={}) for one in (SENT, LATER)]
    assert [Publication(**one) for one in sent] == [*numbers, *files]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migrated_ledger_is_like_a_new_one(tmp_path: Path, version: int) -> None:
    """Migration leaves the tables, columns, keys and indices that a new ledger has."""
    of_version(tmp_path / "old", version)
    described = []
    for name in ("old", "new"):
        Ledger(tmp_path / name).close()
        with closing(sqlite3.connect(tmp_path / name / "ledger.sqlite")) as db:
            made = db.execute("SELECT type, name FROM sqlite_master ORDER BY 1, 2").fetchall()
            columns = "SELECT name, type, [notnull], dflt_value, pk FROM pragma_table_info(?)"
            described.append({entry: db.execute(columns, (entry[1],)).fetchall() for entry in made})
            assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert described[0] == described[1]


IN_THE_WAY = {
    2: "CREATE TABLE last_observed (in_the_way TEXT);",
    3: "CREATE TABLE deliveries (in_the_way TEXT);",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migration_that_fails_leaves_the_ledger_as_it_was(tmp_path: Path, version: int) -> None:
    """Half a migration is none: the version before can still read what it wrote, and it is told."""
    of_version(tmp_path, version)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        db.executescript(IN_THE_WAY[version])
    before = everything(tmp_path)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path)
    assert everything(tmp_path) == before
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        db.executescript(f"DROP TABLE {'last_observed' if version == 2 else 'deliveries'};")
    with opened(tmp_path, "a-key") as run:
        check_all_of_it(run, version, MEMORY)


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1, 99])
def test_a_ledger_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    """One of a later version, and one from before the first release, are neither read nor written."""
    Ledger(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(LedgerError, match=rf"another version of peel-agent \(ledger {version}\)") as caught:
        Ledger(tmp_path)
    assert "[state] path" in caught.value.remedy
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)


# ---------------------------------------------------------------- which run takes it over


def test_the_files_of_0_1_move_to_the_run(tmp_path: Path) -> None:
    """Reports, what a tracker remembers, publications and pins are in the run's folder then, a held one still held."""
    of_version(tmp_path / "state", 3)
    ref = held_by_0_1(tmp_path / "state", tmp_path / "root")
    assert ref.held is not None
    with closing(Ledger(tmp_path / "state")) as ledger:
        run = ledger.run("a-key", "a", PLACE)
    names = {"reports", "pins", "mlflow-run.json", "publications.jsonl"}
    assert {path.name for path in run.folder.iterdir()} == names
    assert not names & {path.name for path in (tmp_path / "state").iterdir()}
    assert [path.name for path in run.reports_dir.iterdir()] == ["step-000000005.json"]
    (left,) = Pins(tmp_path / "root", run.folder).left()
    assert left == dataclasses.replace(ref, held=run.folder / "pins" / "f9" / "c")
    assert (run.folder / "pins" / "f9" / "c" / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("at", range(5))
def test_a_move_that_was_cut_short_is_ended(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before the n-th of the files was moved leaves the rest to the next start."""
    of_version(tmp_path, 3)
    (tmp_path / "pins").mkdir()
    moved = 0
    real = Path.rename

    def cut(self: Path, target: Path) -> Path:
        nonlocal moved
        if moved == at:
            raise KeyboardInterrupt
        moved += 1
        return real(self, target)

    ledger = Ledger(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", cut)
        if at < 4:
            with pytest.raises(KeyboardInterrupt):
                ledger.run("a-key", "a", PLACE)
        else:
            ledger.run("a-key", "a", PLACE)
    ledger.close()
    with opened(tmp_path, "a-key") as run:
        check_all_of_it(run, 3, MEMORY)
        assert {path.name for path in run.folder.iterdir()} == {
            "reports",
            "pins",
            "mlflow-run.json",
            "publications.jsonl",
        }


@pytest.mark.parametrize("place", ["/elsewhere", "/ru", "/runs", "s3://run"])
def test_a_new_run_inherits_nothing_of_another_place(tmp_path: Path, place: str) -> None:
    """What an earlier version knew of one place is not another's, whatever is alike in their names."""
    of_version(tmp_path, 3)
    with closing(Ledger(tmp_path)) as ledger:
        run = ledger.run("other", "other", place)
        assert (run.rule_states(), run.bound_memory(), run.last_observed(), run.history()) == ((), None, None, ())
        assert not (run.folder / "mlflow-run.json").exists()
        check_all_of_it(ledger.run("a-key", "a", PLACE), 3, MEMORY)


def test_a_second_run_of_the_place_inherits_nothing(tmp_path: Path) -> None:
    """The first run of the place takes all of it; a new training in the old directory, by name, begins anew."""
    of_version(tmp_path, 3)
    with closing(Ledger(tmp_path)) as ledger:
        first = ledger.run(run_key("a", PLACE, ""), "a", PLACE)
        second = ledger.run(run_key("b", PLACE, ""), "b", PLACE)
        assert (second.rule_states(), second.bound_memory(), second.count("peeled")) == ((), None, 0)
        check_all_of_it(first, 3, MEMORY)
        assert {lane.run for lane in ledger.outbox.lanes()} == {first.run}


def test_what_an_earlier_version_had_to_say_is_sent(tmp_path: Path) -> None:
    """An entry of the outbox with a key that this version does not know is sent like any other."""
    of_version(tmp_path, 3)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM outbox")
        form = {**plain(SENT), "colour": "green"}
        db.execute("INSERT INTO outbox (tracker, publication) VALUES ('jsonl', ?)", (json.dumps(form),))
    with closing(Ledger(tmp_path)) as ledger:
        ledger.run("a-key", "a", PLACE)
        address = Address("tracker", "jsonl", "jsonl", {}, "a-key", PLACE, tmp_path)
        for kind in ("numbers", "files"):
            assert Carrier(Lane("a-key", "jsonl", kind), address, ledger.outbox, lambda: 0.0).step().sent
