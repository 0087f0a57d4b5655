"""From the ledger's deliveries to one destination: order, patience, dead letters, and what is said."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from peel_agent import registry
from peel_agent.deliver import ALERTS_FILE, AWAY_SECONDS, DENIED_SECONDS, LONGEST_PAUSE, Carrier
from peel_agent.destinations import Address
from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.ledger import Lane, Ledger, Outbox, RunLedger, open_beside
from peel_agent.notify import to_sinks
from peel_agent.publish import to_trackers
from peel_agent.records import CheckpointRef, Debt, Notice, NoticeGroup, Publication, Verdict, plain
from peel_agent.spi import Sink, Tracker
from peel_plugins.durable_lines import DurableLines

KEY = "run-1"
NUMBERS, FILES, NOTICES = (Lane(KEY, "there", kind) for kind in ("numbers", "files", "notices"))


@dataclass(frozen=True)
class FaultySettings:
    """None."""


class Faulty:
    """A destination, of publications and of notices, that raises what it is told to and otherwise remembers.

    All connections of a test are one, as all connections of a real one write to one place.
    """

    name = "faulty"
    settings = FaultySettings

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.fault: Exception | None = None
        self.fault_of_files: Exception | None = None
        self.taken: list[Any] = []
        self.prepared = self.closed = 0

    def connect(self, settings: FaultySettings, **_: Any) -> Any:
        return self

    def prepare(self) -> None:
        self.prepared += 1

    def publish(self, publication: Publication) -> None:
        fault = self.fault_of_files if publication.files else self.fault
        if fault is not None:
            raise fault
        self.taken.append(publication)

    def deliver(self, group: NoticeGroup) -> None:
        if self.fault is not None:
            raise self.fault
        self.taken.append(group)

    def where(self) -> str:
        return "nowhere"

    def close(self) -> None:
        self.closed += 1


PLUGIN = Faulty()


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """The faulty plug-in, installed as a tracker and as a sink, with nothing in it."""
    real = registry.entry_points
    extra = {
        f"peel_agent.{kind}": EntryPoint("faulty", f"{__name__}:PLUGIN", f"peel_agent.{kind}")
        for kind in ("trackers", "sinks")
    }

    def with_faulty(*, group: str) -> list[EntryPoint]:
        return [*real(group=group), *([extra[group]] if group in extra else [])]

    monkeypatch.setattr(registry, "entry_points", with_faulty)
    PLUGIN.forget()
    return PLUGIN


def publication(step: int) -> Publication:
    return Publication(step, 1000 * step, {"peel/loss": 1.5}, {"peel.zone": "caution"}, {f"peel/{step}.json": "{}"})


def notice(name: str, step: int = 5) -> Notice:
    return Notice(name, "r", "warning", "firing", "model.layers.3", step, f"text of {name}", step)


def finish(run: RunLedger, step: int, *names: str, destinations: bool = True) -> None:
    """A checkpoint made final that owes `there` its publication, with these notices."""
    notices = [notice(name, step) for name in names]
    debts = (
        *to_trackers(publication(step), ["there"], key=f"f{step}", with_alerts=bool(names)),
        *to_sinks(notices, ["there"], (), run="mine", at=float(step)),
    )
    run.record(
        CheckpointRef(Path(f"/c-{step}"), step, "f", f"f{step}", float(step)),
        report="{}",
        verdict=Verdict((), tuple(notices)),
        alert_lines={one.id: json.dumps({"id": one.id}) for one in notices},
        memory=None,
        debts=debts if destinations else (),
    )


class Desk:
    """A ledger that owes three publications and two groups of notices, and a clock that is set by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 1_000_000.0
        with closing(Ledger(folder)) as ledger:
            run = ledger.run(KEY, "mine", "/run")
            for step, names in ((1, ("a",)), (2, ()), (3, ("b", "c"))):
                finish(run, step, *names)

    @contextmanager
    def carrier(self, lane: Lane = NUMBERS) -> Iterator[Carrier]:
        """A carrier of its own, as of a courier that was started anew."""
        kind = "sink" if lane.kind == "notices" else "tracker"
        address = Address(kind, "there", "faulty", {}, KEY, "/run", self.folder)  # type: ignore[arg-type]
        with closing(open_beside(self.folder, writing=True)) as database:
            yield Carrier(lane, address, Outbox(database), lambda: self.now)

    @contextmanager
    def outbox(self) -> Iterator[Outbox]:
        with closing(open_beside(self.folder, writing=True)) as database:
            yield Outbox(database)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def drained(carrier: Carrier) -> None:
    while carrier.step().sent:
        pass


