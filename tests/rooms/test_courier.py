"""The courier as a process: started when something is owed, it delivers and ends; killed, it loses nothing."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from peel_agent import courier, dispatch
from peel_agent.courier import Courier, Orders
from peel_agent.deliver import LONGEST_PAUSE
from peel_agent.destinations import Address
from peel_agent.dispatch import Dispatch
from peel_agent.journal import Journal
from peel_agent.ledger import COPY, FILE, Lane, Ledger, RunLedger
from peel_agent.notify import to_sinks
from peel_agent.publish import to_trackers
from peel_agent.records import CheckpointRef, Notice, Publication, Verdict, plain
from peel_plugins.sinks.mail import MailSettings
from peel_plugins.sinks.webhook import WebhookSettings
from tests import receivers
from tests.receivers import http_receiver, mail_server, reply
from tests.waiting import wait_for

KEY = "run-1"


def tracker(folder: Path, name: str = "jsonl", file: str = "publications.jsonl", plugin: str = "jsonl") -> Address:
    return Address("tracker", name, plugin, {"path": str(folder / file)}, KEY, "/run", folder)


def sink(folder: Path) -> Address:
    return Address("sink", "jsonl-sink", "jsonl", {"path": str(folder / "notices.jsonl")}, KEY, "/run", folder)


def owe(
    run: RunLedger, steps: range, trackers: tuple[str, ...] = ("jsonl",), sinks: tuple[str, ...] = ("jsonl-sink",)
) -> None:
    """A checkpoint of each step made final, with a notice of its own."""
    for step in steps:
        notice = Notice(f"n{step}", "r", "warning", "firing", "model.layers.3", step, "text", step)
        sent = Publication(step, step, {"peel/loss": 1.5}, {}, {f"peel/{step}.json": "x" * 5000})
        run.record(
            CheckpointRef(Path(f"/c-{step}"), step, "f", f"f{step}", float(step)),
            report="{}",
            verdict=Verdict((), (notice,)),
            alert_lines={notice.id: "{}"},
            memory=None,
            debts=(
                *to_trackers(sent, trackers, key=f"f{step}", with_alerts=True),
                *to_sinks([notice], sinks, (), run="mine", at=float(step)),
            ),
        )


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def steps_of(file: Path, kind: str) -> list[int]:
    """The steps of the publications of one kind in a tracker's file, in order."""
    return [form["step"] for form in map(json.loads, lines(file)) if form[kind]]


class Office:
    """A ledger, a dispatch over it, and what was told."""

    def __init__(self, folder: Path, addresses: tuple[Address, ...]) -> None:
        self.folder, self.addresses = folder, addresses
        self.skew = 0.0
        self.ledger = Ledger(folder)
        self.run = self.ledger.run(KEY, "mine", "/run")
        self.said: list[str] = []
        self.journal = Journal(self.said.append, self.now)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.dispatch = Dispatch(self.ledger, environment, self.journal, self.now, lambda key: f"name of {key}")
        self.dispatch.address(addresses)

    def now(self) -> float:
        return time.time() + self.skew

    @property
    def child(self) -> subprocess.Popen[str] | None:
        return self.dispatch._child

    def tick_until(self, condition: Callable[[], bool]) -> None:
        def turned() -> bool:
            self.dispatch.tick()
            return condition()

        wait_for(turned)

    def owes_nothing(self) -> bool:
        return self.ledger.outbox.lanes() == ()

    def close(self) -> None:
        self.dispatch.close()
        self.ledger.close()


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    """With a tracker and a sink of lines; a courier that died is replaced at once."""
    monkeypatch.setattr(dispatch, "RESTART_SECONDS", 0.0)
    with closing(Office(tmp_path, (tracker(tmp_path), sink(tmp_path)))) as office:
        yield office


# ---------------------------------------------------------------- the process itself


