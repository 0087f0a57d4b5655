"""A run's rounds over a real folder with a real ledger: what goes wrong is injected, and time is invented."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from peel_agent import registry
from peel_agent.config import DeviceSettings, RunSettings, TrackerSettings, WatchSettings
from peel_agent.errors import CheckpointError, ConfigurationError, GaveWay, PeelError, TornCheckpoint, WorkerError
from peel_agent.intake import names_step
from peel_agent.journal import Journal
from peel_agent.ledger import Ledger, Reader
from peel_agent.ledger.database import Database
from peel_agent.pipeline import locate
from peel_agent.records import (
    CheckpointRef,
    DeviceLease,
    Estimate,
    Event,
    LayerReport,
    Peeled,
    PeelReport,
    Request,
    Rule,
    Sketches,
    YesMemory,
)
from peel_agent.run import Run
from peel_agent.watch import Folder, Observed, Pins, Reserve, Settling, fingerprint
from peel_agent.work import AWAY_PAUSE_SECONDS, DEATH_PAUSE_SECONDS, DEATHS, INTERRUPTIONS, Services
from tests.rooms.test_publish_form import FULL
from tests.rooms.test_watch_scan import write_checkpoint

CPU = DeviceLease("cpu", "", "cpu", "the only one")
DEATH = WorkerError("the worker ended with signal SIGKILL", remedy="memory")
TORN = TornCheckpoint("rewritten", remedy="")
REFUSED = CheckpointError("NaN in it", remedy="take another")
FULL_DISK = sqlite3.OperationalError("database or disk is full")
MEMORY = YesMemory("p", "n", ())
IDLE = Rule("idle", "layer_below", for_checkpoints=1, severity="critical")
KEY = "run-1"

Answer = Peeled | Exception | Future[Peeled]


def peeled(request: Request, memory: YesMemory | None = None, sketches: Sketches | None = None) -> Peeled:
    """What peeling a checkpoint gives when no block is idle."""
    return Peeled(report_of(request), memory, sketches)


def report_of(request: Request, idle: int | None = None) -> PeelReport:
    """A report of four blocks, one of which may earn nothing."""
    ref = request.ref
    info = dataclasses.replace(FULL.checkpoint, path=ref.label, step=ref.step, fingerprint=ref.fingerprint)
    return dataclasses.replace(FULL, checkpoint=info, layers=tuple(layer(index, index == idle) for index in range(4)))


def layer(index: int, is_idle: bool) -> LayerReport:
    margin = Estimate(0.0, -0.0002, 0.0002) if is_idle else Estimate(0.05, 0.04, 0.06)
    return LayerReport(
        index=index,
        name=f"model.layers.{index}",
        status="below" if is_idle else "above",
        margin=margin,
        best_reference="skip",
        references={"skip": margin.value},
        parts={},
        stream_share=0.1,
    )


class Desk:
    """A run and its surroundings: `answer` is asked for each peel, `stopped` and `killed` start the agent anew."""

    def __init__(self, folder: Path) -> None:
        self.root, self.state = folder / "run", folder / "state"
        self.root.mkdir()
        self.now = time.time() + 100.0
        self.answer: Callable[[Request], Answer] = peeled
        self.asked: list[Request] = []
        self.events: list[Event] = []
        self.lines: list[str] = []
        self.leased = 0
        self.margins: list[float | None] = []
        self.free = True
        self.write: Callable[[str], None] = lambda _line: None
        self.emit: Callable[[str], None] = self.lines.append
        self.options: dict[str, Any] = {}
        self.start()

    def start(self, **options: Any) -> None:
        """A run of its own; `options` are kept for the next start."""
        self.options |= options
        given: dict[str, Any] = {
            "backlog": "all",
            "once": False,
            "rules": (IDLE,),
            "sinks": {"pager": None},
            "ended": None,
            "keep_free_gb": None,
        } | self.options
        self.ledger = Ledger(self.state)
        own = self.ledger.run(KEY, "run", str(self.root))
        watch = WatchSettings(str(self.root), keep_free_gb=given["keep_free_gb"])
        settings = RunSettings("run", watch, tracker=TrackerSettings(use=("jsonl",)))
        self.run = Run(
            dataclasses.replace(settings, rules=given["rules"]),
            DeviceSettings(),
            Folder(self.root, registry.formats(), Settling(0.0)),
            given["backlog"],
            own,
            Services(
                Journal(self._say, lambda: self.now, keep=self.events.append),
                self._lease,
                self._submit,
                self._give_back,
                emit=self._emit,
            ),
            given["sinks"],
            given["once"],
            given["ended"],
        )

    def killed(self, **options: Any) -> None:
        self.ledger.close()
        self.leased = 0
        self.start(**options)

    def stopped(self, **options: Any) -> None:
        self.run.close()
        self.killed(**options)

    def _say(self, line: str) -> None:
        self.write(line)

    def _emit(self, line: str) -> None:
        self.emit(line)

    def _lease(self, _run: str, worst_margin: float | None) -> DeviceLease | None:
        self.margins.append(worst_margin)
        if self.leased or not self.free:
            return None
        self.leased = 1
        return CPU

    def _give_back(self, _lease: DeviceLease) -> None:
        self.leased = 0

    def _submit(self, request: Request) -> Future[Peeled]:
        self.asked.append(request)
        told = self.answer(request)
        if isinstance(told, Future):
            return told
        answer: Future[Peeled] = Future()
        if isinstance(told, Peeled):
            answer.set_result(told)
        else:
            answer.set_exception(told)
        return answer

    def put(self, step: int, *, at: float | None = None) -> Path:
        """A whole checkpoint, written at the time `at`."""
        path = write_checkpoint(self.root / f"checkpoint-{step}", step)
        for file in path.iterdir() if at is not None else ():
            os.utime(file, (at or 0.0,) * 2)
        return path

    def round(self, seconds: float = 1.0) -> Observed:
        self.now += seconds
        return self.run.round(self.now)

    def finish(self) -> None:
        """Rounds until nothing is left to wait for."""
        for _ in range(30):
            if self.run.is_idle(self.round()):
                return
        raise AssertionError("rounds without an end")

    @property
    def steps(self) -> list[int | None]:
        """The steps that were given to workers."""
        return [request.ref.step for request in self.asked]

    def count(self, outcome: Any) -> int:
        return self.run.ledger.count(outcome)

    @property
    def tallies(self) -> dict[str, float]:
        reader = Reader(self.state)
        try:
            (run,) = [one for one in reader.runs() if one.run == KEY]
        finally:
            reader.close()
        return {name: amount for name, amount in run.tallies.items() if not name.startswith("seconds/")}

    @property
    def held(self) -> list[str]:
        """The checkpoints whose files are held."""
        return sorted(path.name for path in (self.run.ledger.folder / "pins").glob("*/*"))

    def told(self, kind: str) -> list[str]:
        return [event.words for event in self.events if event.kind == kind]

    def owed(self) -> list[tuple[str, str, str, Any]]:
        """Everything owed, in order: destination, lane, key and body."""
        rows = self.ledger._database.query("SELECT destination, lane, key, body FROM deliveries ORDER BY id")
        return [tuple(row) for row in rows]

    def alerts(self) -> list[str]:
        return [line for (line,) in self.ledger._database.query("SELECT line FROM alerts ORDER BY position")]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.ledger.close()


def test_a_device_is_asked_for_with_the_worst_margin(desk: Desk) -> None:
    """What decides whose turn it is comes from the last checkpoint that was judged, also at the next start; a save
    without a step changes nothing of it.
    """
    desk.answer = lambda request: Peeled(report_of(request, idle=2 if request.ref.step == 20 else None), None)
    for step in (10, 20):
        desk.put(step)
        desk.finish()
    assert desk.margins == [None, 0.05]
    desk.stopped()
    write_checkpoint(desk.root / "final", None)
    desk.finish()
    desk.put(30)
    desk.finish()
    assert desk.margins == [None, 0.05, 0.0, 0.0]


def failing(*errors: Exception, then: Callable[[Request], Answer] = peeled) -> Callable[[Request], Answer]:
    """Answers with each error once, and then as `then` does."""
    left = list(errors)
    return lambda request: left.pop(0) if left else then(request)


# ---------------------------------------------------------------- what goes wrong with a worker


@pytest.mark.parametrize("error", [DEATH, RuntimeError("a bug"), TORN, GaveWay("somebody moved in", remedy="")])
def test_what_may_pass_is_tried_again(desk: Desk, error: Exception) -> None:
    """A dead worker, an engine's bug, a torn read and a GPU that is wanted cost a try, not the checkpoint."""
    desk.put(10)
    desk.answer = failing(error)
    desk.finish()
    assert (desk.steps, desk.count("peeled"), desk.leased) == ([10, 10], 1, 0)


