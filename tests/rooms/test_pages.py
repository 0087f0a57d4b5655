"""The page and the images of a run: owed after each checkpoint, made by a child process, of the last that is owed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from peel_agent import destinations, registry
from peel_agent.config import TrackerSettings
from peel_agent.deliver import Carrier, Outcome
from peel_agent.destinations import Address, notes, showing
from peel_agent.errors import DestinationUnavailable
from peel_agent.ledger import Extent, Lane, Ledger, Outbox, RunLedger, kept_run_of, open_beside
from peel_agent.publish import history_of, publication_of_the_past, report_line, to_those_that_show, to_trackers
from peel_agent.publish.form import alert_line
from peel_agent.records import CheckpointRef, Notice, Pages, Publication, Verdict
from peel_agent.rendering import Order, drawn, is_kept, pages
from peel_agent.views import Provenance, report_page
from tests import histories
from tests.rooms.test_delivery import Faulty

KEY = "run-1"


class Gallery(Faulty):
    """A tracker that shows pages, and remembers what was in them."""

    shows_pages = True

    def show(self, pages: Pages) -> None:
        if self.fault is not None:
            raise self.fault
        texts = {path: file.read_bytes() for path, file in pages.files.items()}
        self.taken.append((pages.step, pages.timestamp_ms, texts, tuple(pages.images), pages.keep))


PLUGIN = Gallery()


@pytest.fixture(autouse=True)
def gallery(monkeypatch: pytest.MonkeyPatch) -> Gallery:
    """The plug-in, installed as a tracker, with nothing in it."""
    real, point = registry.entry_points, EntryPoint("gallery", f"{__name__}:PLUGIN", "peel_agent.trackers")

    def with_gallery(*, group: str) -> list[EntryPoint]:
        return [*real(group=group), *([point] if group == "peel_agent.trackers" else [])]

    monkeypatch.setattr(registry, "entry_points", with_gallery)
    PLUGIN.forget()
    return PLUGIN


class Desk:
    """A ledger with a run whose checkpoints are made final one by one, and carriers over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finish(self, *steps: int | None, told: tuple[Notice, ...] = (), full: bool = False, owe: bool = True) -> None:
        with closing(Ledger(self.folder)) as ledger:
            run = ledger.run(KEY, "mine", "/run")
            for step in steps:
                _finish(run, step, told, full=full, owe=owe)

    def owe_past(self, tracker: str = "gallery") -> int:
        last = Publication(9, 9000, {}, {"peel.alert.layer_below": "inactive"})
        debts = to_trackers(last, [tracker], key="past", with_alerts=True)
        with closing(Ledger(self.folder)) as ledger:
            return ledger.run(KEY, "mine", "/run").owe_past(tracker, max_series=20, debts=debts)

    @contextmanager
    def carrier(self, kind: str) -> Iterator[Carrier]:
        address = Address("tracker", "gallery", "gallery", {}, KEY, "/run", self.folder / "runs" / KEY)
        with closing(open_beside(self.folder, writing=True)) as database:
            yield Carrier(Lane(KEY, "gallery", kind), address, Outbox(database), lambda: 1e6)

    def send(self, kind: str) -> list[Outcome]:
        """What comes of all that is owed of a lane."""
        outcomes = []
        with self.carrier(kind) as carrier:
            while (outcome := carrier.step(at_once=True)).sent or outcome.buried:
                outcomes.append(outcome)
        return [*outcomes, outcome]

    def owed(self, kind: str) -> int:
        with closing(open_beside(self.folder)) as database:
            return Outbox(database).owed().get(Lane(KEY, "gallery", kind), (0, 0))[0]


def _finish(run: RunLedger, step: int | None, told: tuple[Notice, ...], *, full: bool, owe: bool) -> None:
    name = "export" if step is None else f"f{step}"
    run.record(
        CheckpointRef(Path(f"/run/{name}"), step, "f", name, 2000.0 if step is None else float(step)),
        report=report_line(histories.report(step, full=full)),
        verdict=Verdict((), told),
        alert_lines={notice.id: alert_line(notice) for notice in told},
        memory=None,
        debts=to_those_that_show(["gallery"]) if owe else (),
    )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "state")


