"""The ledger: what is recorded survives, all of it or nothing."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from peel_agent.errors import ConfigurationError
from peel_agent.ledger import HISTORY, SCHEMA_VERSION, LastObserved, Ledger
from peel_agent.records import (
    Best,
    BoundMemory,
    CheckpointRef,
    Memory,
    Publication,
    RuleState,
    Sketches,
    Verdict,
    YesMemory,
)

REF = CheckpointRef(Path("/run/checkpoint-5"), 5, "transformers", "f1", 12.5)
MEMORY = BoundMemory("probe", 1.5, (1.25, 1.75), {"head": 1.5})
VERDICT = Verdict((RuleState("r", "layer", "pending", 1, 5),), ())
SENT = Publication(5, 12_500, {"peel/loss": 1.5}, {"peel.zone": "caution"}, {"peel/alerts.jsonl": "x\n"})
YES = YesMemory("probe", "(4, 3) biased full", (Best((), 1.0, (1.0, 2.0), True), Best((1,), 0.5, (0.5, 1.0), False)))
SKETCHES = Sketches({"model.layers.0.w": "AACAPw=="}, {"model.layers.0.w": (3, 1)}, "bfloat16")


def record(
    ledger: Ledger,
    ref: CheckpointRef = REF,
    *,
    report: str = "{}",
    memory: Memory | None = MEMORY,
    observed: bool = False,
    sketches: Sketches | None = None,
) -> Path:
    return ledger.record(
        ref,
        report=report,
        verdict=VERDICT,
        alert_lines={"n1": '{"id": "n1"}'},
        memory=memory,
        publications={"mlflow": SENT, "jsonl": SENT},
        observed=observed,
        sketches=sketches,
    )


@contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    """The ledger of a process that starts and ends."""
    with closing(Ledger(folder)) as ledger:
        yield ledger


def checkpoint(step: int | None, committed_at: float, fingerprint: str = "") -> CheckpointRef:
    return CheckpointRef(Path(f"/run/{step}"), step, "transformers", fingerprint or f"f{step}", committed_at)


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    """A second process finds the checkpoint, the states, the alerts and the outbox."""
    first = Ledger(tmp_path)
    path = record(first)
    first.close()
    again = Ledger(tmp_path)
    assert again.outcome("f1") == "peeled"
    assert again.outcome("f2") is None
    assert again.count("peeled") == 1
    assert again.rule_states() == VERDICT.states
    assert again.bound_memory() == MEMORY
    assert again.alerts_log() == '{"id": "n1"}\n'
    assert [publication for _, publication in again.waiting("mlflow")] == [SENT]
    assert path == tmp_path / "reports" / "step-000000005.json"
    assert path.read_text() == "{}\n"
    again.close()


def test_sent_leaves_only_that_tracker_s_outbox(tmp_path: Path) -> None:
    """What one tracker took still waits for the other."""
    ledger = Ledger(tmp_path)
    record(ledger)
    ((receipt, _),) = ledger.waiting("mlflow")
    ledger.sent(receipt)
    assert ledger.waiting("mlflow") == ()
    assert len(ledger.waiting("jsonl")) == 1
    ledger.close()


def test_all_or_nothing(tmp_path: Path) -> None:
    """When the outbox cannot be written, the checkpoint does not count as done."""
    ledger = Ledger(tmp_path)
    ledger._db.execute("DROP TABLE outbox")
    with pytest.raises(sqlite3.OperationalError, match="outbox"):
        record(ledger)
    assert ledger.outcome("f1") is None
    assert ledger.rule_states() == ()
    ledger.close()


def test_refused_is_done_but_not_peeled(tmp_path: Path) -> None:
    """A checkpoint that cannot be used is not tried for ever."""
    ledger = Ledger(tmp_path)
    ledger.refuse(REF, "why")
    assert ledger.outcome("f1") == "refused"
    assert ledger.count("peeled") == 0
    ledger.close()


def test_a_checkpoint_without_step_has_a_report_of_its_own(tmp_path: Path) -> None:
    """Its fingerprint names the report."""
    ledger = Ledger(tmp_path)
    assert record(ledger, CheckpointRef(Path("/m"), None, "safetensors", "abc", 1.0)).name == "abc.json"
    ledger.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A second sidecar on the same state is refused while the first is there, and not after."""
    first = Ledger(tmp_path)
    with pytest.raises(ConfigurationError, match="another peel-agent is at work"):
        Ledger(tmp_path)
    first.close()
    Ledger(tmp_path).close()