def test_three_deaths_are_the_end(desk: Desk) -> None:
    """After DEATHS dead workers, with longer pauses between them, a checkpoint is given up for good."""
    desk.put(10)
    desk.answer = failing(*[DEATH] * DEATHS)
    begun: list[float] = []
    for _ in range(200):
        before = len(desk.asked)
        desk.round()
        begun += [desk.now] * (len(desk.asked) - before)
    assert [round(later - earlier) for earlier, later in itertools.pairwise(begun)] == [
        round(pause) + 1 for pause in DEATH_PAUSE_SECONDS
    ]
    assert (len(begun), desk.count("failed"), desk.tallies["worker_died"]) == (DEATHS, 1, DEATHS)
    (words,) = desk.told("failed")
    assert f"{DEATHS} times" in words
    assert "peel-agent scan" in words
    assert desk.held == []
    desk.stopped()
    desk.finish()
    assert len(desk.asked) == DEATHS


@pytest.mark.parametrize("restart", [Desk.stopped, Desk.killed])
def test_deaths_and_their_pauses_survive_a_restart(desk: Desk, restart: Callable[[Desk], None]) -> None:
    """Another agent counts on, and waits out the pause; after the last death it does not begin anew."""
    desk.put(10)
    desk.answer = failing(*[DEATH] * 9)
    for deaths, pause in enumerate(DEATH_PAUSE_SECONDS, start=1):
        desk.free = True
        desk.round()
        desk.free = False
        desk.round()
        restart(desk)
        assert [(job.deaths, job.state) for job in desk.run.ledger.jobs()] == [(deaths, "waiting")]
        desk.free = True
        if pause:
            desk.round()
            assert len(desk.asked) == deaths, "the pause is not over"
            desk.now += pause
    desk.round()
    desk.round()
    assert (len(desk.asked), desk.count("failed")) == (DEATHS, 1)
    restart(desk)
    desk.round(1000.0)
    assert len(desk.asked) == DEATHS


def test_an_agent_that_ends_while_it_peels_is_counted(desk: Desk) -> None:
    """A checkpoint that takes the agent with it INTERRUPTIONS times is given up; an answer in between forgives."""
    desk.put(10)
    desk.answer = lambda _: Future()
    for _ in range(INTERRUPTIONS):
        desk.round()
        desk.killed()
    assert len(desk.asked) == INTERRUPTIONS
    desk.round()
    assert len(desk.asked) == INTERRUPTIONS
    assert desk.count("failed") == 1
    (words,) = desk.told("failed")
    assert f"ended {INTERRUPTIONS} times" in words


def test_an_agent_that_is_stopped_blames_nobody(desk: Desk) -> None:
    """Whoever stops the agent during every peel loses no checkpoint by that."""
    desk.put(10)
    desk.answer = lambda _: Future()
    for _ in range(INTERRUPTIONS + 3):
        desk.round()
        desk.stopped()
    desk.answer = peeled
    desk.finish()
    assert (desk.count("peeled"), desk.count("failed")) == (1, 0)


