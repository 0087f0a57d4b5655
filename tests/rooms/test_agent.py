"""The agent with its threads and signals, beside an engine that answers when the test lets it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from peel_agent import agent as agents
from peel_agent import watcher as watchers
from peel_agent.agent import END_SECONDS, NOT_WATCHED, Agent
from peel_agent.config import (
    DeviceSettings,
    HealthSettings,
    RunSettings,
    Settings,
    SinkSettings,
    TrackerSettings,
    WatchSettings,
)
from peel_agent.destinations import Address
from peel_agent.errors import CheckpointError, ConfigurationError, GaveWay
from peel_agent.figures import HEARTBEAT
from peel_agent.identity import run_key
from peel_agent.ledger import Ledger, Reader
from peel_agent.records import Peeled, PeelSettings, Request
from peel_agent.run import Run
from peel_agent.watch import Folder, Observed
from peel_agent.work import INTERRUPTIONS
from tests.rooms.test_run import IDLE, report_of
from tests.rooms.test_watch_scan import write_checkpoint
from tests.waiting import wait_for

LOOK = Folder.look


class HandEngine:
    """Answers what `let` allows, at once; the rest when `answer` is called."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.open: dict[str, tuple[Request, Future[Peeled]]] = {}
        self.let: Callable[[Request], bool] = lambda _: True
        self.make: Callable[[Request], Peeled] = lambda request: Peeled(report_of(request), None)
        self.gave_way: list[str] = []
        self.most = 0
        self._lock = threading.Lock()

    def submit(self, request: Request) -> Future[Peeled]:
        answer: Future[Peeled] = Future()
        with self._lock:
            self.asked.append(request)
            self.open[request.ref.fingerprint] = (request, answer)
            self.most = max(self.most, len(self.open))
        if self.let(request):
            self.answer()
        return answer

    def answer(self) -> None:
        """All that is open."""
        for request, answer in self._taken(list(self.open)):
            try:
                answer.set_result(self.make(request))
            except Exception as error:
                answer.set_exception(error)

    def give_way(self, fingerprint: str, why: str) -> None:
        for _, answer in self._taken([fingerprint]):
            self.gave_way.append(why)
            answer.set_exception(GaveWay(why, remedy=""))

    def memory_bytes(self) -> int | None:
        return None

    def close(self, seconds: float) -> None:
        for fingerprint in list(self.open):
            self.give_way(fingerprint, "the agent ends")

    def _taken(self, fingerprints: list[str]) -> list[tuple[Request, Future[Peeled]]]:
        with self._lock:
            return [self.open.pop(own) for own in fingerprints if own in self.open]

    @property
    def steps(self) -> list[tuple[str, int | None]]:
        """Which run, and which step, in the order in which they were begun."""
        return [(request.ref.path.parent.name, request.ref.step) for request in self.asked]


class Desk:
    """What is owed stays owed, and is seen in the ledger; `addresses` are where it would go."""

    def __init__(self, *_: object) -> None:
        self.addresses: Sequence[Address] = ()
        self.fault: Exception | None = None

    def address(self, addresses: Sequence[Address]) -> None:
        self.addresses = addresses

    def tick(self) -> None:
        if self.fault is not None:
            raise self.fault

    def busy(self, run: str, *, is_busy: bool) -> None: ...
    def owed(self) -> None: ...
    def close(self) -> None: ...
    def drain(self, seconds: float, *, stopping: object) -> None: ...
    def look(self) -> None: ...

    def unsent(self) -> dict[object, object]:
        return {}

    not_there = False