def test_refusals_are_told_again(tmp_path: Path) -> None:
    """Why a checkpoint cannot be used is kept."""
    ledger = Ledger(tmp_path)
    ledger.refuse(REF, "why")
    assert ledger.refused() == ((str(REF.path), "why"),)
    ledger.close()


def test_unusable_folder(tmp_path: Path) -> None:
    """A state folder that is a file, and one of another version, are configuration errors with a remedy."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Ledger(tmp_path / "file")
    Ledger(tmp_path / "old").close()
    with sqlite3.connect(tmp_path / "old" / "ledger.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigurationError, match="another version"):
        Ledger(tmp_path / "old")


@pytest.mark.parametrize("memory", [MEMORY, YES], ids=["transformer", "fully connected"])
def test_both_kinds_of_memory_come_back(tmp_path: Path, memory: Memory) -> None:
    """What a transformer's checkpoint hands on, and what a fully connected network's does, survive as they are."""
    with opened(tmp_path) as ledger:
        record(ledger, memory=memory)
    with opened(tmp_path) as ledger:
        assert ledger.bound_memory() == memory


@pytest.mark.parametrize("sketches", [SKETCHES, None], ids=["with sketches", "without"])
def test_what_was_observed_last_survives_a_restart(tmp_path: Path, sketches: Sketches | None) -> None:
    """The next process knows the checkpoint that was judged last, by fingerprint and step, and its sketches."""
    with opened(tmp_path) as ledger:
        assert ledger.last_observed() is None
        record(ledger, checkpoint(4, 1.0), observed=True, sketches=Sketches({}, {}, "float32"))
        record(ledger, checkpoint(5, 2.0), observed=True, sketches=sketches)
    with opened(tmp_path) as ledger:
        assert ledger.last_observed() == LastObserved("f5", 5, sketches)


def test_only_an_observation_takes_the_place_of_the_last(tmp_path: Path) -> None:
    """A checkpoint that came late, and one that was refused, leave what the next one is held against."""
    with opened(tmp_path) as ledger:
        record(ledger, checkpoint(5, 2.0), observed=True, sketches=SKETCHES)
        record(ledger, checkpoint(3, 1.0), observed=False, sketches=Sketches({}, {}, "float32"))
        ledger.refuse(checkpoint(7, 3.0), "why")
        assert ledger.last_observed() == LastObserved("f5", 5, SKETCHES)


def test_observed_is_all_or_nothing_too(tmp_path: Path) -> None:
    """When the outbox cannot be written, the checkpoint before is still the one observed last."""
    with opened(tmp_path) as ledger:
        record(ledger, checkpoint(4, 1.0), observed=True, sketches=SKETCHES)
        ledger._db.execute("DROP TABLE outbox")
        with pytest.raises(sqlite3.OperationalError, match="outbox"):
            record(ledger, checkpoint(5, 2.0), observed=True)
        assert ledger.last_observed() == LastObserved("f4", 4, SKETCHES)


def test_history_is_in_the_order_of_writing(tmp_path: Path) -> None:
    """Reports come back in the order in which their checkpoints were written, whatever the order of peeling and steps;
    of two written in one second the later step comes last. Those without a step, and what was not peeled, are left out.
    """
    with opened(tmp_path) as ledger:
        assert ledger.history() == ()
        for step, committed_at, fingerprint in (
            (300, 30.0, "a"),
            (100, 10.0, "b"),
            (None, 15.0, "c"),
            (200, 20.0, "d"),
            (150, 20.0, "g"),
            (200, 40.0, "e"),  # the run went back, and wrote step 200 again
            (None, 50.0, "f"),
        ):
            ref = checkpoint(step, committed_at, fingerprint)
            record(ledger, ref, report=json.dumps({"fingerprint": fingerprint, "step": step}))
        ledger.refuse(checkpoint(400, 45.0), "why")
    with opened(tmp_path) as ledger:
        assert [(form["fingerprint"], form["step"]) for form in ledger.history()] == [
            ("b", 100),
            ("g", 150),
            ("d", 200),
            ("a", 300),
            ("e", 200),
        ]


def test_history_is_short_and_misses_no_file_that_is_gone(tmp_path: Path) -> None:
    """The newest reports are enough; one that somebody removed is passed over."""
    with opened(tmp_path) as ledger:
        paths = [record(ledger, checkpoint(s, float(s)), report=json.dumps({"step": s})) for s in range(HISTORY + 5)]
        paths[-2].unlink()
        steps = [form["step"] for form in ledger.history()]
    assert steps == [step for step in range(5, HISTORY + 5) if step != HISTORY + 3]


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
INSERT INTO checkpoints VALUES ('f1', '/run/checkpoint-5', 5, 12.5, 'peeled', 'step-000000005.json');
INSERT INTO checkpoints VALUES ('f0', '/run/checkpoint-4', 4, 11.5, 'refused', 'why');
INSERT INTO rule_states VALUES ('layer_below', 'model.layers.3', 'firing', 1, 3);
INSERT INTO rule_states VALUES ('layer_below', 'model.layers.2', 'inactive', 0, NULL);
INSERT INTO alerts (id, line) VALUES ('n1', '{"id": "n1", "layer": "model.layers.3"}');
PRAGMA user_version = 2;
"""
"""What the version before wrote, word for word."""