def test_giving_way_counts_for_nothing(desk: Desk) -> None:
    """Work that gave way is put back as often as it must, and is neither a death nor an interruption."""
    desk.put(10)
    times = INTERRUPTIONS + DEATHS
    desk.answer = failing(*[GaveWay(f"process {number} on it", remedy="") for number in range(times)])
    desk.finish()
    assert (desk.count("peeled"), desk.tallies["gave_way"]) == (1, times)
    assert "worker_died" not in desk.tallies
    assert len(desk.told("gave way")) == times


def test_what_gave_way_starts_anew_without_blame(desk: Desk) -> None:
    """Its job waits as one that was never begun."""
    desk.put(10)
    desk.answer = failing(GaveWay("somebody on it", remedy=""))
    desk.round()
    desk.free = False
    desk.round()
    (job,) = desk.run.ledger.jobs()
    assert (job.state, job.deaths, job.interruptions) == ("waiting", 0, 0)


def test_an_unusable_checkpoint_is_refused_until_the_next_start(desk: Desk) -> None:
    """It is told once and not tried again; the next start tries it anew: the cause may have been elsewhere."""
    desk.put(10)
    desk.answer = failing(REFUSED)
    desk.finish()
    desk.finish()
    assert desk.steps == [10]
    assert desk.run.ledger.refused() == ((str(desk.root / "checkpoint-10"), str(REFUSED)),)
    (words,) = desk.told("refused")
    assert "NaN in it -> take another" in words
    desk.stopped()
    desk.finish()
    assert (desk.count("peeled"), desk.count("refused")) == (1, 0)


def test_a_users_mistake_ends_the_watch_a_checkpoints_does_not(desk: Desk) -> None:
    """An error of the configuration is raised as long as nothing was peeled with it; then it is that checkpoint's."""
    desk.put(10)
    wrong = ConfigurationError("a probe of another vocabulary", remedy="")
    desk.answer = failing(wrong)
    with pytest.raises(ConfigurationError, match="another vocabulary"):
        desk.finish()
    assert desk.leased == 0
    desk.stopped()
    desk.finish()
    desk.put(20)
    desk.answer = failing(wrong)
    desk.finish()
    assert (desk.count("peeled"), desk.count("refused"), desk.steps) == (1, 1, [10, 10, 20])


# ---------------------------------------------------------------- nothing is lost, nothing is repeated


def test_an_answer_is_on_disk_before_it_is_judged(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that ends between the two does not peel again: the next one judges the answer that was kept."""
    desk.put(10)
    desk.answer = lambda request: Peeled(report_of(request, idle=1), MEMORY)
    with monkeypatch.context() as fault:
        fault.setattr(Run, "_finish", lambda *_: (_ for _ in ()).throw(FULL_DISK))
        desk.round()
        with pytest.raises(sqlite3.OperationalError):
            desk.round()
        (job,) = desk.run.ledger.jobs()
        assert (job.state, desk.leased, desk.lines) == ("answered", 0, [])
    shutil.rmtree(desk.root / "checkpoint-10")
    desk.killed()
    desk.finish()
    assert (desk.steps, desk.count("peeled"), len(desk.lines)) == ([10], 1, 1)
    assert desk.run.ledger.bound_memory() == MEMORY
    assert [state.phase for state in desk.run.ledger.rule_states() if state.subject == "model.layers.1"] == ["firing"]
    assert len([words for words in desk.told("alert") if "firing" in words]) == 1


def test_an_answer_that_came_too_late_for_a_round_is_kept(desk: Desk) -> None:
    """An agent that is stopped after the worker has answered does not have it peeled again."""
    desk.put(10)
    answer: Future[Peeled] = Future()
    desk.answer = lambda _: answer
    desk.round()
    answer.set_result(peeled(desk.asked[0]))
    desk.stopped()
    desk.finish()
    assert (desk.steps, desk.count("peeled")) == ([10], 1)


def test_a_stop_gives_the_device_back_when_the_worker_has_ended(desk: Desk) -> None:
    """Not before: another worker would share the device with one that still ends."""
    desk.put(10)
    answer: Future[Peeled] = Future()
    desk.answer = lambda _: answer
    desk.round()
    desk.run.close()
    assert desk.leased == 1
    answer.set_exception(GaveWay("the agent ends", remedy=""))
    assert desk.leased == 0


def test_a_reader_that_hangs_up_does_not_undo_a_finding(desk: Desk) -> None:
    """`watch --json | head -1`: the report is final, and owed once, before it is printed."""

    def hang_up(_line: str) -> None:
        raise BrokenPipeError

    desk.put(10)
    desk.emit = hang_up
    with pytest.raises(BrokenPipeError):
        desk.finish()
    owed = desk.owed()
    assert desk.count("peeled") == 1
    desk.stopped()
    desk.finish()
    assert desk.steps == [10]
    assert desk.owed() == owed


class Faults:
    """Lets the `first` use of something, and `length - 1` after it, fail."""

    def __init__(self, first: int, length: int) -> None:
        self.uses = 0
        self._failing = range(first, first + length)

    @property
    def strikes(self) -> bool:
        self.uses += 1
        return self.uses - 1 in self._failing


def act(step: int, *errors: PeelError) -> Callable[[Request], Answer]:
    """Fails so at one step, and then as often as there are errors; block 1 is idle at step 10."""
    left = list(errors)

    def answer(request: Request) -> Answer:
        if request.ref.step == step and left:
            return left.pop(0)
        return Peeled(report_of(request, idle=1 if request.ref.step == 10 else None), MEMORY)

    return answer


def through(desk: Desk) -> None:
    """Rounds until nothing is left to wait for, whatever some of them raise."""
    for _ in range(40):
        try:
            if desk.run.is_idle(desk.round(40.0)):
                return
        except (sqlite3.OperationalError, OSError):
            continue
    raise AssertionError("rounds without an end")


def story(desk: Desk) -> dict[str, Any]:
    """A training in which everything happens once, and what is known at its end."""
    for step, errors in ((10, [DEATH]), (20, [GaveWay("on it", remedy="")]), (30, [DEATH] * DEATHS), (40, [REFUSED])):
        desk.put(step, at=desk.now)
        desk.answer = act(step, *errors)
        through(desk)
    lost = desk.put(50, at=desk.now)

    def rotate(request: Request) -> Answer:
        if request.ref.step != 50:
            return peeled(request)
        shutil.rmtree(lost)
        return TORN

    desk.answer = rotate
    through(desk)
    desk.run.policy = desk.run._queue.policy = "latest"
    for step in (60, 70, 80):
        desk.put(step, at=desk.now + step)
    through(desk)
    query = desk.ledger._database.query
    return {
        "outcomes": query("SELECT step, outcome FROM checkpoints ORDER BY step"),
        "jobs": query("SELECT * FROM jobs"),
        "tallies": desk.tallies,
        "peels": Counter(desk.steps),
        "states": [(s.rule, s.subject, s.phase, s.streak, s.since_step, s.told) for s in desk.run.ledger.rule_states()],
        "alerts": len(desk.alerts()),
        "owed": Counter((destination, lane) for destination, lane, *_ in desk.owed()),
        "reports": len(desk.lines),
        "device": desk.leased,
        "held": desk.held,
    }


OUTCOMES = [
    (10, "peeled"), (20, "peeled"), (30, "failed"), (40, "refused"), (50, "vanished"),
    (60, "passed over"), (70, "passed over"), (80, "peeled"),
]  # fmt: skip


def test_a_story(desk: Desk) -> None:
    """What the trials below are held against."""
    told = story(desk)
    assert told["outcomes"] == OUTCOMES
    assert told["tallies"] == {
        "found": 8, "answered": 3, "worker_died": 1 + DEATHS, "gave_way": 1, "peeled": 3, "failed": 1, "refused": 1,
        "vanished": 1, "passed_over": 2,
    }  # fmt: skip
    assert told["peels"] == {10: 2, 20: 2, 30: DEATHS, 40: 1, 50: 1, 80: 1}
    assert (told["jobs"], told["device"], told["reports"], told["alerts"]) == ([], 0, 3, 2)
    assert told["held"] == ["checkpoint-80"]


def test_every_event_about_a_checkpoint_names_its_step(desk: Desk) -> None:
    """In its words, which a person reads, and in its field, which a machine does: many saves may have one path."""
    story(desk)
    about = [event for event in desk.events if event.kind != "alert"]
    assert {event.kind for event in about} == {
        "peeling", "worker died", "measured", "gave way", "failed", "refused", "missed", "passed over"
    }  # fmt: skip
    for event in about:
        assert event.step is not None, event.words
        assert f"step {event.step}" in event.words


@pytest.mark.parametrize("length", [1, 3])
def test_a_full_disk_loses_nothing_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Whichever transactions fail for want of room, the end is the same: each peeled, counted, told and owed as often
    as if there had been room.
    """
    real = Database.transaction
    wanted, transactions = _told_without_faults(tmp_path / "sound", monkeypatch)
    for first in range(0, transactions, length):
        faults = Faults(first, length)

        @contextmanager
        def full(database: Database, faults: Faults = faults) -> Iterator[sqlite3.Connection]:
            if faults.strikes:
                raise FULL_DISK
            with real(database) as connection:
                yield connection

        (tmp_path / str(first)).mkdir()
        desk = Desk(tmp_path / str(first))
        with monkeypatch.context() as fault:
            fault.setattr(Database, "transaction", full)
            told = story(desk)
        desk.ledger.close()
        assert faults.uses > first
        assert told == wanted, f"transaction {first}"


def _told_without_faults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], int]:
    """The story, and how many transactions it takes."""
    real, count = Database.transaction, [0]

    def counted(database: Database) -> Any:
        count[0] += 1
        return real(database)

    folder.mkdir()
    desk = Desk(folder)
    with monkeypatch.context() as watched:
        watched.setattr(Database, "transaction", counted)
        told = story(desk)
    desk.ledger.close()
    return told, count[0]


