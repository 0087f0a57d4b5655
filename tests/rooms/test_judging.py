"""One run's judge on a real ledger: what a tick tells, what is owed for it, and the training's loss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peel_agent.config import RunSettings, TrackerSettings, WatchSettings
from peel_agent.deliver import Carrier
from peel_agent.destinations import Address
from peel_agent.journal import Journal
from peel_agent.judge import KIND_CHANGED
from peel_agent.judging import Judging
from peel_agent.ledger import Lane, Ledger, RunLedger, silence
from peel_agent.publish import to_trackers
from peel_agent.records import CheckpointRef, Peeled, Publication, Rule, RuleState, TrainingLog, Verdict
from tests import servers
from tests.rooms.test_judge import layer, report
from tests.rooms.test_ledger import checkpoint

mlflow_uri = servers.mlflow_uri

BELOW = Rule("below", "layer_below", 1, 1)
LATE = Rule("late", "no_checkpoint", threshold=60)


class Desk:
    """A judge, its ledger, its journal and its clock."""

    def __init__(self, folder: Path, *rules: Rule, sinks: dict[str, float | None] | None = None) -> None:
        self.ledger = Ledger(folder)
        self.run: RunLedger = self.ledger.run("key", "mine", "/runs/mine")
        self.now, self.said, self.woken = 1000.0, list[str](), 0
        self.journal = Journal(self.said.append, lambda: self.now)
        self.sinks = sinks or {"mail": None}
        self.rule(*rules)

    def rule(self, *rules: Rule, once: bool = False) -> None:
        """An agent that has just read these rules."""
        settings = RunSettings(
            "mine", WatchSettings(path="/runs/mine"), tracker=TrackerSettings(use=("jsonl",)), rules=rules
        )
        self.judging = Judging(settings, self.run, lambda: self.sinks, self.journal, self.wake, once=once)

    def wake(self) -> None:
        self.woken += 1

    def peel(self, step: int, letter: str) -> tuple[str, ...]:
        """What is told of a checkpoint whose block 3 is below (b), above (a) or undecided (u)."""
        ref: CheckpointRef = checkpoint(step, self.now)
        seen = report(step, *(layer(index, "a") for index in range(3)), layer(3, letter), fingerprint=ref.fingerprint)
        finished = self.judging.finish(ref, Peeled(seen, None), observed=True, now=self.now)
        return tuple(f"{one.state} {one.rule} {one.subject}" for one in finished.notices)

    def owed(self, destination: str) -> list[dict[str, Any]]:
        rows = self.ledger._database.query(
            "SELECT lane, key, body FROM deliveries WHERE destination = ? ORDER BY id", (destination,)
        )
        return [{"lane": lane, "key": key, **json.loads(body)} for lane, key, body in rows]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, BELOW, LATE)
    yield made
    made.ledger.close()


def test_a_checkpoint_that_does_not_come_is_told_and_so_is_the_next_one(desk: Desk) -> None:
    """By ticks alone: the sink gets both notices, the tracker's tag follows, and nothing is told twice."""
    desk.peel(1, "a")
    desk.now += 61
    for _ in range(3):
        desk.judging.tick(desk.now)
    (group,) = desk.owed("mail")
    assert [(one["rule"], one["state"], one["subject"]) for one in group["notices"]] == [("late", "firing", "run")]
    assert group["notices"][0]["text"].startswith("no checkpoint has come for 1 min (the last one is of step 1)")
    tags = [one["tags"] for one in desk.owed("jsonl") if one["lane"] == "numbers"]
    assert tags[-1] == {"peel.alert.late": "firing: run"}
    assert desk.woken == 1
    desk.peel(2, "a")
    desk.judging.tick(desk.now)
    assert [one["state"] for group in desk.owed("mail") for one in group["notices"]] == ["firing", "resolved"]
    assert [one["tags"] for one in desk.owed("jsonl") if one["lane"] == "numbers"][-1] == {
        "peel.alert.late": "inactive"
    }


def test_a_tick_in_which_nothing_changed_writes_nothing(desk: Desk) -> None:
    """An idle agent leaves its ledger alone."""
    desk.peel(1, "a")
    desk.judging.tick(desk.now)
    before = desk.ledger._database.query("SELECT total_changes()")
    for _ in range(5):
        desk.now += 1
        desk.judging.tick(desk.now)
    assert desk.ledger._database.query("SELECT total_changes()") == before


def test_what_a_silence_held_back_is_told_by_the_tick_after_it(desk: Desk) -> None:
    """The tag of the tracker tells it all the while; sinks hear of it when the silence is over."""
    silence(desk.ledger._database, run="mine", rule="below", subject="*", until=1100.0, why="")
    assert desk.peel(1, "b") == ()
    desk.judging.tick(desk.now)
    assert desk.owed("mail") == []
    tags = next(one["tags"] for one in desk.owed("jsonl") if one["lane"] == "numbers")
    assert tags["peel.alert.below"] == "firing: L003"
    desk.now = 1100.0
    desk.peel(2, "u")
    (group,) = desk.owed("mail")
    assert [(one["state"], one["since_step"]) for one in group["notices"]] == [("firing", 1)]