# ---------------------------------------------------------------- what is owed


def test_a_publication_is_owed_in_two_lanes() -> None:
    """Each tracker is owed numbers with tags, and files, under one key; what is empty is not owed."""
    sent = publication(5)
    numbers, files = plain(dataclasses.replace(sent, files={})), plain(dataclasses.replace(sent, metrics={}, tags={}))
    cases: dict[str, tuple[Publication, bool, list[tuple[str, Any]]]] = {
        "whole": (sent, False, [("numbers", numbers), ("files", files)]),
        "with alerts": (sent, True, [("numbers", numbers), ("files", files)]),
        "a file alone": (dataclasses.replace(sent, metrics={}, tags={}), False, [("files", files)]),
        "numbers alone": (dataclasses.replace(sent, files={}), False, [("numbers", numbers)]),
        "tags alone": (
            dataclasses.replace(sent, metrics={}, files={}),
            False,
            [("numbers", {**numbers, "metrics": {}})],
        ),
        "an alert alone": (
            dataclasses.replace(sent, metrics={}, tags={}, files={}),
            True,
            [("files", {**files, "files": {}})],
        ),
    }
    for name, (one, with_alerts, expected) in cases.items():
        debts = to_trackers(one, ["a", "b"], key="k", with_alerts=with_alerts)
        wanted = [
            Debt(tracker, lane, "k", body, with_alerts=with_alerts and lane == "files")  # type: ignore[arg-type]
            for tracker in ("a", "b")
            for lane, body in expected
        ]
        assert list(debts) == wanted, name


def test_notices_of_one_moment_are_one_group_for_each_sink() -> None:
    """Its id is that of its notices and its run, its text has a line for each; without a notice nothing is owed."""
    assert to_sinks([], ["a"], (), run="mine", at=1.0) == ()
    one, other = to_sinks([notice("a"), notice("b")], ["a", "b"], (), run="mine", at=1.0)
    assert (one.destination, other.destination, one.lane) == ("a", "b", "notices")
    assert one.body == other.body
    assert one.body["text"] == "mine: WARNING firing: text of a\nmine: WARNING firing: text of b"
    assert (one.body["run"], one.body["at"], one.key) == ("mine", 1.0, one.body["id"])
    (later,) = to_sinks([notice("a"), notice("b")], ["a"], (), run="mine", at=9.0)
    (shorter,) = to_sinks([notice("a")], ["a"], (), run="mine", at=1.0)
    (elsewhere,) = to_sinks([notice("a"), notice("b")], ["a"], (), run="another", at=1.0)
    assert later.key == one.key
    assert len({one.key, shorter.key, elsewhere.key}) == 3


# ---------------------------------------------------------------- order


def test_oldest_first_and_gone_when_taken(desk: Desk, faulty: Faulty) -> None:
    """Everything owed to a lane is sent in order, once, and counted; other lanes' is left alone."""
    with desk.carrier() as carrier:
        drained(carrier)
        assert carrier.step().wait is None
    assert [one.step for one in faulty.taken] == [1, 2, 3]
    with desk.outbox() as outbox:
        assert outbox.owed() == {FILES: (3, 0), NOTICES: (2, 0)}
        tallied = dict(outbox._database.query("SELECT what, amount FROM tallies"))
    assert tallied["delivered/there/numbers"] == 3.0