def test_a_log_that_cannot_be_written_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever line of the log fails, what it tells of is done once."""
    wanted, _ = _told_without_faults(tmp_path / "sound", monkeypatch)
    lines = 0
    while True:
        (tmp_path / str(lines)).mkdir()
        desk, faults = Desk(tmp_path / str(lines)), Faults(lines, 1)

        def write(_line: str, faults: Faults = faults) -> None:
            if faults.strikes:
                raise OSError(28, "No space left on device")

        desk.write = write
        told = story(desk)
        desk.ledger.close()
        if faults.uses <= lines:
            break
        assert told == wanted | {"reports": told["reports"]}, f"line {lines}"
        lines += 1
    assert lines > 15


# ---------------------------------------------------------------- what comes and goes in the folder


def test_looking_goes_on_while_a_checkpoint_is_peeled(desk: Desk) -> None:
    """What is written and rotated away during one long peel is held, and peeled after it; then only the last one is
    held, for the next to be compared with.
    """
    desk.put(10)
    answer: Future[Peeled] = Future()
    desk.answer = lambda request: answer if request.ref.step == 10 else peeled(request)
    desk.round()
    path = desk.put(20)
    desk.round()
    shutil.rmtree(path)
    answer.set_result(peeled(desk.asked[0]))
    desk.finish()
    assert (desk.steps, desk.count("peeled"), desk.count("vanished")) == ([10, 20], 2, 0)
    assert desk.asked[1].ref.in_place().path.exists()
    assert desk.held == ["checkpoint-20"]


def test_what_vanishes_is_counted_and_no_error(desk: Desk) -> None:
    """A checkpoint that is removed while it is read, where nothing could be held, is told, and is not refused."""
    path = desk.put(10)

    def remove(_request: Request) -> Answer:
        shutil.rmtree(path)
        return TornCheckpoint("vanished while it was read", remedy="")

    desk.answer = remove
    desk.finish()
    assert (desk.count("vanished"), desk.run.ledger.refused()) == (1, ())
    assert desk.told("missed") == [f"{path} (step 10) was removed before it could be peeled"]


@pytest.mark.parametrize("what", ["removed", "another in its place"])
def test_what_an_earlier_agent_found_and_is_gone_counts(desk: Desk, what: str) -> None:
    """A checkpoint that waited, could not be held, and was removed or overwritten while no agent was there is lost."""
    desk.put(10)
    desk.free = False
    desk.round()
    assert len(desk.run.ledger.jobs()) == 1
    shutil.rmtree(desk.run.ledger.folder / "pins")
    if what == "removed":
        shutil.rmtree(desk.root / "checkpoint-10")
    else:
        desk.put(10, at=desk.now)
    desk.free = True
    desk.killed()
    desk.finish()
    assert (desk.count("vanished"), desk.count("peeled")) == (1, 0 if what == "removed" else 1)
    assert desk.tallies["vanished"] == 1
    assert len(desk.told("missed")) == 1
    assert desk.run.ledger.jobs() == ()


def test_a_folder_that_is_away_says_nothing_of_what_is_in_it(desk: Desk) -> None:
    """Neither what waits nor what an earlier agent found counts as removed while the file system is not there."""
    desk.put(10)
    desk.free = False
    desk.round()
    desk.run._queue._pins.release_all()
    desk.run._queue._waiting = [ref.released() for ref in desk.run._queue._waiting]
    aside = desk.root.with_name("aside")
    for restart in (False, True):
        desk.root.rename(aside)
        if restart:
            shutil.rmtree(desk.run.ledger.folder / "pins", ignore_errors=True)
            desk.killed()
        desk.round()
        desk.round()
        assert (desk.count("vanished"), desk.told("missed")) == (0, [])
        aside.rename(desk.root)
    desk.free = True
    desk.finish()
    assert (desk.steps, desk.tallies) == ([10], {"found": 1, "answered": 1, "peeled": 1})


def test_a_folder_that_goes_away_under_a_worker(desk: Desk) -> None:
    """What cannot be read for that is tried again after a pause, and is not counted as removed."""
    desk.put(10)
    aside = desk.root.with_name("aside")

    def away(request: Request) -> Answer:
        if aside.exists() or len(desk.asked) > 1:
            return peeled(request)
        desk.root.rename(aside)
        return TornCheckpoint("no such file", remedy="")

    desk.answer = away
    desk.round()
    desk.round()
    assert desk.steps == [10]
    aside.rename(desk.root)
    desk.round(AWAY_PAUSE_SECONDS)
    desk.finish()
    assert (desk.steps, desk.tallies) == ([10, 10], {"found": 1, "answered": 1, "peeled": 1})


def test_what_is_peeled_is_never_missed(desk: Desk) -> None:
    """A root that is away for a moment, and back, and away again is no reason to peel anything twice."""
    desk.put(10)
    aside = desk.root.with_name("aside")
    for away in (False, False, True, False, True, False, False):
        if away != aside.exists():
            desk.root.rename(aside) if away else aside.rename(desk.root)
        desk.round()
    desk.round(60.0)
    desk.round()
    assert (desk.steps, desk.tallies) == ([10], {"found": 1, "answered": 1, "peeled": 1})


def is_copy(request: Request) -> bool:
    """Whether what is to be read is no link to the trainer's file."""
    held = request.ref.in_place().path
    return held != request.ref.path and all(file.stat().st_nlink == 1 for file in held.iterdir())


