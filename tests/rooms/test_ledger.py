"""The ledger: what is recorded survives, all of it or nothing."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path

import pytest

from peel_agent.errors import ConfigurationError
from peel_agent.ledger import Ledger
from peel_agent.records import Best, BoundMemory, CheckpointRef, Publication, RuleState, Verdict, YesMemory, restored

REF = CheckpointRef(Path("/run/checkpoint-5"), 5, "transformers", "f1", 12.5)
MEMORY = BoundMemory("probe", 1.5, (1.25, 1.75), {"head": 1.5})
VERDICT = Verdict((RuleState("r", "layer", "pending", 1, 5),), ())
SENT = Publication(5, 12_500, {"peel/loss": 1.5}, {"peel.zone": "caution"}, {"peel/alerts.jsonl": "x\n"})


def record(ledger: Ledger, ref: CheckpointRef = REF) -> Path:
    return ledger.record(
        ref,
        report="{}",
        verdict=VERDICT,
        alert_lines={"n1": '{"id": "n1"}'},
        memory=MEMORY,
        publications={"mlflow": SENT, "jsonl": SENT},
    )


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


def test_both_kinds_of_memory_come_back() -> None:
    """What a transformer's checkpoint hands on, and what a fully connected network's does, survive JSON as they are."""
    yes = YesMemory(
        "probe", "(4, 3) biased full", (Best((), 1.0, (1.0, 2.0), True), Best((1,), 0.5, (0.5, 1.0), False))
    )
    for memory in (MEMORY, yes):
        assert restored(json.loads(json.dumps(dataclasses.asdict(memory)))) == memory