class Station:
    """A folder with the watched places `a` and `b`, an agent's state, and the agents that a test starts there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.engine = HandEngine()
        self.said: list[str] = []
        self.settings = self.of("a")
        self.looks: Counter[str] = Counter()
        self.reload: Callable[[], Settings] = lambda: self.settings
        self.emit: Callable[[str], None] | None = None
        self.seconds_to_end = 0.0
        self.agent: Agent | None = None
        for name in ("a", "b"):
            (folder / name).mkdir()

    def run_of(self, name: str, **options: Any) -> RunSettings:
        watch = WatchSettings(str(self.folder / name), settle_seconds=0.0, poll_seconds=0.02, backlog="all")
        own = RunSettings(name, watch, tracker=TrackerSettings(use=("jsonl",)), rules=(IDLE,))
        return dataclasses.replace(own, **options)

    def of(self, *names: str, sinks: tuple[str, ...] = ("pager",), **options: Any) -> Settings:
        """Settings that watch these places, each with these options."""
        return Settings(
            device=DeviceSettings(select="cpu"),
            health=HealthSettings(listen=""),
            tracker=TrackerSettings(use=("jsonl",)),
            sinks=tuple(SinkSettings("jsonl", name) for name in sinks),
            runs=tuple(self.run_of(name, **options) for name in names),
        )

    def put(self, name: str, *steps: int) -> None:
        for step in steps:
            write_checkpoint(self.folder / name / f"checkpoint-{step}", step)

    def watch(self, script: Callable[[], None], *, once: bool = False) -> int:
        """An agent in this thread, while `script` runs in another; then it is told to end."""
        ledger = Ledger(self.state)
        self.agent = Agent(
            self.settings,
            ledger,
            say=self.said.append,
            emit=self.emit,
            reload=self._reload,
            engine=self.engine,
        )
        failure: list[BaseException] = []
        over, told = threading.Event(), [0.0]
        before = len(self.said)

        def act() -> None:
            wait_for(lambda: over.is_set() or any("watching" in line for line in self.said[before:]))
            try:
                if not over.is_set():
                    script()
            except BaseException as error:
                failure.append(error)
            told[0] = time.monotonic()
            if not over.is_set() and not once:
                os.kill(os.getpid(), signal.SIGTERM)

        other = threading.Thread(target=act)
        other.start()
        try:
            status = self.agent.run(once=once)
        finally:
            self.seconds_to_end = time.monotonic() - told[0]
            over.set()
            other.join()
            ledger.close()
        if failure:
            raise failure[0]
        return status

    def _reload(self) -> Settings:
        return self.reload()

    def hang_up(self, words: str | None = None) -> None:
        """The configuration is read anew, until it is in force, or until these words are said of it."""
        agent, before = self.agent, self.times(words or "")
        assert agent is not None
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: agent._settings is self.settings if words is None else self.times(words) > before)

    def times(self, words: str) -> int:
        return sum(words in line for line in self.said)

    def tallies(self, name: str) -> dict[str, float]:
        reader = Reader(self.state)
        try:
            return next((run.tallies for run in reader.runs() if run.name == name), {})
        finally:
            reader.close()

    def wait_peeled(self, name: str, count: int) -> None:
        wait_for(lambda: self.tallies(name).get("peeled") == count)

    def rows(self, sql: str) -> list[Any]:
        with sqlite3.connect(self.state / "ledger.sqlite") as connection:
            return connection.execute(sql).fetchall()

    def has_asked(self, times: int) -> bool:
        return len(self.engine.asked) == times

    def wait_looked(self, name: str, times: int = 2) -> None:
        before = self.looks[name]
        wait_for(lambda: self.looks[name] >= before + times)


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Station]:
    """With short pauses, and without a courier."""
    station = Station(tmp_path)
    monkeypatch.setattr(watchers, "LOOK_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(watchers, "FIRST_TROUBLE_SECONDS", 0.02)
    monkeypatch.setattr(watchers, "LONGEST_TROUBLE_SECONDS", 0.1)
    monkeypatch.setattr(agents, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(agents, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(agents, "Dispatch", Desk)

    def look(folder: Folder, now: float) -> Observed:
        station.looks[folder.root.name] += 1
        return LOOK(folder, now)

    monkeypatch.setattr(Folder, "look", look)
    yield station
    for _, answer in station.engine.open.values():
        answer.cancel()


def look_as(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], None]) -> None:
    """Before each look at this place, `act`."""
    before = Folder.look

    def look(folder: Folder, now: float) -> Observed:
        if folder.root.name == name:
            act()
        return before(folder, now)

    monkeypatch.setattr(Folder, "look", look)


# ---------------------------------------------------------------- several runs


def test_two_runs_share_one_processor_fairly(station: Station) -> None:
    """One peel at a time, and the run that has waited is next: however much another has to do, they take turns."""
    station.settings = station.of("a", "b")
    station.put("a", 10, 20, 30)
    station.put("b", 10, 20, 30)
    station.engine.let = lambda _: False

    def script() -> None:
        for number in range(1, 7):
            wait_for(functools.partial(station.has_asked, number))
            for name in ("a", "b"):
                station.wait_looked(name)
            station.engine.answer()
        station.wait_peeled("a", 3)
        station.wait_peeled("b", 3)

    assert station.watch(script) == 0
    places = [place for place, _ in station.engine.steps]
    assert places in (["a", "b"] * 3, ["b", "a"] * 3)
    assert station.engine.most == 1


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error", "/run/a"), ValueError("a plug-in's bug")])
def test_a_place_that_fails_does_not_stop_another(
    station: Station, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """It is told once when it begins, while it lasts the agent is not ready, it is told once when it ends, and what
    came meanwhile is peeled.
    """
    station.settings = station.of("a", "b")
    broken = threading.Event()
    broken.set()

    def act() -> None:
        if broken.is_set():
            raise fault

    look_as(monkeypatch, "a", act)
    words = "a plug-in's bug" if isinstance(fault, ValueError) else "Input/output error"

    def troubles() -> list[str]:
        return list(json.loads((station.state / HEARTBEAT).read_text())["troubles"])

    def script() -> None:
        station.put("a", 10)
        station.put("b", 10)
        station.wait_peeled("b", 1)
        wait_for(lambda: station.times(words) == 1)
        wait_for(lambda: any(words in trouble for trouble in troubles()))
        broken.clear()
        station.wait_peeled("a", 1)
        wait_for(lambda: troubles() == [])

    assert station.watch(script) == 0
    assert (station.times(words), station.times("is looked at again")) == (1, 1)


def test_a_place_that_is_away_and_comes_back(station: Station) -> None:
    """A folder that is not there is told once, and once that it is back; nothing of it counts as lost."""
    station.put("a", 10)
    away = station.folder / "aside"

    def script() -> None:
        station.wait_peeled("a", 1)
        (station.folder / "a").rename(away)
        wait_for(lambda: station.times("it is not there now") == 1)
        station.wait_looked("a", 3)
        away.rename(station.folder / "a")
        station.put("a", 20)
        station.wait_peeled("a", 2)

    assert station.watch(script) == 0
    assert (station.times("it is not there now"), station.times("is there again")) == (1, 1)
    assert station.tallies("a").get("vanished") is None
    assert station.engine.steps == [("a", 10), ("a", 20)]


def test_a_place_that_hangs_stops_neither_the_other_nor_the_end(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that never returns concerns its own run alone, and SIGTERM ends the agent within END_SECONDS all the same:
    what hangs is left behind, and told.
    """
    station.settings = station.of("a", "b")
    hanging, let_go = threading.Event(), threading.Event()

    def act() -> None:
        hanging.set()
        let_go.wait()

    look_as(monkeypatch, "a", act)

    def script() -> None:
        wait_for(hanging.is_set)
        station.put("b", 10, 20)
        station.wait_peeled("b", 2)

    try:
        assert station.watch(script) == 0
        assert station.seconds_to_end < END_SECONDS
        assert not let_go.is_set()
        assert station.times("a: its place hangs; it is left behind") == 1
    finally:
        let_go.set()