def test_one_that_was_torn_is_copied_the_next_time(desk: Desk) -> None:
    """A file that is rewritten in place faster than it is peeled would else be torn for ever."""
    desk.put(10)
    copies: list[bool] = []

    def answer(request: Request) -> Answer:
        copies.append(is_copy(request))
        return peeled(request) if copies[-1] else TORN

    desk.answer = answer
    desk.finish()
    assert copies == [False, True]


# ---------------------------------------------------------------- a file that is rewritten in place


class Overwriting:
    """A trainer that saves into one file again and again, and an engine that reads the saves only at the end."""

    def __init__(self, desk: Desk, name: str = "ckpt.pt") -> None:
        self.desk, self.path = desk, desk.root / name
        self.read: list[int | None] = []
        self._first: Future[Peeled] = Future()
        desk.answer = self._answer

    def save(self, *steps: int) -> None:
        for step in steps:
            torch.save({"model": {"w": torch.zeros(4)}, "model_args": {}, "iter_num": step}, self.path)
            os.utime(self.path, (float(step), float(step)))  # two saves of this test may be within one tick
            self.desk.round()

    def peel(self) -> None:
        """The engine answers for the first save, and for all that wait."""
        request = self.desk.asked[0]
        self._first.set_result(self._peeled(request))
        self.desk.finish()

    def _answer(self, request: Request) -> Answer:
        return self._first if len(self.desk.asked) == 1 else self._peeled(request)

    def _peeled(self, request: Request) -> Peeled:
        found = locate(request.ref.in_place().path)
        assert fingerprint(found.files) == request.ref.fingerprint
        assert found.step == request.ref.step
        self.read.append(found.step)
        return peeled(request)


SAVES = tuple(range(100, 1100, 100))


def test_every_save_into_one_file_is_peeled(desk: Desk) -> None:
    """With `all`, saves that come faster than peels are each read whole, with their own step; one copy is left."""
    trainer = Overwriting(desk)
    trainer.save(*SAVES)
    assert len(desk.held) == len(SAVES)
    trainer.peel()
    assert trainer.read == list(SAVES)
    assert desk.tallies == {"found": 10, "answered": 10, "peeled": 10}
    assert (desk.held, desk.told("torn"), desk.told("missed")) == (["ckpt.pt"], [], [])


def test_the_last_save_into_one_file_is_peeled(desk: Desk) -> None:
    """With `latest` each save overtakes the one that waits, so that one copy waits; each is told by its step."""
    desk.stopped(backlog="latest")
    trainer = Overwriting(desk)
    trainer.save(*SAVES)
    assert len(desk.held) == 2, "the one in work, and the last"
    trainer.peel()
    assert trainer.read == [SAVES[0], SAVES[-1]]
    assert desk.count("passed over") == len(SAVES) - 2
    assert all(f"(step {step})" in words for step, words in zip(SAVES[1:-1], desk.told("passed over"), strict=True))