def test_groups_of_notices_come_whole(desk: Desk, faulty: Faulty) -> None:
    """A sink gets each moment's notices together, in order, with their ids."""
    with desk.carrier(NOTICES) as carrier:
        drained(carrier)
    assert [[one.id for one in group.notices] for group in faulty.taken] == [["a"], ["b", "c"]]
    assert all(isinstance(group, NoticeGroup) for group in faulty.taken)
    assert faulty.taken[0].at == 1.0


def test_a_lane_that_is_refused_holds_back_no_other(desk: Desk, faulty: Faulty) -> None:
    """While the files of a tracker are refused, its numbers arrive, all of them."""
    faulty.fault_of_files = DestinationDenied("the store refuses", remedy="ask for the right")
    with desk.carrier(FILES) as files, desk.carrier(NUMBERS) as numbers:
        assert "files for there: the store refuses -> ask for the right" in str(files.step().trouble)
        drained(numbers)
        assert [one.step for one in faulty.taken] == [1, 2, 3]
        assert files.step().wait is not None
        faulty.fault_of_files = None
        desk.now += LONGEST_PAUSE
        outcome = files.step()
        assert (outcome.sent, outcome.passed) == (True, True)
        drained(files)
    assert [list(one.files) for one in faulty.taken[3:]] == [
        ["peel/1.json", ALERTS_FILE],
        ["peel/2.json"],
        ["peel/3.json", ALERTS_FILE],
    ]


# ---------------------------------------------------------------- patience