def test_a_users_mistake_ends_one_run_of_several(station: Station) -> None:
    """What only another configuration mends stops that run, and makes the agent unready; once it is mended, a reload
    takes the run up again and the trouble ends. The only run of an agent ends the agent.
    """
    station.settings = station.of("a", "b")
    station.put("a", 10)
    wrong = ConfigurationError("a probe of another vocabulary", remedy="another probe")

    def make(request: Request) -> Peeled:
        if request.ref.path.parent.name == "a" and request.peel.effort != "full":
            raise wrong
        return Peeled(report_of(request), None)

    station.engine.make = make

    def script() -> None:
        wait_for(lambda: station.times("another vocabulary -> another probe") == 1)
        station.put("b", 10)
        station.wait_peeled("b", 1)
        agent = station.agent
        assert agent is not None
        assert any("another vocabulary" in words for words in agent.journal.troubles)
        full = station.run_of("a", peel=PeelSettings(effort="full"))
        station.settings = dataclasses.replace(station.settings, runs=(full, station.run_of("b")))
        station.hang_up()
        station.wait_peeled("a", 1)
        wait_for(lambda: not agent.journal.troubles)

    assert station.watch(script) == 0
    station.settings = station.of("a")
    station.put("a", 20)
    station.state = station.folder / "another state"
    with pytest.raises(ConfigurationError, match="another vocabulary"):
        station.watch(lambda: wait_for(lambda: station.times("another vocabulary -> another probe") == 2))


# ---------------------------------------------------------------- what goes wrong in the agent