def test_it_delivers_and_ends_with_its_stdin(tmp_path: Path) -> None:
    """Told its orders it sends all that is owed, each once and in order, and ends well when the agent hangs up."""
    with closing(Ledger(tmp_path)) as ledger:
        owe(ledger.run(KEY, "mine", "/run"), range(5))
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "peel_agent.courier"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None
        orders = Orders(tmp_path, (tracker(tmp_path), sink(tmp_path)))
        child.stdin.write(json.dumps(plain(orders)) + "\n")
        child.stdin.flush()
        wait_for(lambda: ledger.outbox.lanes() == ())
        said, _ = child.communicate()
    assert child.returncode == 0
    assert steps_of(tmp_path / "publications.jsonl", "metrics") == list(range(5))
    assert steps_of(tmp_path / "publications.jsonl", "files") == list(range(5))
    assert [json.loads(line)["notices"][0]["id"] for line in lines(tmp_path / "notices.jsonl")] == [
        f"n{step}" for step in range(5)
    ]
    assert {next(iter(json.loads(line))) for line in said.splitlines()} == {"ended"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / FILE).unlink(), "there is no ledger"),
        (lambda folder: (folder / FILE).write_bytes(b"x" * 8192), "cannot be read"),
    ],
    ids=["none", "damaged"],
)
def test_without_a_ledger_it_says_so(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    """A courier that cannot open the ledger ends with a note and a status that is not zero."""
    Ledger(tmp_path).close()
    spoil(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "peel_agent.courier"],
        input=json.dumps(plain(Orders(tmp_path, ()))) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert words in json.loads(done.stdout)["note"]


# ---------------------------------------------------------------- in this process: when it ends


class Served:
    """A courier that is served in a thread, and what it is told and says."""

    def __init__(self, folder: Path, *addresses: Address) -> None:
        self.said: list[dict[str, Any]] = []
        self.told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.courier = Courier(Orders(folder, addresses), lambda line: self.said.append(json.loads(line)))
        self.thread = threading.Thread(target=self.courier.serve, args=(self.told,), daemon=True)

    def has_ended(self) -> bool:
        return not self.thread.is_alive()


def test_it_ends_when_it_is_idle_and_may_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to rest it ends once nothing is owed for a while; told to stay it does not, and is no idler."""
    monkeypatch.setattr(courier, "IDLE_SECONDS", 0.05)
    with closing(Ledger(tmp_path)) as ledger:
        owe(ledger.run(KEY, "mine", "/run"), range(2))
        served = Served(tmp_path, tracker(tmp_path), sink(tmp_path))
        served.thread.start()
        wait_for(lambda: ledger.outbox.lanes() == ())
        assert not served.courier._is_idle()
        served.told.put("rest")
        wait_for(served.has_ended)
    assert steps_of(tmp_path / "publications.jsonl", "metrics") == [0, 1]


def test_it_waits_for_what_is_due_soon_and_not_for_what_is_due_late(tmp_path: Path) -> None:
    """A next try within the idle time keeps it; one that is further off is another courier's."""
    with closing(Ledger(tmp_path)):
        served = Served(tmp_path, tracker(tmp_path))
        served.courier._staying = False
        for due, is_kept in ((courier.IDLE_SECONDS - 1, True), (courier.IDLE_SECONDS + 1, False), (None, False)):
            served.courier._idle_since = time.monotonic() - 2 * courier.IDLE_SECONDS
            for lane in served.courier._lanes:
                lane.due = due
            assert served.courier._is_idle() is not is_kept


@pytest.mark.parametrize("say", ["stop", None])
def test_it_ends_when_it_is_told(tmp_path: Path, say: str | None) -> None:
    """By a word, and by the end of its stdin."""
    with closing(Ledger(tmp_path)):
        served = Served(tmp_path, tracker(tmp_path))
        served.thread.start()
        served.told.put(say)
        wait_for(served.has_ended)
        assert not served.thread.is_alive()


def test_it_ends_when_another_ledger_took_the_place_of_its_own(tmp_path: Path) -> None:
    """What it would read and write is the damaged file; the next courier opens the one that was put back."""
    with closing(Ledger(tmp_path)) as ledger:
        ledger.tend(0.0, every=1.0)
        served = Served(tmp_path, tracker(tmp_path))
        served.thread.start()
        (tmp_path / "copy").write_bytes((tmp_path / COPY).read_bytes())
        (tmp_path / "copy").replace(tmp_path / FILE)
        wait_for(served.has_ended)
        assert not served.thread.is_alive()


# ---------------------------------------------------------------- with the agent's end of it


def test_nothing_owed_starts_nothing(office: Office) -> None:
    """No courier takes memory while there is nothing to send."""
    for _ in range(3):
        office.dispatch.tick()
    assert office.child is None
    assert office.dispatch.drain(0.0) is None


@pytest.mark.parametrize("how", ["owed", "tick", "busy"])
def test_it_is_started_when_something_is_owed(office: Office, how: str) -> None:
    """At once when a checkpoint is final, at the next tick after a restart, and ahead while one is peeled."""
    if how == "busy":
        office.dispatch.busy(KEY, is_busy=True)
        assert office.child is not None
    owe(office.run, range(3))
    if how == "tick":
        office.tick_until(office.owes_nothing)
    else:
        office.dispatch.owed()
        wait_for(office.owes_nothing)
    assert steps_of(office.folder / "publications.jsonl", "metrics") == [0, 1, 2]
    assert office.said == []
    child = office.child
    office.close()
    assert child is not None
    assert child.returncode == 0


def test_drain_tells_where_everything_is(office: Office) -> None:
    """Each lane with what it sent and where it is to be seen, by a courier that was started for it."""
    owe(office.run, range(3))
    ends = office.dispatch.drain(240.0)
    assert ends is not None
    assert office.owes_nothing()
    assert {(end["lane"]["destination"], end["lane"]["kind"]): (end["where"], end["sent"]) for end in ends} == {
        ("jsonl", "numbers"): (f"publications in {office.folder}/publications.jsonl", True),
        ("jsonl", "files"): (f"publications in {office.folder}/publications.jsonl", True),
        ("jsonl-sink", "notices"): (f"notices in {office.folder}/notices.jsonl", True),
    }


def test_drain_tries_what_was_put_off(office: Office) -> None:
    """A destination that was away and is back is not waited for at the end."""
    owe(office.run, range(2))
    for lane in office.ledger.outbox.lanes():
        head = office.ledger.outbox.head(lane)
        assert head is not None
        office.ledger.outbox.postpone(head, office.now() + 250.0, "away")
    assert office.dispatch.drain(240.0) is not None
    assert office.owes_nothing()


def test_killed_again_and_again_it_loses_and_doubles_nothing(office: Office) -> None:
    """With a courier that is killed at any moment and started again, each thing is in the files once, in order."""
    count = 60
    owe(office.run, range(count))
    file = office.folder / "publications.jsonl"
    kills, seen = 0, -1
    while not office.owes_nothing():
        office.dispatch.tick()
        child = office.child
        if child is not None and len(lines(file)) > seen and kills < 8:
            seen = len(lines(file)) + 7 * (kills + 1) % 5
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
        time.sleep(0.002)  # leaves the courier the processor
    office.dispatch.close()
    assert kills == 8
    assert steps_of(file, "metrics") == list(range(count))
    assert steps_of(file, "files") == list(range(count))
    notices = [json.loads(line)["notices"][0]["id"] for line in lines(office.folder / "notices.jsonl")]
    assert notices == [f"n{step}" for step in range(count)]
    assert any("the courier ended with status -9" in line for line in office.said)


def test_a_destination_that_refuses_holds_back_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written is told once with its remedy, the others arrive; once mended, that is told too."""
    monkeypatch.setattr(dispatch, "RESTART_SECONDS", 0.0)
    (tmp_path / "blocked").write_text("a file where a folder is wanted")
    addresses = (tracker(tmp_path), sink(tmp_path), tracker(tmp_path, "bad", "blocked/p.jsonl"))
    with closing(Office(tmp_path, addresses)) as office:
        owe(office.run, range(3), ("jsonl", "bad"))
        assert office.dispatch.drain(240.0) is not None
        assert office.ledger.outbox.owed() == {Lane(KEY, "bad", kind): (3, 0) for kind in ("numbers", "files")}
        assert steps_of(tmp_path / "publications.jsonl", "metrics") == [0, 1, 2]
        assert len(office.journal.troubles) == 2
        assert all("make the file writable" in trouble for trouble in office.journal.troubles)
        assert all("name of run-1: " in line for line in office.said)
        (tmp_path / "blocked").unlink()
        office.ledger.outbox.retry()
        office.dispatch.owed()
        wait_for(lambda: office.owes_nothing() and not office.journal.troubles)
        assert steps_of(tmp_path / "blocked" / "p.jsonl", "metrics") == [0, 1, 2]
        assert sum("are taken again" in line for line in office.said) == 2


def test_a_clock_that_goes_back_starts_a_courier_all_the_same(office: Office) -> None:
    """A next try that only another clock can have set is due."""
    owe(office.run, range(2))
    for lane in office.ledger.outbox.lanes():
        head = office.ledger.outbox.head(lane)
        assert head is not None
        office.ledger.outbox.postpone(head, office.now() + 86_400.0, "set by another clock")
    office.tick_until(office.owes_nothing)
    assert steps_of(office.folder / "publications.jsonl", "metrics") == [0, 1]


def test_what_is_put_off_starts_no_courier_before_its_time(office: Office) -> None:
    """Between tries nothing runs; when the time has come, a tick starts one."""
    owe(office.run, range(1))
    for lane in office.ledger.outbox.lanes():
        head = office.ledger.outbox.head(lane)
        assert head is not None
        office.ledger.outbox.postpone(head, office.now() + LONGEST_PAUSE / 2, "away")
    office.dispatch.tick()
    assert office.child is None
    office.skew = LONGEST_PAUSE
    office.dispatch.tick()
    assert office.child is not None


def test_what_is_owed_to_nobody_configured_waits(office: Office) -> None:
    """A destination that was taken out of the configuration starts no courier, and is served when it is back."""
    addresses = office.addresses
    office.dispatch.address(addresses[1:])
    owe(office.run, range(2))
    office.tick_until(lambda: {lane.destination for lane in office.ledger.outbox.lanes()} == {"jsonl"})
    office.dispatch.close()
    office.dispatch.address(addresses[1:])
    office.dispatch.tick()
    assert office.child is None
    said = [line for line in office.said if "no tracker and no sink" in line]
    assert [line.split(";")[0].split("name of run-1: ")[1] for line in said] == [
        "files that wait for jsonl: 2",
        "numbers that wait for jsonl: 2",
    ]
    office.dispatch.address(addresses)
    office.tick_until(office.owes_nothing)


def test_a_mended_ledger_is_served_by_a_new_courier(office: Office) -> None:
    """After the copy took the place of a damaged ledger, what is owed from then on arrives."""
    owe(office.run, range(2))
    assert office.dispatch.drain(240.0) is not None
    office.ledger.tend(0.0, every=1.0)
    first = office.child
    assert first is not None
    office.ledger._database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    office.ledger._database._connection.execute("PRAGMA cache_size = 0")
    (office.folder / FILE).write_bytes(b"x" * (office.folder / FILE).stat().st_size)
    assert office.ledger.mend() is not None
    owe(office.run, range(2, 4))
    office.dispatch.owed()
    office.tick_until(office.owes_nothing)
    assert office.child is not first
    assert sorted(set(steps_of(office.folder / "publications.jsonl", "metrics"))) == [0, 1, 2, 3]


def test_other_destinations_are_those_of_a_new_courier(office: Office) -> None:
    """After a reload the courier that served the old ones has ended."""
    office.dispatch.busy(KEY, is_busy=True)
    first = office.child
    assert first is not None
    office.dispatch.address(office.addresses)
    assert office.child is first
    office.dispatch.address(office.addresses[:1])
    assert first.wait() == 0


def test_words_that_a_library_prints_are_no_message(office: Office) -> None:
    """A line on the courier's stdout that is not ours is told as such, and those after it are heard."""
    child = subprocess.Popen(
        [sys.executable, "-c", 'print(\'hello\'); print(\'{"buried": "gone", "run": "run-1"}\')'],
        stdout=subprocess.PIPE,
        text=True,
    )
    office.dispatch._listen(child)
    child.wait()
    assert ["the courier said: hello" in office.said[0], "ERROR   name of run-1: gone" in office.said[1]] == [True] * 2


# ---------------------------------------------------------------- sinks that are servers


def test_what_a_server_refused_arrives_later_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A webhook that was busy gets the same event, byte for byte, when it is asked again; the mail went meanwhile."""
    monkeypatch.setattr(dispatch, "RESTART_SECONDS", 0.0)
    certificates = receivers.certificates(tmp_path)
    with http_receiver(reply(503), reply(202)) as hook, mail_server("starttls", certificates.right) as mail:
        to_hook = WebhookSettings(f"http://127.0.0.1:{hook.port}/hook", allow_private=True, timeout_seconds=60)
        to_mail = MailSettings("localhost", "a@b.example", ("c@d.example",), mail.port, ca_file=tmp_path / "ca.pem")
        addresses = (
            Address("sink", "hook", "webhook", plain(to_hook), KEY, "/run", tmp_path),
            Address("sink", "mail", "email", plain(to_mail), KEY, "/run", tmp_path),
        )
        with closing(Office(tmp_path, addresses)) as office:
            owe(office.run, range(1), trackers=(), sinks=("hook", "mail"))
            office.dispatch.owed()
            office.tick_until(lambda: len(hook.requests) == 1 and len(mail.messages) == 1)
            office.tick_until(lambda: any("503" in line for line in office.said))
            wait_for(lambda: office.dispatch.drain(60) is not None and office.owes_nothing())
    first, second = hook.requests
    assert first.body == second.body
    assert mail.messages[0]["Subject"] == "[peel-agent] mine: 1 firing, 0 resolved"


# ---------------------------------------------------------------- whether a destination is there


def test_a_destination_that_is_not_there_is_told_before_anything_is_owed(office: Office, monkeypatch: Any) -> None:
    """It is a trouble until it is there or something was sent to it; nothing is written in order to know."""
    monkeypatch.setattr(dispatch, "LOOK_AGAIN_SECONDS", 0.2)
    place = office.folder / "publications.jsonl"
    place.mkdir()
    office.dispatch.look()
    office.tick_until(lambda: bool(office.journal.troubles))
    (trouble,) = office.journal.troubles
    assert str(place) in trouble
    assert "make the file and its folder writable" in trouble
    assert office.dispatch.not_there
    place.rmdir()
    office.tick_until(lambda: not office.journal.troubles)
    assert not office.dispatch.not_there
    assert not place.exists()
    assert any("jsonl is there" in line and "name of run-1" in line for line in office.said)


def test_what_is_sent_ends_the_trouble(office: Office) -> None:
    """No second look is needed then."""
    place = office.folder / "publications.jsonl"
    place.mkdir()
    office.dispatch.look()
    office.tick_until(lambda: office.dispatch.not_there)
    place.rmdir()
    owe(office.run, range(1))
    office.tick_until(office.owes_nothing)
    wait_for(lambda: not office.journal.troubles and not office.dispatch.not_there)


def test_drain_waits_for_the_look(office: Office) -> None:
    """At the end of a back-fill that owed nothing it is known whether the destinations are there."""
    (office.folder / "publications.jsonl").mkdir()
    office.dispatch.look()
    assert office.dispatch.drain(240.0) is not None
    wait_for(lambda: office.dispatch.not_there)
    assert office.dispatch.unsent() == {}


def test_what_is_owed_to_nobody_of_today_is_not_unsent(office: Office) -> None:
    """A tracker that was taken out of the configuration keeps no back-fill from ending well."""
    owe(office.run, range(2), trackers=("jsonl", "gone"))
    assert {lane.destination for lane in office.dispatch.unsent()} == {"jsonl", "jsonl-sink"}