FAULTS: dict[str, tuple[Exception, tuple[float, float], str]] = {
    "away": (DestinationUnavailable("t is away", remedy="wait"), AWAY_SECONDS, "t is away -> wait"),
    "denied": (DestinationDenied("t says 403", remedy="log in"), DENIED_SECONDS, "t says 403 -> log in"),
    "of a library": (RuntimeError("from\na\x1blibrary"), AWAY_SECONDS, r"RuntimeError: from a\x1blibrary"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_pauses_grow_and_survive_the_courier(desk: Desk, faulty: Faulty, fault: str) -> None:
    """Each pause is twice the one before, jittered, up to the longest, by carriers that know nothing of each other.

    What nobody expects of a library counts as away; a refusal is tried again at a slower pace.
    """
    faulty.fault, (first, longest), words = FAULTS[fault]
    pauses: list[float] = []
    for attempt in range(1, 10):
        with desk.carrier() as carrier:
            outcome = carrier.step()
        assert outcome.trouble == f"numbers for there: {words}"
        assert outcome.wait is not None
        pauses.append(outcome.wait)
        with desk.carrier() as carrier:
            assert carrier.step().wait == pytest.approx(outcome.wait)  # it waits, and does not try
            assert carrier.step().trouble is None
        with desk.outbox() as outbox:
            head = outbox.head(NUMBERS)
        assert head is not None
        assert (head.attempts, head.key) == (attempt, "f1")
        assert head.why == words.partition(" -> ")[0]
        desk.now += outcome.wait
    for attempt, pause in enumerate(pauses):
        assert 0.8 <= pause / min(first * 2**attempt, longest) <= 1.2
    faulty.fault = None
    with desk.carrier() as carrier:
        drained(carrier)
    assert [one.step for one in faulty.taken] == [1, 2, 3]


def test_attempts_without_end_are_no_error(desk: Desk, faulty: Faulty) -> None:
    """After weeks away the pause is still the longest one."""
    faulty.fault = DestinationUnavailable("away", remedy="wait")
    with desk.outbox() as outbox:
        outbox._database.query("UPDATE deliveries SET attempts = 100000")
    with desk.carrier() as carrier:
        outcome = carrier.step()
    assert outcome.wait is not None
    assert outcome.wait <= 1.2 * AWAY_SECONDS[1]


@pytest.mark.parametrize("days", [1, 365])
def test_a_clock_that_goes_back_postpones_nothing_for_days(desk: Desk, faulty: Faulty, days: int) -> None:
    """A next try that only another clock can have set counts as now."""
    faulty.fault = DestinationUnavailable("away", remedy="wait")
    with desk.carrier() as carrier:
        carrier.step()
        desk.now -= 86_400.0 * days
        faulty.fault = None
        assert carrier.step().sent


def test_at_once_does_not_wait(desk: Desk, faulty: Faulty) -> None:
    """`resend` by hand and the end of `--once` try what was put off."""
    faulty.fault = DestinationUnavailable("away", remedy="wait")
    with desk.carrier() as carrier:
        carrier.step()
        faulty.fault = None
        assert not carrier.step().sent
        assert carrier.step(at_once=True).sent


# ---------------------------------------------------------------- dead letters


def test_what_will_never_be_taken_blocks_nothing(desk: Desk, faulty: Faulty) -> None:
    """A permanent refusal is told once and kept with its reason; what comes after it is sent."""
    faulty.fault = DeliveryError("metrics are malformed", remedy="report it")
    with desk.carrier() as carrier:
        outcome = carrier.step()
        assert outcome.buried is not None
        assert "numbers for there: metrics are malformed" in outcome.buried
        assert "peel-agent deliveries list" in outcome.buried
        faulty.fault = None
        drained(carrier)
    assert [one.step for one in faulty.taken] == [2, 3]
    with desk.outbox() as outbox:
        (dead,) = outbox.dead()
        assert (dead.key, dead.why, dead.attempts, dead.lane) == ("f1", "metrics are malformed", 1, NUMBERS)
        assert outbox.owed()[NUMBERS] == (0, 1)
        assert NUMBERS not in outbox.lanes()


@pytest.mark.parametrize("which", ["all", "by number", "another"])
def test_dead_letters_are_sent_again_on_demand(desk: Desk, faulty: Faulty, which: str) -> None:
    """`resend` takes up all of them, or those named, with the bytes that they were owed with."""
    faulty.fault = DeliveryError("no", remedy="none")
    with desk.carrier() as carrier:
        carrier.step()
        carrier.step()
    faulty.fault = None
    with desk.outbox() as outbox:
        second = outbox.dead()[1]
        chosen = {"all": None, "by number": (second.id,), "another": (99_999,)}[which]
        assert outbox.retry(chosen) == {"all": 2, "by number": 1, "another": 0}[which]
    with desk.carrier() as carrier:
        drained(carrier)
    assert [one.step for one in faulty.taken] == {"all": [1, 2, 3], "by number": [2, 3], "another": [3]}[which]
    assert faulty.taken[0] == dataclasses.replace(publication(faulty.taken[0].step), files={})


def test_resend_ends_a_pause_too(desk: Desk, faulty: Faulty) -> None:
    """Once its cause is mended, nobody needs to wait for the next try."""
    faulty.fault = DestinationDenied("no", remedy="none")
    with desk.carrier() as carrier:
        carrier.step()
        faulty.fault = None
        with desk.outbox() as outbox:
            assert outbox.retry() == 1
        assert carrier.step().sent


@pytest.mark.parametrize("body", ["{}", '{"step": 1}', '{"step": 5, "files": 3}'])
@pytest.mark.parametrize("lane", [NUMBERS, NOTICES])
def test_what_cannot_be_read_is_a_dead_letter(desk: Desk, faulty: Faulty, lane: Lane, body: str) -> None:
    """A body that no version of ours can read will not be readable later: the next is sent."""
    with desk.outbox() as outbox:
        head = outbox.head(lane)
        assert head is not None
        outbox._database.query("UPDATE deliveries SET body = ? WHERE id = ?", (body, head.id))
    with desk.carrier(lane) as carrier:
        assert "can read" in str(carrier.step().buried)
        assert carrier.step().sent


# ---------------------------------------------------------------- the same again


class Interrupted(BaseException):
    """The process ends after the destination took it and before the ledger was told."""


@pytest.mark.parametrize("lane", [NUMBERS, FILES, NOTICES], ids=lambda lane: lane.kind)
def test_what_may_have_arrived_is_sent_again_byte_for_byte(
    desk: Desk, faulty: Faulty, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends between sending and remembering sends the same bytes, whatever was found meanwhile."""

    def gone(self: Outbox, owed: object) -> None:
        raise Interrupted

    with desk.carrier(lane) as carrier, monkeypatch.context() as patched:
        patched.setattr(Outbox, "sent", gone)
        with pytest.raises(Interrupted):
            carrier.step()
    with closing(Ledger(desk.folder)) as ledger:
        finish(ledger.run(KEY, "mine", "/run"), 4, "d")
    with desk.carrier(lane) as carrier:
        assert carrier.step().sent
    first, again = (json.dumps(plain(one), sort_keys=True) for one in faulty.taken)
    assert first == again


def test_the_log_of_alerts_is_frozen_when_it_is_owed(desk: Desk, faulty: Faulty) -> None:
    """Each copy of alerts.jsonl ends with the alerts of its own moment, in order, however late it is sent."""
    with closing(Ledger(desk.folder)) as ledger:
        run = ledger.run(KEY, "mine", "/run")
        finish(run, 4, "d")
        finish(ledger.run("another", "another", "/other"), 9, "z", destinations=False)
        run.keep_verdict(Verdict((), ()), {"e": '{"id": "e"}'}, ())
    with desk.carrier(FILES) as carrier:
        drained(carrier)
    logs = {one.step: one.files.get(ALERTS_FILE) for one in faulty.taken}
    assert logs == {
        1: '{"id": "a"}\n',
        2: None,
        3: '{"id": "a"}\n{"id": "b"}\n{"id": "c"}\n',
        4: '{"id": "a"}\n{"id": "b"}\n{"id": "c"}\n{"id": "d"}\n',
    }


# ---------------------------------------------------------------- the connection


def test_the_carrier_passes_on_what_a_plug_in_says(desk: Desk, faulty: Faulty) -> None:
    """Libraries are loaded on demand, a tracker's alone; where it goes and its end are the plug-in's own."""
    for lane, prepared in ((NUMBERS, 1), (NOTICES, 1)):
        with desk.carrier(lane) as carrier:
            carrier.prepare()
            assert (carrier.where(), faulty.prepared) == ("nowhere", prepared)
            carrier.close()
    assert faulty.closed == 2
    tracker: Tracker = faulty  # it is both, for the type checker too
    sink: Sink = faulty
    assert tracker is sink


# ---------------------------------------------------------------- lines of a file


def test_several_lanes_may_write_one_file(tmp_path: Path) -> None:
    """Lines of threads that each have the file open come whole, each once, whoever begins while another one writes."""
    file = tmp_path / "lines.jsonl"
    lines = [json.dumps([number, "x" * 70_000]).encode() + b"\n" for number in range(40)]
    begin = threading.Barrier(8)

    def write(first: int) -> None:
        begin.wait()
        for line in lines[first::4]:  # two threads for each line
            DurableLines(file).append(line)

    threads = [threading.Thread(target=write, args=(first % 4,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = file.read_bytes().splitlines(keepends=True)
    assert sorted(written) == sorted(lines)


def test_a_line_that_another_left_torn_is_cut_off(tmp_path: Path) -> None:
    """Two connections of one file: what one of them could not end does not spoil the other's next line."""
    file = tmp_path / "lines.jsonl"
    one = DurableLines(file)
    one.append(b"first\n")
    with file.open("ab") as other:
        other.write(b"tor")
    one.append(b"second\n")
    assert file.read_bytes() == b"first\nsecond\n"
    file.unlink()
    one.append(b"second\n")
    assert file.read_bytes() == b"second\n"