def test_copies_survive_a_restart(desk: Desk) -> None:
    """What was saved into one file before the agent was killed is peeled by the next one."""
    trainer = Overwriting(desk)
    desk.free = False
    trainer.save(100, 200, 300)
    desk.killed()
    desk.free = True
    desk.answer = trainer._peeled
    desk.finish()
    assert trainer.read == [100, 200, 300]


@pytest.mark.parametrize("once", [False, True])
def test_a_file_that_is_seen_rewritten_is_copied_from_then_on(desk: Desk, once: bool) -> None:
    """A name with a number is held by a link first, as is any with `--once`; what the link lost is counted and told."""
    desk.stopped(once=once)
    trainer = Overwriting(desk, "ckpt.pt" if once else "epoch_1.pt")
    desk.free = False
    trainer.save(100, 200, 300)
    assert [words.partition(" was ")[2] for words in desk.told("missed")] == ["written over before it could be peeled"]
    assert "(step 100)" in desk.told("missed")[0]
    desk.free = True
    desk.answer = trainer._peeled
    desk.finish()
    assert (trainer.read, desk.count("vanished")) == ([200, 300], 1)


def test_a_file_that_is_replaced_needs_no_copy(desk: Desk) -> None:
    """One that is written aside and renamed is another file: a link goes on showing the old one."""
    path = desk.root / "epoch_1.pt"
    trainer = Overwriting(desk, "aside.tmp")
    desk.free = False
    for step in (100, 200, 300):
        trainer.save(step)
        trainer.path.rename(path)
        desk.round()
    desk.free = True
    desk.answer = trainer._peeled
    desk.finish()
    assert trainer.read == [100, 200, 300]
    assert all(held.stat().st_nlink > 1 or held.stat().st_ino != path.stat().st_ino for held in pinned(desk))


def pinned(desk: Desk) -> list[Path]:
    return list((desk.run.ledger.folder / "pins").glob("*/*"))