def test_trouble_that_lasts_is_an_alert_of_the_run_that_speaks_for_the_agent(tmp_path: Path) -> None:
    """The run's own troubles, and the agent's where the run speaks for it; over, it is resolved."""
    desk = Desk(tmp_path, Rule("error", "agent_error", threshold=10))
    desk.journal.begin("agent/copy", "the disk is full")
    desk.now += 11
    desk.judging.tick(desk.now)
    assert desk.owed("mail") == []
    desk.journal.speaker = "mine"
    desk.judging.tick(desk.now)
    desk.journal.end("agent/copy", "there is room")
    desk.judging.tick(desk.now)
    told = [(one["state"], one["text"]) for group in desk.owed("mail") for one in group["notices"]]
    assert told == [("firing", "the disk is full"), ("resolved", "all is well again (resolved)")]
    desk.ledger.close()


def test_a_sink_that_forgets_is_told_again_of_all_that_fires(tmp_path: Path) -> None:
    """As often as it says, with the ids of the first time; of several such groups only the last is owed."""
    desk = Desk(tmp_path, BELOW, sinks={"mail": None, "manager": 300.0})
    desk.peel(1, "b")
    desk.judging.tick(desk.now)
    first = desk.owed("manager")
    assert [one["standing"] for one in first] == [False, True]
    assert first[0]["notices"][0]["id"] == first[1]["notices"][0]["id"]
    for seconds in (100.0, 199.0):
        desk.now += seconds
        desk.judging.tick(desk.now)
    assert len(desk.owed("manager")) == 2
    desk.now += 1.0
    desk.judging.tick(desk.now)
    again = desk.owed("manager")
    assert [(one["standing"], one["at"]) for one in again] == [(False, 1000.0), (True, 1300.0)]
    assert len(desk.owed("mail")) == 1
    desk.peel(2, "a")
    desk.now += 300.0
    desk.judging.tick(desk.now)
    assert [one["standing"] for one in desk.owed("manager")] == [False, True, False]
    desk.ledger.close()


def test_an_upgraded_alert_is_resolved_with_what_is_known(desk: Desk) -> None:
    """One that an earlier version told, whose words were not kept, ends as any other."""
    old = RuleState("below", "model.layers.3", "firing", 0, 1, "1", told=1)
    desk.run.keep_verdict(Verdict((old,), ()), {}, ())
    assert desk.peel(2, "a") == ("resolved below model.layers.3",)


# ---------------------------------------------------------------- the training's loss, from a real server


def deliver(desk: Desk, folder: Path, uri: str, run_id: str, loss_keys: tuple[str, ...]) -> None:
    """One publication, by a carrier of its own."""
    settings = {"tracking_uri": uri, "run_id": run_id}
    address = Address("tracker", "mlflow", "mlflow", settings, "key", "/runs/mine", folder, loss_keys)
    sent = Publication(1, 1000, {"peel/loss": 1.0}, {})
    desk.run.owe(to_trackers(sent, ["mlflow"], key=f"{loss_keys}", with_alerts=False))
    carrier = Carrier(Lane("key", "mlflow", "numbers"), address, desk.ledger.outbox, lambda: desk.now)
    assert carrier.step().sent
    carrier.close()


def test_the_training_loss_comes_from_the_run(tmp_path: Path, mlflow_uri: str) -> None:
    """After a delivery the ledger has the loss that the training logged, its last value at each step, and its end."""
    client = servers.mlflow_client(mlflow_uri)
    run_id = client.create_run("0").info.run_id
    for at, (step, value) in enumerate(((1, 3.0), (2, 2.0), (2, 2.5), (3, float("nan")))):
        client.log_metric(run_id, "train/loss", value, step=step, timestamp=1000 + at)
    desk = Desk(tmp_path, BELOW)
    for keys, ended in ((("loss", "train/loss"), False), ((), True)):
        if ended:
            client.set_terminated(run_id, "KILLED")
        deliver(desk, tmp_path, mlflow_uri, run_id, keys)
        assert desk.run.alerting.training_loss() == ((1, 3.0), (2, 2.5))
        standing = desk.run.alerting.observed(0.0)
        assert standing.ended == ("the tracker has it as KILLED" if ended else None)
    desk.ledger.close()


UNREADABLE = {
    "no history": (lambda: {}["no history"], ()),
    "a loss that is no number": (lambda: TrainingLog(((1, float("nan")), (2, 2.5), (3, float("inf")))), ((2, 2.5),)),
    "a step that no training has": (lambda: TrainingLog(((2**70, 1.0),)), ()),
    "no log": (lambda: None, ()),
}


@pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
def test_a_tracker_that_cannot_be_read_costs_no_delivery(
    case: tuple[Any, Any], tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is written, and not sent again; rules go without what is no loss."""
    answer, kept = case

    def fail(*_: Any) -> TrainingLog:
        read: TrainingLog = answer()
        return read

    monkeypatch.setattr("peel_plugins.trackers.mlflow_run.training_log", fail)
    client = servers.mlflow_client(mlflow_uri)
    run_id = client.create_run("0").info.run_id
    desk = Desk(tmp_path, BELOW)
    deliver(desk, tmp_path, mlflow_uri, run_id, ("loss",))
    assert desk.run.alerting.training_loss() == kept
    assert desk.ledger.outbox.owed() == {}
    desk.ledger.close()


SAME_NAME = {
    "a block's, then the watching's": (Rule("it", "layer_below", 1, 1), Rule("it", "lag", threshold=9)),
    "a block's, then the run's": (Rule("it", "layer_below", 1, 1), Rule("it", "run_below_bound")),
    "a block's, then another of blocks": (Rule("it", "layer_below", 1, 1), Rule("it", "layer_flooding")),
    "the watching's, then a block's": (Rule("it", "no_checkpoint", threshold=60), Rule("it", "layer_below", 1, 1)),
    "the watching's, then another of it": (Rule("it", "no_checkpoint", threshold=60), Rule("it", "lag", threshold=9)),
    "the watching's, then the agent's": (Rule("it", "no_checkpoint", threshold=60), Rule("it", "agent_error")),
}


@pytest.mark.parametrize("rules", SAME_NAME.values(), ids=SAME_NAME)
def test_a_rule_that_is_of_another_kind_ends_what_it_told_before(desk: Desk, rules: tuple[Rule, Rule]) -> None:
    """A name that stays keeps no alert that nothing could clear any more: it is resolved once, with the reason."""
    desk.rule(rules[0])
    desk.peel(1, "b")
    desk.now += 61
    desk.judging.tick(desk.now)
    ((fired,),) = [group["notices"] for group in desk.owed("mail")]
    desk.rule(rules[1])
    for step in (2, 3):
        desk.judging.tick(desk.now)
        desk.peel(step, "u")
    told = [notice for group in desk.owed("mail") for notice in group["notices"]]
    assert [(one["state"], one["subject"]) for one in told] == [
        ("firing", fired["subject"]),
        ("resolved", fired["subject"]),
    ]
    assert KIND_CHANGED in told[1]["text"]
    assert [state.kind for state in desk.run.rule_states() if state.phase == "firing"] == []


def test_an_alert_whose_rule_changed_its_kind_may_begin_anew(desk: Desk) -> None:
    """The old one ends before the new one of the same name and subject begins, and both are told."""
    desk.peel(1, "b")
    desk.rule(Rule("below", "layer_flooding", 1, 1))
    desk.peel(2, "b")
    desk.rule(BELOW)
    told = [*desk.peel(3, "b"), *desk.peel(4, "b")]
    assert told == ["firing below model.layers.3"]


def test_with_once_nothing_is_awaited(desk: Desk) -> None:
    """A training of last month has no checkpoint to come, and all of them wait; an alert of that stays as it is."""
    rules = (LATE, Rule("many", "lag", threshold=1), Rule("error", "agent_error", threshold=0))
    desk.rule(*rules, once=True)
    desk.peel(1, "a")
    desk.run.await_turn(checkpoint(2, desk.now))
    desk.now += 30 * 86400
    desk.judging.tick(desk.now)
    assert desk.owed("mail") == []
    desk.rule(*rules)
    desk.judging.tick(desk.now)
    desk.rule(*rules, once=True)
    desk.run.refuse(checkpoint(2, desk.now), "it is damaged")
    desk.judging.tick(desk.now)
    told = [f"{one['state']} {one['rule']}" for group in desk.owed("mail") for one in group["notices"]]
    assert told == ["firing late", "firing many", "firing error"]


def test_a_run_that_is_full_is_charted_under_the_keys_that_it_has(tmp_path: Path) -> None:
    """The ledger knows them after a restart too, whichever layers are the worst by then."""
    keys = []
    for step in range(1, 5):
        desk = Desk(tmp_path)
        desk.judging._settings = dataclasses.replace(
            desk.judging._settings, tracker=TrackerSettings(use=("jsonl",), max_series=12)
        )
        ref = checkpoint(step, 1000.0 + step)
        layers = tuple(layer(index, "b" if index == step else "a") for index in range(8))
        seen = report(step, *layers, fingerprint=ref.fingerprint)
        desk.judging.finish(ref, Peeled(seen, None), observed=True, now=1000.0 + step)
        keys.append(set([one for one in desk.owed("jsonl") if one["lane"] == "numbers"][-1]["metrics"]))
        assert desk.run.series() == keys[0]
        desk.ledger.close()
    assert len(keys[0]) == 12
    assert keys == keys[:1] * 4