def test_a_round_that_fails_does_not_end_the_watch(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told, once, and rounds go on."""
    rounds = []

    def fail(*_: Any) -> Any:
        rounds.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "round", fail)
    assert station.watch(lambda: wait_for(lambda: len(rounds) > 3)) == 0
    assert station.times("No space left") == 1


def test_deliveries_that_cannot_be_looked_for(station: Station) -> None:
    """A ledger that cannot be read, or a courier that cannot be started, is a trouble that passes."""

    def script() -> None:
        assert station.agent is not None
        desk: Any = station.agent._dispatch
        desk.fault = sqlite3.OperationalError("disk I/O error")
        wait_for(lambda: station.times("disk I/O error") == 1)
        desk.fault = OSError(12, "Cannot allocate memory")
        wait_for(lambda: station.times("Cannot allocate memory") == 1)
        desk.fault = None
        wait_for(lambda: station.times("delivery works again") == 1)
        station.put("a", 10)
        station.wait_peeled("a", 1)

    assert station.watch(script) == 0


def test_a_reader_that_hangs_up_ends_the_agent(station: Station) -> None:
    """`watch --json | head -1` ends; the report is final all the same, and the next agent does not repeat it."""

    def hang_up(_line: str) -> None:
        raise BrokenPipeError

    station.put("a", 10)
    station.emit = hang_up
    with pytest.raises(BrokenPipeError):
        station.watch(lambda: wait_for(lambda: any("ending; what is not done" in line for line in station.said)))
    lines: list[str] = []
    station.emit = lines.append
    station.put("a", 20)
    assert station.watch(lambda: station.wait_peeled("a", 2)) == 0
    assert [json.loads(line)["checkpoint"]["step"] for line in lines] == [20]
    assert station.engine.steps == [("a", 10), ("a", 20)]


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_while_it_peels(station: Station, stop: signal.Signals, status: int) -> None:
    """The worker is ended, and the checkpoint, rotated meanwhile, is peeled at the next start without any blame.

    SIGTERM is how a service is ended well; Ctrl-C ends with the status that shells give it.
    """
    station.put("a", 10)
    station.engine.let = lambda _: len(station.engine.asked) > INTERRUPTIONS + 1

    def script() -> None:
        wait_for(lambda: bool(station.engine.open))
        os.kill(os.getpid(), stop)

    for number in range(INTERRUPTIONS + 1):
        assert station.watch(script) == status
        shutil.rmtree(station.folder / "a" / "checkpoint-10", ignore_errors=True)
        assert station.rows("SELECT state, deaths, interruptions FROM jobs") == [("waiting", 0, 0)], number
    assert station.watch(lambda: station.wait_peeled("a", 1)) == 0
    assert set(station.engine.gave_way) == {"the agent ends"}


# ---------------------------------------------------------------- a back-fill


def test_a_back_fill_with_nothing_readable(station: Station) -> None:
    """Exit status 3, what was expected, and at the end once more why each was refused; the next start tries anew."""
    station.put("a", 10)

    def refuse(_: Request) -> Peeled:
        raise CheckpointError("NaN in it", remedy="take another")

    station.engine.make = refuse
    assert station.watch(lambda: None, once=True) == 3
    assert station.times("NaN in it") == 2
    assert station.times(f"nothing readable in {station.folder / 'a'}") == 1
    station.engine.make = lambda request: Peeled(report_of(request), None)
    assert station.watch(lambda: None, once=True) == 0
    assert station.watch(lambda: None, once=True) == 0
    assert station.engine.steps == [("a", 10)] * 2


def test_a_back_fill_of_two_runs(station: Station) -> None:
    """It ends when both have nothing left; one that had nothing readable makes the status 3."""
    station.settings = station.of("a", "b")
    station.put("a", 10, 20)
    assert station.watch(lambda: None, once=True) == 3
    assert station.times("nothing readable in") == 1
    station.put("b", 10)
    assert station.watch(lambda: None, once=True) == 0
    assert sorted(station.engine.steps) == [("a", 10), ("a", 20), ("b", 10)]


# ---------------------------------------------------------------- reload


def test_a_reload_adds_and_removes_runs(station: Station) -> None:
    """SIGHUP: a run that is new is watched, one that is gone is not, its alerts are resolved with the reason, its files
    are let go of, and its worker gives the device up; added again, it goes on with what it knows.
    """
    station.engine.make = lambda request: Peeled(report_of(request, idle=1), None)
    station.put("a", 10)
    alone, both, other = station.of("a"), station.of("a", "b"), station.of("b")

    def script() -> None:
        station.wait_peeled("a", 1)
        station.settings = both
        station.hang_up()
        station.put("b", 10)
        station.wait_peeled("b", 1)
        station.engine.let = lambda request: request.ref.path.parent.name == "b"
        station.put("a", 20)
        wait_for(lambda: bool(station.engine.open))
        station.put("b", 20)
        station.settings = other
        station.hang_up()
        station.wait_peeled("b", 2)
        station.engine.let = lambda _: True
        station.settings = both
        station.hang_up()
        station.wait_peeled("a", 2)

    station.settings = alone
    assert station.watch(script) == 0
    assert station.engine.gave_way[0] == "its run was reloaded or ended"
    notices = [json.loads(line) for (line,) in station.rows("SELECT line FROM alerts WHERE run LIKE 'a-%'")]
    assert [(notice["state"], notice["step"]) for notice in notices] == [
        ("firing", 10), ("resolved", 10), ("firing", 20)
    ]  # fmt: skip
    assert NOT_WATCHED in notices[1]["text"]
    assert station.tallies("a")["peeled"] == 2
    assert Counter(station.engine.steps)["a", 10] == 1


def test_a_run_that_was_taken_out_holds_no_file(station: Station) -> None:
    """Neither one that goes by a reload, nor one that was taken out while no agent was there."""
    station.settings = station.of("a", "b")
    station.put("a", 10)
    station.put("b", 10)

    def pins(name: str) -> list[Path]:
        return list((station.state / "runs").glob(f"{name}-*/pins/*"))

    def script() -> None:
        station.wait_peeled("a", 1)
        station.wait_peeled("b", 1)
        assert pins("a")
        assert pins("b")
        station.settings = station.of("a")
        station.hang_up()
        wait_for(lambda: not pins("b"))

    assert station.watch(script) == 0
    assert pins("a")
    station.settings = station.of("b")
    assert station.watch(lambda: None) == 0
    assert not pins("a")


def test_a_run_that_was_taken_out_resolves_its_alerts(station: Station) -> None:
    """Also one that was taken out while no agent was there: once, for that reason, to its tracker and to the sinks."""
    station.engine.make = lambda request: Peeled(report_of(request, idle=1), None)
    station.put("a", 10)
    assert station.watch(lambda: station.wait_peeled("a", 1)) == 0
    owed = len(station.rows("SELECT id FROM deliveries"))
    station.settings = station.of("b")
    for _ in range(2):
        assert station.watch(lambda: station.wait_looked("b")) == 0
        alerts = [json.loads(line) for (line,) in station.rows("SELECT line FROM alerts")]
        assert [alert["state"] for alert in alerts] == ["firing", "resolved"]
        assert alerts[1]["text"].startswith(f"model.layers.1: {NOT_WATCHED}")
        assert alerts[1]["severity"] == IDLE.severity
        rest = station.rows("SELECT destination, lane, body FROM deliveries ORDER BY id")[owed:]
        assert [row[:2] for row in rest] == [("jsonl", "numbers"), ("jsonl", "files"), ("pager", "notices")]
        assert json.loads(rest[0][2])["tags"] == {"peel.alert.idle": "inactive"}
    assert station.times(f"ALERT resolved: model.layers.1: {NOT_WATCHED}") == 1


def test_a_reload_changes_a_run(station: Station) -> None:
    """The peel that runs gives way and is made again as the new settings say, without blame; other runs go on."""
    station.settings = station.of("a", "b")
    station.engine.let = lambda request: request.peel.effort == "full"
    station.put("a", 10)

    def script() -> None:
        wait_for(lambda: bool(station.engine.open))
        assert station.agent is not None
        before = dict(station.agent._watchers)
        full = station.run_of("a", peel=PeelSettings(effort="full"), rules=())
        station.settings = dataclasses.replace(station.settings, runs=(full, station.run_of("b")))
        station.hang_up()
        station.wait_peeled("a", 1)
        after = station.agent._watchers
        assert [key for key in before if after[key] is not before[key]] == [key for key in before if key[0] == "a"]

    assert station.watch(script) == 0
    assert [request.peel.effort for request in station.engine.asked] == ["standard", "full"]
    assert station.tallies("a").get("worker_died") is None


def test_a_reload_changes_what_stays_free(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a nearly full disk a checkpoint that waits is held, and its file copied, from the reload on that says so."""
    usage = shutil.disk_usage(station.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=usage.total // 100))
    station.engine.let = lambda _: False
    station.put("a", 10, 20)

    def held() -> int:
        return len(list(station.state.glob("runs/*/pins/*/checkpoint-*")))

    def script() -> None:
        wait_for(lambda: any("not kept from rotation" in line for line in station.said))
        watch = dataclasses.replace(station.run_of("a").watch, keep_free_gb=0.0)
        station.settings = dataclasses.replace(station.settings, runs=(station.run_of("a", watch=watch),))
        before = held()
        station.hang_up()
        wait_for(lambda: held() == 2)
        assert before < 2

    assert station.watch(script) == 0


def test_a_reload_changes_the_sinks(station: Station) -> None:
    """A sink that is added gets the next notices of runs that go on as they were."""
    station.engine.make = lambda request: Peeled(report_of(request, idle=1), None)
    station.settings = station.of("a", sinks=())

    def script() -> None:
        station.settings = station.of("a", sinks=("pager", "chat"))
        station.hang_up()
        station.put("a", 10)
        station.wait_peeled("a", 1)
        assert station.agent is not None
        desk: Any = station.agent._dispatch
        assert {one.name for one in desk.addresses} == {"jsonl", "pager", "chat"}

    assert station.watch(script) == 0
    owed = station.rows("SELECT destination FROM deliveries WHERE lane = 'notices'")
    assert sorted(owed) == [("chat",), ("pager",)]


@pytest.mark.parametrize(
    "bad",
    [
        ConfigurationError("`watch.setle_seconds` is unknown", remedy="did you mean `settle_seconds`?"),
        Settings(),
        Settings(runs=(RunSettings("b", WatchSettings("/"), tracker=TrackerSettings(use=("no such tracker",))),)),
    ],
)
def test_a_bad_file_is_refused(station: Station, bad: Settings | ConfigurationError) -> None:
    """It is told with its remedy, and everything stays as it was."""

    def reload() -> Settings:
        if isinstance(bad, ConfigurationError):
            raise bad
        return bad

    def script() -> None:
        station.reload = reload
        station.hang_up("the new configuration is refused, and the old one stays")
        station.put("a", 10)
        station.wait_peeled("a", 1)

    assert station.watch(script) == 0
    (line,) = [line for line in station.said if "is refused" in line]
    assert " -> " in line
    assert station.rows("SELECT name, ended FROM runs") == [("a", 0)]


def test_a_reload_on_a_full_disk_is_tried_again(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may pass does not end the agent: the new configuration comes into force when it can."""
    full = threading.Event()
    full.set()
    real = Ledger.run

    def run(ledger: Ledger, *names: str) -> Any:
        if full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        return real(ledger, *names)

    def script() -> None:
        monkeypatch.setattr(Ledger, "run", run)
        station.settings = station.of("a", "b")
        station.hang_up("is not in force yet: database or disk is full")
        station.put("a", 10)
        station.wait_peeled("a", 1)
        full.clear()
        station.put("b", 10)
        station.wait_peeled("b", 1)

    assert station.watch(script) == 0
    assert (station.times("is not in force yet"), station.times("the new configuration is in force")) == (1, 1)


def test_a_reload_of_a_place_that_hangs(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are never two at work for one run: its new settings wait until the old look has ended; others go on."""
    monkeypatch.setattr(agents, "END_SECONDS", 0.2)
    station.settings = station.of("a", "b")
    hangs, let_go, looking = threading.Event(), threading.Event(), []

    def act() -> None:
        looking.append(threading.current_thread())
        if hangs.is_set():
            let_go.wait()

    look_as(monkeypatch, "a", act)

    def script() -> None:
        hangs.set()
        station.wait_looked("b", 3)
        before = len(looking)
        station.settings = station.of("a", "b", peel=PeelSettings(effort="full"))
        station.hang_up("a look of a hangs")
        station.put("b", 10)
        station.wait_peeled("b", 1)
        assert len(looking) <= before + 1
        hangs.clear()
        let_go.set()
        station.put("a", 10)
        station.wait_peeled("a", 1)

    try:
        assert station.watch(script) == 0
    finally:
        let_go.set()
    assert {request.peel.effort for request in station.engine.asked} == {"full"}
    assert station.times("a look of a hangs") == 1


def test_a_run_is_its_name_its_place_and_what_was_pinned() -> None:
    """Each of them makes another run; the key is fit for a folder's name."""
    keys = {run_key(*own) for own in (("a/b", "/x", ""), ("a b", "/x", ""), ("a/b", "/y", ""), ("a/b", "/x", "run 1"))}
    assert len(keys) == 4
    assert all(key.startswith("a_b-") and key.replace("_", "").replace("-", "").isalnum() for key in keys)