def test_no_room_for_a_copy_is_said_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file is read where it is; a save that came before its turn is lost, counted and told."""
    total = shutil.disk_usage(desk.root).total
    usage = shutil.disk_usage(desk.root)._replace(free=Reserve().of(total))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    trainer = Overwriting(desk)
    desk.free = False
    trainer.save(100, 200, 300)
    assert desk.held == []
    (words,) = desk.told("space")
    assert "no room" in words
    assert "ckpt.pt" in words
    assert len(desk.told("missed")) == 2
    desk.free = True
    desk.answer = trainer._peeled
    desk.finish()
    assert trainer.read == [300]


@pytest.mark.parametrize(
    ("keep_free_gb", "is_kept"), [(None, False), (0.0, True), (1e-3, True), (1.0, False), (1e9, False)]
)
def test_how_much_stays_free_is_a_setting(
    keep_free_gb: float | None, is_kept: bool, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 0.1 GiB free of 100: what waits is held by its links, and what is rewritten in place by a copy, when the
    setting lets it; else that is told, with the setting to lower.
    """
    usage = shutil.disk_usage(desk.root)._replace(total=100 * 2**30, free=2**30 // 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    desk.stopped(keep_free_gb=keep_free_gb)
    desk.free = False
    desk.put(10)
    Overwriting(desk).save(100)
    assert desk.held == (["checkpoint-10", "ckpt.pt"] if is_kept else [])
    told = desk.told("space")
    assert len(told) == (0 if is_kept else 2)
    assert [words for words in told if "lower [watch] keep_free_gb" not in words] == []


def test_room_is_made_for_the_next_copy(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room for one copy only, the last checkpoint is let go of, and with `latest` the one that waits."""
    real = shutil.disk_usage(desk.root)

    def usage(_: Path) -> Any:
        return real._replace(free=real.total if not pinned(desk) else Reserve().of(real.total))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    desk.stopped(backlog="latest")
    trainer = Overwriting(desk)
    desk.answer = trainer._peeled
    trainer.save(100)
    desk.finish()
    assert desk.held == ["ckpt.pt"]
    desk.free = False
    trainer.save(200, 300)
    desk.free = True
    desk.finish()
    assert trainer.read == [100, 300]
    assert len(desk.told("passed over")) == 1
    (words,) = desk.told("space")
    assert "estimated from sketches" in words


def test_files_that_cannot_be_held_are_told_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no link can be made, checkpoints are read where they are; the reason and the folder are named."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", forbidden)
    for step in (10, 20):
        desk.put(step)
    desk.finish()
    assert desk.steps == [10, 20]
    (words,) = desk.told("space")
    assert f"cannot be held in {desk.run.ledger.folder / 'pins'}: Operation not permitted" in words


@pytest.mark.parametrize(
    ("name", "step", "has_step"),
    [
        ("run/ckpt.pt", 500, False),
        ("run/last.ckpt", 500, False),
        ("run/best.safetensors", None, False),
        ("run/latest/", 500, False),
        ("run/checkpoint-500/", 500, True),
        ("run/epoch=3-step=500.ckpt", 500, True),
        ("run/epoch_3.pt", 500, True),
        ("run/iter_0000500.pt", None, True),
        (".", 500, False),
        (".", None, False),
    ],
)
def test_names_with_a_step(tmp_path: Path, name: str, step: int | None, has_step: bool) -> None:
    """A number in the name says that the next save has another; the watched place itself has one only if it is the
    step.
    """
    root = tmp_path / "experiment-7" / "run"
    root.mkdir(parents=True)
    path = root if name == "." else root.parent / name
    if name.endswith("/"):
        path.mkdir()
    elif name != ".":
        path.touch()
    ref = CheckpointRef(path, step, "torch", "f", 0.0)
    assert names_step(ref, root) == has_step


def test_a_watched_place_with_its_step(tmp_path: Path) -> None:
    """`watch run/checkpoint-500` is a checkpoint that nobody writes again; `experiment-7` is a place that is written to
    all the time.
    """
    assert names_step(CheckpointRef(tmp_path / "checkpoint-500", 500, "torch", "f", 0.0), tmp_path / "checkpoint-500")
    assert not names_step(CheckpointRef(tmp_path / "experiment-7", 500, "torch", "f", 0.0), tmp_path / "experiment-7")


@pytest.mark.parametrize("settle", [0.5, 10.0])
def test_saves_that_never_rest_are_told_once(desk: Desk, settle: float) -> None:
    """The remedy is named; when one is at rest after all, it is peeled, and that it rests is told."""
    desk.run.source = desk.run._intake.source = Folder(desk.root, registry.formats(), Settling(settle))
    trainer = Overwriting(desk)
    desk.answer = trainer._peeled
    desk.round()
    for step in range(100, 900, 100):
        desk.now += settle * 0.8
        trainer.desk.now -= 1.0
        trainer.save(step)
    (words,) = desk.told("trouble began")
    assert f"{trainer.path}: it is saved again before it has been at rest for {settle:g} s" in words
    assert "settle_seconds" in words
    assert trainer.read == []
    desk.round(settle)
    desk.finish()
    assert (trainer.read, len(desk.told("trouble ended"))) == ([800], 1)


@pytest.mark.parametrize(("backlog", "steps"), [("latest", [30]), ("every:2", [20, 30]), ("all", [10, 20, 30])])
def test_a_backlog(desk: Desk, backlog: str, steps: list[int]) -> None:
    """What is passed over is said and remembered: a restart does not come back to it, unless it is told to."""
    for step in (10, 20, 30):
        desk.put(step)
    for _ in range(2):
        desk.stopped(backlog=backlog)
        desk.finish()
    assert desk.steps == steps
    assert desk.count("passed over") == len(desk.told("passed over")) == 3 - len(steps)
    desk.stopped(backlog="all")
    desk.finish()
    assert sorted(step or 0 for step in desk.steps) == [10, 20, 30]


def test_a_look_that_fails_is_an_alert_too(desk: Desk) -> None:
    """Rules that go by the clock are judged whatever becomes of the look, and resolved when looks succeed again."""
    desk.stopped(rules=(Rule("away", "agent_error", threshold=5), Rule("late", "no_checkpoint", threshold=5)))
    desk.put(1)
    desk.finish()

    def fail(_now: float) -> Observed:
        desk.run.services.journal.begin("run/look", "the directory may not be listed", run="run")
        raise PermissionError("no")

    look, desk.run.source.look = desk.run.source.look, fail  # type: ignore[method-assign]
    for seconds in (1.0, 1e6):
        with pytest.raises(PermissionError):
            desk.round(seconds)
    assert any("ALERT firing: the directory may not be listed" in words for words in desk.told("alert"))
    desk.run.source.look = look  # type: ignore[method-assign]
    desk.run.services.journal.end("run/look", "it is listed again")
    desk.round()
    assert "ALERT resolved: all is well again" in desk.told("alert")[-1]


def test_history_is_no_observation(desk: Desk) -> None:
    """A checkpoint that comes after a later one is reported; alerts and the running minimum stay as they were."""
    desk.put(30)
    desk.answer = lambda request: Peeled(
        report_of(request, idle=1), MEMORY if request.ref.step == 30 else YesMemory("p", "another", ())
    )
    desk.finish()
    states = desk.run.ledger.rule_states()
    desk.put(10, at=1.0)
    desk.finish()
    assert [request.earlier for request in desk.asked] == [None, None]
    assert (desk.run.ledger.bound_memory(), desk.run.ledger.rule_states()) == (MEMORY, states)
    assert desk.count("peeled") == 2


def test_what_is_held_survives_a_death_and_a_rotation(desk: Desk) -> None:
    """The next tries, by this agent and by another, read the files that were held for the first."""
    path = desk.put(10)
    seen: list[bool] = []

    def die(request: Request) -> Answer:
        seen.append(request.ref.in_place().path.exists())
        shutil.rmtree(path, ignore_errors=True)
        return DEATH if len(seen) < DEATHS else peeled(request)

    desk.answer = die
    while len(seen) < 2:
        desk.round()
    desk.round()
    desk.stopped()
    for _ in range(5):
        desk.round(max(DEATH_PAUSE_SECONDS))
    assert seen == [True] * DEATHS
    assert (desk.count("peeled"), desk.tallies.get("vanished")) == (1, None)


def test_a_restart_takes_up_what_was_held(desk: Desk) -> None:
    """A checkpoint that was rotated away while the agent was down is peeled when it is back, and held for the next one
    alone: a later start neither peels it again nor lets go of it.
    """
    path = desk.put(10)
    desk.answer = lambda _: Future()
    desk.round()
    desk.stopped()
    shutil.rmtree(path)
    desk.answer = peeled
    desk.finish()
    assert desk.steps == [10, 10]
    assert desk.asked[1].ref.in_place().path.exists()
    assert desk.held == ["checkpoint-10"]
    desk.stopped()
    desk.finish()
    assert (desk.steps, desk.held) == ([10, 10], ["checkpoint-10"])


# ---------------------------------------------------------------- the checkpoint before


def sketches(step: int | None) -> Sketches:
    return Sketches({"w": f"{step}"}, {"w": (1,)}, "float32")


class Comparing:
    """Stands in for the worker: keeps what each checkpoint was to be held against, and the trainer rotates it away."""

    def __init__(self, rotates: bool = True) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.why_not: dict[int | None, str | None] = {}
        self.keep: list[bool] = []
        self._rotates = rotates

    def __call__(self, request: Request) -> Answer:
        step, before = request.ref.step, request.before
        assert before is not None
        files = None if before.ref is None else (before.ref.path.name, before.ref.in_place().path.exists())
        self.seen.append((step, before.step, files, before.sketches))
        self.why_not[step] = before.why_not
        self.keep.append(request.keep_sketches)
        if self._rotates:
            shutil.rmtree(request.ref.path)
        return peeled(request, sketches=sketches(step))


@pytest.fixture
def compare(desk: Desk) -> Comparing:
    desk.answer = compare = Comparing()
    return compare


def test_each_checkpoint_is_held_against_the_one_before(desk: Desk, compare: Comparing) -> None:
    """The files of the one observed last are at hand, though rotated away, and its sketches; also after a restart."""
    for step in (10, 20):
        desk.put(step)
    desk.finish()
    assert desk.held == ["checkpoint-20"]
    desk.stopped()
    desk.put(30)
    desk.finish()
    assert compare.seen == [
        (10, None, None, None),
        (20, 10, ("checkpoint-10", True), sketches(10)),
        (30, 20, ("checkpoint-20", True), sketches(20)),
    ]
    assert compare.why_not == {10: "it is the first checkpoint of this run", 20: None, 30: None}
    assert compare.keep == [True, True, True]
    assert desk.held == ["checkpoint-30"]


def test_without_its_files_the_sketches_are_left(desk: Desk, compare: Comparing) -> None:
    """Where somebody removed what was held, a checkpoint is still compared with the sketches in the ledger."""
    desk.put(10)
    desk.finish()
    desk.stopped()
    shutil.rmtree(desk.run.ledger.folder / "pins")
    desk.killed()
    desk.put(20)
    desk.finish()
    assert compare.seen[1] == (20, 10, None, sketches(10))
    assert compare.why_not[20] is None


def test_a_full_disk_lets_go_of_the_last(desk: Desk, compare: Comparing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training needs the room: what is held for comparison alone is let go of, and that is said."""
    desk.put(10)
    desk.finish()
    assert desk.held == ["checkpoint-10"]
    desk.put(20)
    monkeypatch.setattr(Pins, "crowded", lambda _: True)
    desk.round()
    assert compare.seen[1] == (20, 10, None, sketches(10))
    assert any("the last checkpoint is not kept for comparison" in words for words in desk.told("space"))


def test_a_refused_checkpoint_is_nothing_to_compare_with(desk: Desk, compare: Comparing) -> None:
    """What could not be peeled is let go of; the next one is held against the last that was."""
    desk.put(10)
    desk.finish()
    path = desk.put(20)
    desk.answer = failing(REFUSED)
    desk.finish()
    assert desk.held == ["checkpoint-10"]
    shutil.rmtree(path)
    desk.put(30)
    desk.answer = compare
    desk.finish()
    assert compare.seen[1] == (30, 10, ("checkpoint-10", True), sketches(10))


def test_what_is_out_of_order_is_held_against_nothing(desk: Desk) -> None:
    """A checkpoint that comes late, and the first after the run went back, are told so; the one after is compared."""
    desk.answer = compare = Comparing(rotates=False)
    desk.put(30)
    desk.finish()
    desk.put(10, at=1.0)
    desk.finish()
    assert desk.held == ["checkpoint-30"]
    for number, step in enumerate((20, 25), start=1):
        desk.put(step, at=desk.now + 100.0 * number)
        desk.finish()
    assert compare.seen == [
        (30, None, None, None),
        (10, None, None, None),
        (20, None, None, None),
        (25, 20, ("checkpoint-20", True), sketches(20)),
    ]
    assert compare.why_not == {
        30: "it is the first checkpoint of this run",
        10: "it has no place in the order of the run: no step, or an earlier one that came late",
        20: "the run went back: the checkpoint before is of step 30",
        25: None,
    }
    assert compare.keep == [True, False, True, True]
    assert desk.held == ["checkpoint-25"]


# ---------------------------------------------------------------- alerts whose rule or run is gone


@pytest.fixture
def firing(desk: Desk) -> Desk:
    """A run whose rule `idle` fires for one block."""
    desk.put(10)
    desk.answer = lambda request: Peeled(report_of(request, idle=1), None)
    desk.finish()
    assert [state.subject for state in desk.run.ledger.rule_states() if state.phase == "firing"] == ["model.layers.1"]
    desk.events.clear()
    return desk


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rules": ()}, "its rule was renamed or removed"),
        ({"rules": (dataclasses.replace(IDLE, name="sleepy"),)}, "its rule was renamed or removed"),
        ({"ended": "the run is not watched any more"}, "the run is not watched any more"),
    ],
)
def test_what_fires_is_resolved_once_with_the_reason(firing: Desk, change: dict[str, Any], reason: str) -> None:
    """The notice says why and keeps its severity, and the tracker's tag follows; a further start adds nothing."""
    before = firing.owed()
    firing.stopped(**change)
    if "ended" not in change:
        firing.round()
    (words,) = firing.told("alert")
    assert f"ALERT resolved: model.layers.1: {reason}" in words
    assert "since step 10" in words
    owed = firing.owed()[len(before) :]
    assert [(destination, lane) for destination, lane, *_ in owed] == [
        ("jsonl", "numbers"), ("jsonl", "files"), ("pager", "notices")
    ]  # fmt: skip
    assert '"peel.alert.idle": "inactive"' in owed[0][3]
    assert '"severity": "critical"' in owed[2][3]
    assert reason in firing.alerts()[-1]
    alerts = firing.alerts()
    firing.stopped()
    firing.round()
    assert (firing.alerts(), firing.owed()[len(before) :]) == (alerts, owed)


def test_a_run_that_is_gone_holds_no_file(firing: Desk) -> None:
    """What was held for a run that nobody watches any more is let go of."""
    firing.put(20)
    firing.free = False
    firing.round()
    assert firing.held == ["checkpoint-10", "checkpoint-20"]
    firing.stopped(ended="it is not watched any more")
    assert firing.held == []


def test_a_rule_that_stays_keeps_its_alert(firing: Desk) -> None:
    """Another severity, another rule beside it, or a restart alone tells nobody anything."""
    for rules in ((IDLE,), (dataclasses.replace(IDLE, severity="warning"), Rule("more", "layer_changed"))):
        firing.stopped(rules=rules)
        firing.finish()
        assert firing.told("alert") == []
        assert [state.rule for state in firing.run.ledger.rule_states() if state.phase == "firing"] == ["idle"]