@pytest.mark.parametrize("memory", [MEMORY, YES], ids=["transformer", "fully connected"])
def test_a_ledger_of_version_2_is_kept(tmp_path: Path, memory: Memory) -> None:
    """The ledger of the version before opens with everything in it, is of this version from then on, and works."""
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "step-000000005.json").write_text('{"step": 5}\n')
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as db:
        db.executescript(VERSION_2)
        db.execute("INSERT INTO bound_memory VALUES (1, ?)", (json.dumps(dataclasses.asdict(memory)),))
        outbox = "INSERT INTO outbox (tracker, publication) VALUES ('mlflow', ?)"
        db.execute(outbox, (json.dumps(dataclasses.asdict(SENT)),))
    for _ in range(2):  # as it is migrated, and at a later start
        with opened(tmp_path) as ledger:
            assert ledger._db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,) == (3,)
            assert ledger.rule_states() == (
                RuleState("layer_below", "model.layers.2", "inactive", 0, None),
                RuleState("layer_below", "model.layers.3", "firing", 1, 3),
            )
            assert ledger.alerts_log() == '{"id": "n1", "layer": "model.layers.3"}\n'
            assert ledger.bound_memory() == memory
            assert [publication for _, publication in ledger.waiting("mlflow")] == [SENT]
            assert (ledger.outcome("f1"), ledger.outcome("f0")) == ("peeled", "refused")
            assert ledger.refused() == (("/run/checkpoint-4", "why"),)
            assert ledger.history() == ({"step": 5},)
            assert ledger.last_observed() is None
    with opened(tmp_path) as ledger:
        record(ledger, checkpoint(6, 13.5), observed=True, sketches=SKETCHES)
        assert ledger.rule_states() == VERDICT.states
        assert ledger.last_observed() == LastObserved("f6", 6, SKETCHES)


def test_a_migrated_ledger_is_like_a_new_one(tmp_path: Path) -> None:
    """Migration leaves the tables, columns and keys that a new ledger has."""
    (tmp_path / "old").mkdir()
    with closing(sqlite3.connect(tmp_path / "old" / "ledger.sqlite", isolation_level=None)) as db:
        db.executescript(VERSION_2)
    described = []
    for name in ("old", "new"):
        with opened(tmp_path / name) as ledger:
            tables = ledger._db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
            columns = "SELECT name, type, [notnull], pk FROM pragma_table_info(?)"
            described.append({name: ledger._db.execute(columns, (name,)).fetchall() for (name,) in tables})
    assert described[0] == described[1]


def test_a_migration_that_fails_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    """Half a migration is none: the version before can still read what it wrote."""
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as db:
        db.executescript(VERSION_2 + "CREATE TABLE last_observed (in_the_way TEXT);")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Ledger(tmp_path)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert len(db.execute("SELECT rule, layer FROM rule_states").fetchall()) == 2


def test_what_an_earlier_version_had_to_say_is_sent(tmp_path: Path) -> None:
    """An outbox entry with a key that this version does not know, or without one that has a default, is sent."""
    with opened(tmp_path) as ledger:
        for form in (
            {**dataclasses.asdict(SENT), "colour": "green"},
            {key: value for key, value in dataclasses.asdict(SENT).items() if key != "files"},
        ):
            entry = ("mlflow", json.dumps(form))
            ledger._db.execute("INSERT INTO outbox (tracker, publication) VALUES (?, ?)", entry)
        sent = [publication for _, publication in ledger.waiting("mlflow")]
    assert sent == [SENT, dataclasses.replace(SENT, files={})]