# ---------------------------------------------------------------- owed and made


def test_of_several_pages_only_the_last_is_made(desk: Desk, gallery: Gallery) -> None:
    """Three checkpoints owe one page, of the third: with its alerts, its redundancy, and the way to make it again."""
    desk.finish(100)
    desk.finish(200, 300, told=(histories.notice("firing", 300),), full=True)
    assert desk.owed("pages") == 1
    assert desk.send("pages")[0] == Outcome(sent=True)
    assert desk.owed("pages") == 0
    ((step, timestamp, texts, images, keep),) = gallery.taken
    assert (step, timestamp, images, keep) == (300, 300_000, ("peel/margins", "peel/redundancy"), True)
    page = texts["peel/report.html"].decode()
    for words in ("At step 300", "layer_below", f"--state {desk.folder} --run mine", "1970-01-01 00:05:00 UTC"):
        assert words in page
    assert {path: content[:4] for path, content in texts.items() if path.endswith("png")} == {
        "peel/margins.png": b"\x89PNG",
        "peel/redundancy.png": b"\x89PNG",
    }


def test_the_page_is_of_the_history_when_it_was_owed(desk: Desk) -> None:
    """A checkpoint and an alert that came after what is owed are not in what is made of it."""
    desk.finish(100, told=(histories.notice("firing", 100),))
    desk.finish(200, told=(histories.notice("resolved", 200),), owe=False)
    kept, count = kept_run_of(desk.folder, KEY, Extent(until=100.0, alerts_until=1))
    assert (len(kept.reports), len(kept.alerts), count) == (1, 1, 1)
    assert len(kept_run_of(desk.folder, KEY, Extent())[0].reports) == 2


def test_nothing_is_owed_or_made_of_nothing(desk: Desk, tmp_path: Path) -> None:
    """Before the first checkpoint no page is owed, and where its report is gone none is made."""
    with closing(Ledger(desk.folder)) as ledger:
        ledger.run(KEY, "mine", "/run").owe(to_those_that_show(["gallery"]))
    assert desk.owed("pages") == 0
    desk.finish(100)
    next((desk.folder / "runs" / KEY / "reports").iterdir()).unlink()
    assert drawn(Order(desk.folder, KEY, Extent(until=100.0), tmp_path)).pages is None


def test_a_maker_that_dies_is_put_off_and_holds_back_nothing_else(desk: Desk, gallery: Gallery) -> None:
    """What draws ends with an error: its lane waits and says so, while numbers go on."""
    desk.finish(100)
    with closing(Ledger(desk.folder)) as ledger:
        one = Publication(100, 1, {"peel/loss": 1.0}, {})
        ledger.run(KEY, "mine", "/run").owe(to_trackers(one, ["gallery"], key="x", with_alerts=False))
    (desk.folder / "runs" / KEY / "reports" / "step-000000100.json").write_text('{"schema": 1')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        (outcome,) = desk.send("pages")
    assert outcome.trouble is not None
    assert "ended with status 1" in outcome.trouble
    assert "[tracker] report = false" in outcome.trouble
    assert desk.send("numbers")[0].sent
    assert [one.metrics for one in gallery.taken] == [{"peel/loss": 1.0}]


def test_a_maker_without_its_ledger_says_so(tmp_path: Path) -> None:
    """The child process itself fails, and its caller knows it: no page is taken for made."""
    with pytest.raises(DestinationUnavailable, match="could not be made"):
        pages(Order(tmp_path / "nowhere", KEY, Extent(until=1.0), tmp_path))


