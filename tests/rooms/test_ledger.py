"""The ledger: what is recorded survives, all of it or nothing, and each run has its own."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peel_agent import ledger as rooms
from peel_agent.ledger import HISTORY, Job, Lane, LastObserved, Ledger, Owed, Reader, RunLedger
from peel_agent.records import (
    Best,
    BoundMemory,
    CheckpointInfo,
    CheckpointRef,
    Debt,
    Estimate,
    FileStamp,
    Memory,
    ModelInfo,
    Peeled,
    PeelReport,
    ProbeInfo,
    Publication,
    RuleState,
    Sketches,
    Timing,
    Verdict,
    YesMemory,
    plain,
)

KEY, PLACE = "run-1", "/run"
FILES = (FileStamp("model.safetensors", 7, 1_700_000_000_123_456_789, 9),)
REF = CheckpointRef(Path("/run/checkpoint-5"), 5, "transformers", "f1", 12.5, FILES, Path("/pins/f1/checkpoint-5"))
MEMORY = BoundMemory("probe", 1.5, (1.25, 1.75), {"head": 1.5})
VERDICT = Verdict((RuleState("r", "layer", "pending", 1, 5),), ())
SENT = Publication(5, 12_500, {"peel/loss": 1.5}, {"peel.zone": "caution"}, {"peel/checkpoints/5.json": "{}"})
YES = YesMemory("probe", "(4, 3) biased full", (Best((), 1.0, (1.0, 2.0), True), Best((1,), 0.5, (0.5, 1.0), False)))
SKETCHES = Sketches({"model.layers.0.w": "AACAPw=="}, {"model.layers.0.w": (3, 1)}, "bfloat16")
DEBTS = (
    Debt("mlflow", "numbers", "f1", plain(SENT)),
    Debt("mlflow", "files", "f1", plain(SENT), with_alerts=True),
    Debt("pager", "notices", "g1", {"id": "g1"}),
)
ANSWER = Peeled(
    PeelReport(
        checkpoint=CheckpointInfo("ckpt", 5, "transformers", "f1"),
        model=ModelInfo("llama", 0, 1000, "full"),
        probe=ProbeInfo("p", 100, 10, 10, 10),
        loss=Estimate(1.0, 0.9, 1.1),
        bound=None,
        gap=None,
        zone="undecided",
        bounds=(),
        layers=(),
        skipped=(),
        timing=Timing(load=0.5, capture=1.5, solve=2.0),
    ),
    MEMORY,
    SKETCHES,
)


@contextmanager
def opened(folder: Path, key: str = KEY) -> Iterator[RunLedger]:
    """One run of the ledger of a process that starts and ends."""
    with closing(Ledger(folder)) as ledger:
        yield ledger.run(key, key, PLACE)


def record(run: RunLedger, ref: CheckpointRef = REF, **changed: Any) -> Path:
    """A checkpoint made final with something in every table."""
    given: dict[str, Any] = {
        "report": "{}",
        "verdict": VERDICT,
        "alert_lines": {"n1": '{"id": "n1"}'},
        "memory": MEMORY,
        "debts": DEBTS,
    }
    return run.record(ref, **{**given, **changed})


def checkpoint(step: int | None, committed_at: float, fingerprint: str = "") -> CheckpointRef:
    return CheckpointRef(Path(f"/run/{step}"), step, "transformers", fingerprint or f"f{step}", committed_at)


def owed(folder: Path) -> dict[Lane, Owed | None]:
    """What is first in each lane that owes anything, as the courier sees it."""
    with closing(rooms.open_beside(folder)) as beside:
        outbox = rooms.Outbox(beside)
        return {lane: outbox.head(lane) for lane in outbox.lanes()}


def everything(folder: Path) -> dict[str, list[Any]]:
    """Every row of every table."""
    with closing(sqlite3.connect(folder / rooms.FILE)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in tables if "sqlite" not in name}


def tallies(folder: Path, key: str = KEY) -> dict[str, float]:
    with closing(Reader(folder)) as reader:
        return next(run.tallies for run in reader.runs() if run.run == key)


# ---------------------------------------------------------------- what survives


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    """A second process finds the checkpoint, the states, the memory, the alerts and everything owed."""
    with opened(tmp_path) as run:
        path = record(run, observed=True, sketches=SKETCHES)
    with opened(tmp_path) as run:
        assert (run.outcome("f1"), run.outcome("f2"), run.count("peeled")) == ("peeled", None, 1)
        assert run.rule_states() == VERDICT.states
        assert run.bound_memory() == MEMORY
        assert run.last_observed() == LastObserved("f1", 5, SKETCHES)
        assert run.last_peeled() == (5, 12.5)
        assert path == tmp_path / "runs" / KEY / "reports" / "step-000000005.json"
        assert path.read_text() == "{}\n"
    heads = owed(tmp_path)
    assert {(lane.destination, lane.kind) for lane in heads} == {(debt.destination, debt.lane) for debt in DEBTS}
    files = heads[Lane(KEY, "mlflow", "files")]
    assert files is not None
    assert (files.key, files.attempts, files.next_try, files.why) == ("f1", 0, 0.0, None)
    assert files.body == {**plain(SENT), "alerts_until": 1}


@pytest.mark.parametrize("memory", [MEMORY, YES], ids=["transformer", "fully connected"])
def test_both_kinds_of_memory_come_back(tmp_path: Path, memory: Memory) -> None:
    """What a transformer's checkpoint hands on, and what a fully connected network's does, survive as they are."""
    with opened(tmp_path) as run:
        record(run, memory=memory)
    with opened(tmp_path) as run:
        assert run.bound_memory() == memory


@pytest.mark.parametrize("sketches", [SKETCHES, None], ids=["with sketches", "without"])
def test_what_was_observed_last_survives_a_restart(tmp_path: Path, sketches: Sketches | None) -> None:
    """The next process knows the checkpoint that was judged last, by fingerprint and step, and its sketches."""
    with opened(tmp_path) as run:
        assert run.last_observed() is None
        record(run, checkpoint(4, 1.0), observed=True, sketches=Sketches({}, {}, "float32"))
        record(run, checkpoint(5, 2.0), observed=True, sketches=sketches)
        record(run, checkpoint(3, 1.0), sketches=Sketches({}, {}, "float32"))  # it came late
        run.refuse(checkpoint(7, 3.0), "why")
    with opened(tmp_path) as run:
        assert run.last_observed() == LastObserved("f5", 5, sketches)


def test_history_is_in_the_order_of_writing(tmp_path: Path) -> None:
    """Reports come back in the order in which their checkpoints were written, whatever the order of peeling and steps;
    of two written in one second the later step comes last. Those without a step, and what was not peeled, are left out.
    """
    with opened(tmp_path) as run:
        assert run.history() == ()
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
            record(run, ref, report=json.dumps({"fingerprint": fingerprint, "step": step}))
        run.refuse(checkpoint(400, 45.0), "why")
    with opened(tmp_path) as run:
        order = [(form["fingerprint"], form["step"]) for form in run.history()]
    assert order == [("b", 100), ("g", 150), ("d", 200), ("a", 300), ("e", 200)]


def test_history_is_short_and_misses_no_file_that_is_gone(tmp_path: Path) -> None:
    """The newest reports are enough; one that somebody removed is passed over."""
    with opened(tmp_path) as run:
        paths = [record(run, checkpoint(s, float(s)), report=json.dumps({"step": s})) for s in range(HISTORY + 5)]
        paths[-2].unlink()
        steps = [form["step"] for form in run.history()]
    assert steps == [step for step in range(5, HISTORY + 5) if step != HISTORY + 3]


def test_a_late_checkpoint_is_one_of_an_earlier_step_and_time(tmp_path: Path) -> None:
    """A lower step that was written later is a training that went back, not one that comes late."""
    with opened(tmp_path) as run:
        assert not run.is_late(checkpoint(1, 1.0))
        record(run, checkpoint(5, 10.0))
        late = {(step, at): run.is_late(checkpoint(step, at)) for step in (4, 5, None) for at in (9.0, 11.0)}
    assert late == {(4, 9.0): True} | dict.fromkeys([(4, 11.0), (5, 9.0), (5, 11.0), (None, 9.0), (None, 11.0)], False)


def test_reports_have_names_of_their_own(tmp_path: Path) -> None:
    """The step names a report; the fingerprint does where there is no step, and a second one of a step has both."""
    with opened(tmp_path) as run:
        names = [record(run, one).name for one in (checkpoint(None, 1.0, "abc"), checkpoint(7, 1.0, "a"))]
        names += [record(run, checkpoint(7, 2.0, "b")).name, record(run, checkpoint(7, 1.0, "a")).name]
    assert names == ["abc.json", "step-000000007.json", "step-000000007-b.json", "step-000000007-a.json"]


# ---------------------------------------------------------------- the life of a job

LIVES: dict[str, tuple[Callable[[RunLedger], object], list[Job]]] = {
    "found": (lambda run: None, [Job(REF, "waiting", 0, 0, 0.0)]),
    "found twice": (
        lambda run: run.await_turn(replace(REF, held=None)),
        [Job(replace(REF, held=None), "waiting", 0, 0, 0.0)],
    ),
    "in work when the agent ended": (lambda run: run.begin(REF), [Job(REF, "working", 0, 1, 0.0)]),
    "in work twice": (lambda run: (run.begin(REF), run.begin(REF)), [Job(REF, "working", 0, 2, 0.0)]),
    "found again after an end": (lambda run: (run.begin(REF), run.await_turn(REF)), [Job(REF, "waiting", 0, 1, 0.0)]),
    "gave way": (lambda run: (run.begin(REF), run.put_back(REF, why="gave_way")), [Job(REF, "waiting", 0, 0, 0.0)]),
    "put back unbegun": (lambda run: run.put_back(REF), [Job(REF, "waiting", 0, 0, 0.0)]),
    "its worker died": (lambda run: (run.begin(REF), run.died(REF, 99.5)), [Job(REF, "waiting", 1, 0, 99.5)]),
    "died and found again": (
        lambda run: (run.begin(REF), run.died(REF, 99.5), run.await_turn(REF)),
        [Job(REF, "waiting", 1, 0, 99.5)],
    ),
    "died, and ended in the second try": (
        lambda run: (run.begin(REF), run.died(REF, 99.5), run.begin(REF)),
        [Job(REF, "working", 1, 1, 99.5)],
    ),
    "answered": (lambda run: (run.begin(REF), run.answered(REF, ANSWER)), [Job(REF, "answered", 0, 0, 0.0)]),
    "torn": (lambda run: run.forget(REF, why="torn"), []),
    "peeled": (record, []),
    "refused": (lambda run: run.refuse(REF, "why"), []),
    "failed": (lambda run: run.fail(REF, "why"), []),
    "passed over": (lambda run: run.pass_over(REF, "why"), []),
    "missed": (lambda run: run.miss(REF), []),
}


@pytest.mark.parametrize("life", LIVES)
def test_the_next_start_finds_each_job_as_it_stood(tmp_path: Path, life: str) -> None:
    """After each transition a second opening finds the job with its deaths, interruptions and pause, or none."""
    happen, expected = LIVES[life]
    with opened(tmp_path) as run:
        run.await_turn(REF)
        happen(run)
    with opened(tmp_path) as run:
        assert list(run.jobs()) == expected
        assert run.count_deaths(REF) == (expected[0].deaths if expected else 0)
    assert tallies(tmp_path)["found"] == 1


def test_an_answer_is_kept_to_be_judged(tmp_path: Path) -> None:
    """What the worker answered comes back whole after a restart, and where its time went is summed."""
    with opened(tmp_path) as run:
        for fingerprint in ("f1", "f2"):
            ref = replace(REF, fingerprint=fingerprint)
            run.await_turn(ref)
            run.answered(ref, ANSWER)
    with opened(tmp_path) as run:
        assert run.answer(REF) == ANSWER
    amounts = tallies(tmp_path)
    assert {key: amounts[f"seconds/{key}"] for key in ("load", "capture", "solve")} == {
        "load": 1.0,
        "capture": 3.0,
        "solve": 4.0,
    }


OUTCOMES: dict[str, tuple[Callable[[RunLedger], object], str, str]] = {
    "peeled": (record, "peeled", "step-000000005.json"),
    "refused": (lambda run: run.refuse(REF, "why"), "refused", "why"),
    "failed": (lambda run: run.fail(REF, "died 3 times"), "failed", "died 3 times"),
    "passed over": (lambda run: run.pass_over(REF, "backlog = latest"), "passed over", "backlog = latest"),
    "lost": (lambda run: run.miss(REF), "vanished", "removed before it was peeled"),
}


@pytest.mark.parametrize("ending", OUTCOMES)
def test_the_ways_to_end_are_never_mixed(tmp_path: Path, ending: str) -> None:
    """Each ending is counted as itself alone, in the rows and in the tallies, and says why."""
    end, outcome, detail = OUTCOMES[ending]
    with opened(tmp_path) as run:
        run.await_turn(REF)
        end(run)
    with opened(tmp_path) as run:
        assert run.outcome("f1") == outcome
        assert {one: run.count(one) for one in ("peeled", "refused", "failed", "passed over", "vanished")} == (
            dict.fromkeys(("peeled", "refused", "failed", "passed over", "vanished"), 0) | {outcome: 1}
        )
        assert run.refused() == (((str(REF.path), detail),) if outcome in ("refused", "failed") else ())
    assert everything(tmp_path)["checkpoints"][0][-2:] == (outcome, detail)
    assert tallies(tmp_path) == {"found": 1.0, outcome.replace(" ", "_"): 1.0}


def test_a_checkpoint_that_was_passed_over_may_be_peeled_after_all(tmp_path: Path) -> None:
    """The later outcome takes the place of the earlier one."""
    with opened(tmp_path) as run:
        run.pass_over(REF, "why")
        record(run)
        assert (run.outcome("f1"), run.count("passed over"), run.count("peeled")) == ("peeled", 0, 1)


# ---------------------------------------------------------------- all of it, or nothing

WRITES = [
    ("jobs", "DELETE"),
    ("checkpoints", "INSERT"),
    ("tallies", "INSERT"),
    ("tallies", "UPDATE"),
    ("rule_states", "DELETE"),
    ("rule_states", "INSERT"),
    ("alerts", "INSERT"),
    ("bound_memory", "INSERT"),
    ("last_observed", "INSERT"),
    ("deliveries", "INSERT"),
]
"""Everything that the end of a checkpoint writes."""


@pytest.mark.parametrize(("table", "event"), WRITES)
def test_a_failure_between_any_two_steps_leaves_nothing_half_kept(tmp_path: Path, table: str, event: str) -> None:
    """Whatever statement fails (a full disk), every table is as it was, and the same call succeeds afterwards."""
    trigger = f"CREATE TRIGGER t BEFORE {event} ON {table} BEGIN SELECT raise(ABORT, 'no room'); END"
    last = replace(REF, fingerprint="f2", step=6)
    later = Verdict((RuleState("r", "layer", "firing", 0, 5),), ())
    alerts = {"n1": "{}", "n2": '{"id": "n2"}'}
    with opened(tmp_path) as run:
        record(run, observed=True, sketches=SKETCHES)
        run.await_turn(last)
        before = everything(tmp_path)
        run._database._connection.execute(trigger)
        args: dict[str, Any] = {"verdict": later, "alert_lines": alerts, "memory": YES, "observed": True}
        with pytest.raises(sqlite3.IntegrityError, match="no room"):
            record(run, last, **args)
        assert everything(tmp_path) == before
        run._database._connection.execute("DROP TRIGGER t")
        record(run, last, **args)
    with opened(tmp_path) as run:
        assert (run.outcome("f2"), run.jobs(), run.rule_states()) == ("peeled", (), later.states)
        assert (run.bound_memory(), run.last_observed()) == (YES, LastObserved("f2", 6, None))
    assert [line for *_, line in everything(tmp_path)["alerts"]] == ['{"id": "n1"}', '{"id": "n2"}']


class _Killed(BaseException):
    """The process ends here."""


def test_the_end_of_the_process_between_any_two_statements_leaves_nothing_half_kept(tmp_path: Path) -> None:
    """A process that is gone before the n-th statement of `record`, for every n, leaves the job to be judged again."""

    class Counted:
        """A connection that ends the process when `left` statements were made."""

        def __init__(self, real: sqlite3.Connection, left: int) -> None:
            self.real, self.left = real, left

        def _spend(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise _Killed

        def execute(self, *given: Any) -> Any:
            self._spend()
            return self.real.execute(*given)

        def executemany(self, *given: Any) -> Any:
            self._spend()
            return self.real.executemany(*given)

        @property
        def in_transaction(self) -> bool:
            return False  # nobody is there to roll back: SQLite does at the next opening

    survived = []
    for left in range(40):
        folder = tmp_path / str(left)
        ledger = Ledger(folder)
        run = ledger.run(KEY, KEY, PLACE)
        run.await_turn(REF)
        run.answered(REF, ANSWER)
        before = everything(folder)
        ledger._database._connection = Counted(ledger._database._connection, left)  # type: ignore[assignment]
        try:
            record(run, observed=True, sketches=SKETCHES)
        except _Killed:
            survived.append(left)
        ledger._database._connection.real.close()  # type: ignore[attr-defined]
        ledger._lock.close()
        if left not in survived:
            break
        assert everything(folder) == before
        with opened(folder) as run:
            assert run.jobs()[0].state == "answered"
            assert run.answer(REF) == ANSWER
    assert survived == list(range(len(survived)))
    assert len(survived) > 8


def test_a_verdict_without_a_checkpoint_is_kept_whole(tmp_path: Path) -> None:
    """States, alerts and debts of a withdrawn rule come together, and nothing else changes; or none does."""
    with opened(tmp_path) as run:
        record(run, debts=())
        before = everything(tmp_path)
        run._database._connection.execute(
            "CREATE TRIGGER t BEFORE INSERT ON deliveries BEGIN SELECT raise(ABORT, 'no room'); END"
        )
        with pytest.raises(sqlite3.IntegrityError):
            run.keep_verdict(Verdict((), ()), {"n2": "{}"}, DEBTS)
        assert everything(tmp_path) == before
        run._database._connection.execute("DROP TRIGGER t")
        run.keep_verdict(Verdict((), ()), {"n2": "{}"}, DEBTS)
        after = everything(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"rule_states", "alerts", "deliveries"}
    files = owed(tmp_path)[Lane(KEY, "mlflow", "files")]
    assert files is not None
    assert files.body["alerts_until"] == 2


# ---------------------------------------------------------------- runs


def test_two_runs_never_see_each_other(tmp_path: Path) -> None:
    """What one run knows of a fingerprint, a rule, a memory or an alert of the same name is not another's."""
    with closing(Ledger(tmp_path)) as ledger:
        one, other = ledger.run("one", "one", "/same"), ledger.run("other", "other", "/same")
        record(one, observed=True, sketches=SKETCHES)
        one.await_turn(replace(REF, fingerprint="f9"))
        assert (other.outcome("f1"), other.count("peeled"), other.jobs()) == (None, 0, ())
        assert (other.rule_states(), other.bound_memory(), other.last_observed()) == ((), None, None)
        assert (other.history(), other.last_peeled(), other.refused()) == ((), None, ())
        assert not other.is_late(checkpoint(1, 1.0))
        other.await_turn(REF)
        record(other, memory=YES, verdict=Verdict((), ()), alert_lines={"n1": "another"}, debts=DEBTS[1:2])
        other.fail(replace(REF, fingerprint="f9"), "why")
        assert one.rule_states() == VERDICT.states
        assert one.bound_memory() == MEMORY
        assert [job.ref.fingerprint for job in one.jobs()] == ["f9"]
        assert (one.count("failed"), other.count("failed")) == (0, 1)
        assert (ledger.outbox.alerts_log("one", 9), ledger.outbox.alerts_log("other", 9)) == (
            '{"id": "n1"}\n',
            "another\n",
        )
        lanes = {lane.run: ledger.outbox.head(lane) for lane in ledger.outbox.lanes() if lane.kind == "files"}
        assert {run: head.body["alerts_until"] for run, head in lanes.items() if head is not None} == {
            "one": 1,
            "other": 2,
        }
    assert tallies(tmp_path, "one") == {"found": 1.0, "peeled": 1.0}
    assert tallies(tmp_path, "other") == {"found": 1.0, "peeled": 1.0, "failed": 1.0}


def test_a_run_that_ended_is_not_watched_and_may_come_back(tmp_path: Path) -> None:
    """`others` are runs that were never ended; an ended one has no jobs, keeps what it knew, and can go on."""
    with closing(Ledger(tmp_path)) as ledger:
        gone, stays = ledger.run("gone", "gone", "/a"), ledger.run("stays", "stays", "/b")
        record(gone)
        gone.await_turn(replace(REF, fingerprint="f2"))
        assert ledger.others(("stays",)) == (("gone", "gone", "/a"),)
        ledger.end(gone)
        assert (ledger.others(("stays",)), gone.jobs(), stays.jobs()) == ((), (), ())
    with closing(Reader(tmp_path)) as reader:
        assert [run.run for run in reader.runs()] == ["stays"]
    with closing(Ledger(tmp_path)) as ledger:
        again = ledger.run("gone", "gone", "/a")
        assert (again.count("peeled"), ledger.others(("stays",))) == (1, (("gone", "gone", "/a"),))