def test_a_long_run_makes_a_page_of_some(desk: Desk) -> None:
    """Of more reports than asked for, the first, the last, those with an alert and others evenly are left; the page
    says how many there are.
    """
    desk.finish(*range(100, 1000, 100))
    desk.finish(350, told=(histories.notice("firing", 350),))
    kept, count = kept_run_of(desk.folder, KEY, Extent(most=5))
    steps = [json.loads(text)["checkpoint"]["step"] for _, text in kept.reports]
    assert (steps[0], steps[-1], count, kept.left_out) == (100, 900, 10, 10 - len(steps))
    assert 350 in steps
    assert 4 <= len(steps) <= 5
    page = report_page(history_of(kept), Provenance("c", "at", {}))
    assert f"Left out, evenly over the run: {kept.left_out} of 10 checkpoints" in page
    assert "10 checkpoints peeled" in page


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        (range(1, 100), 99),
        (range(100, 1000), 90),
        (range(1000, 2001), 11),
    ],
)
def test_images_grow_rarer(counts: range, kept: int) -> None:
    """A slider gets the first 99 images, then a tenth, then a hundredth of them."""
    assert sum(map(is_kept, counts)) == kept


# ---------------------------------------------------------------- who gets pages


@pytest.mark.parametrize(
    ("tracking", "expected"),
    [
        (TrackerSettings(use=("gallery", "jsonl")), ("gallery",)),
        (TrackerSettings(use=("mlflow",)), ("mlflow",)),
        (TrackerSettings(use=("mlflow",), report=False), ()),
        (TrackerSettings(use=("jsonl",)), ()),
    ],
)
def test_trackers_that_show_pages_get_them(tracking: TrackerSettings, expected: tuple[str, ...]) -> None:
    """MLflow does, and whichever plug-in says so, unless the settings say otherwise; then nothing is said of it."""
    assert showing(tracking) == expected
    assert notes(tracking, alone=True) == ()


def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is owed then, and a sentence names what is missing and the command; none where no page is wanted."""
    monkeypatch.setattr(destinations, "lacks", lambda: "vl_convert")
    tracking = TrackerSettings(use=("mlflow",))
    assert showing(tracking) == ()
    (words,) = notes(tracking, alone=True)
    assert 'vl_convert is not installed -> pip install "peel-agent[report]"' in words
    for quiet in (dataclasses.replace(tracking, report=False), TrackerSettings(use=("jsonl",))):
        assert notes(quiet, alone=True) == ()


# ---------------------------------------------------------------- a tracker that comes later


def test_a_new_tracker_gets_what_was_before(desk: Desk, gallery: Gallery) -> None:
    """Each report that is kept is sent to it once, in order, numbers and files, under the keys of its checkpoint."""
    desk.finish(100, 300, 200, None, told=(histories.notice("firing", 200),), owe=False)
    assert desk.owe_past() == 4
    assert desk.owe_past() == 0, "it is known now"
    assert all(outcome.sent for outcome in desk.send("numbers")[:-1])
    numbers, gallery.taken = gallery.taken, []
    expected = publication_of_the_past(histories.report(200), committed_at=200.0, max_series=20, charted=frozenset())
    assert [one.step for one in numbers] == [100, 200, 300, 0, 9]
    assert dataclasses.replace(expected, files={}) == numbers[1]
    assert len(expected.metrics) == 19, "all that fits but the count of alerts, which nobody kept"
    assert numbers[-1].tags == {"peel.alert.layer_below": "inactive"}
    desk.send("files")
    assert [list(one.files) for one in gallery.taken] == [
        *([f"peel/checkpoints/step-{step:09d}.json"] for step in (100, 200, 300)),
        ["peel/checkpoints/c0ffee000000.json"],
        ["peel/alerts.jsonl"],
    ]
    assert desk.owe_past() == 0, "what was taken is not sent again"


def test_a_report_that_is_damaged_is_given_up_and_the_others_go(desk: Desk, gallery: Gallery) -> None:
    """One report of the past cannot be read any more: it is buried, with the file's name, and the next one is sent."""
    desk.finish(100, 200, owe=False)
    (desk.folder / "runs" / KEY / "reports" / "step-000000100.json").write_text("{")
    desk.owe_past()
    outcomes = desk.send("numbers")
    assert "step-000000100.json cannot be read" in str(outcomes[0].buried)
    assert [one.step for one in gallery.taken] == [200, 9]
