"""What every tracker plug-in must do, as checks that raise AssertionError. Needs no test framework.

    @pytest.mark.parametrize("check", CHECKS)
    def test_conforms(check, tmp_path):
        check(lambda: PLUGIN.connect(PLUGIN.settings(...), checkpoint_dir=..., state_dir=tmp_path), read_metrics)

Each check wants a fresh place: a run or a file that holds no peel metrics yet.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from peel_agent.records import Pages, Publication
from peel_agent.spi import Checking, HistoryReader, Showing, Tracker

Connect = Callable[[], Tracker]
"""Opens the tracker, each time with the same options and folders."""

ReadMetrics = Callable[[int], Mapping[str, Sequence[float]]]
"""Reads back from the tracker's own store: every value kept under each key at one step, repetitions included."""


def example_publication(step: int) -> Publication:
    """A small publication whose values depend on the step."""
    return Publication(
        step=step,
        timestamp_ms=1_700_000_000_000 + step,
        metrics={"peel/loss": 3.0 - step / 1000, "peel/layers_below": 1.0, "peel/margin/L003": step / 1000},
        tags={"peel.status": "below", "peel.alert.layer_below": f"firing at {step}"},
        files={f"peel/checkpoints/step-{step:09d}.json": f'{{"step": {step}}}', "peel/alerts.jsonl": f"[{step}]\n"},
    )


def publication_lands(connect: Connect, read_metrics: ReadMetrics) -> None:
    """What was published is in the store, each metric once at its step, and the tracker says where."""
    tracker = connect()
    tracker.publish(example_publication(100))
    _expect_steps(read_metrics, 100)
    _expect(bool(tracker.where().strip()), "where() says where the results can be seen", tracker.where())
    tracker.close()


def repetition_changes_nothing(connect: Connect, read_metrics: ReadMetrics) -> None:
    """The same publication sent twice, and once more after a later one and a reconnection, leaves one point."""
    tracker = connect()
    for step in (100, 100, 200, 100):
        tracker.publish(example_publication(step))
    tracker.close()
    again = connect()
    again.publish(example_publication(100))
    again.close()
    _expect_steps(read_metrics, 100, 200)


def steps_stay_apart(connect: Connect, read_metrics: ReadMetrics) -> None:
    """Two checkpoints published in order keep their own values at their own steps, and no other step has any."""
    tracker = connect()
    tracker.publish(example_publication(100))
    tracker.publish(example_publication(200))
    tracker.close()
    _expect_steps(read_metrics, 100, 200)
    _expect(not read_metrics(300), "a step never published has no metrics", read_metrics(300))


def reconnection_continues(connect: Connect, read_metrics: ReadMetrics) -> None:
    """A tracker opened again with the same folders writes to the same place."""
    for step in (100, 200):
        tracker = connect()
        tracker.publish(example_publication(step))
        place = tracker.where()
        tracker.close()
    again = connect()
    again.publish(example_publication(200))
    _expect(again.where() == place, f"a reconnected tracker is still at {place}", again.where())
    again.close()
    _expect_steps(read_metrics, 100, 200)


def a_check_changes_no_result(connect: Connect, read_metrics: ReadMetrics) -> None:
    """A tracker that can check (`spi.Checking`) finds the place well, in words, and leaves what was published.

    A connection that has published nothing is asked: that is what `peel-agent doctor` has.
    """
    tracker = connect()
    tracker.publish(example_publication(100))
    tracker.close()
    other = connect()
    if isinstance(other, Checking):
        checks = other.check(lambda: datetime.now(UTC).timestamp())
        _expect(bool(checks), "check() tells of at least one thing", checks)
        for check in checks:
            _expect(bool(check.what.strip() and check.words.strip()), "a check says what it is of, in words", check)
            _expect(check.ok is True, "a place that has just been written to is found well", check)
    other.close()
    _expect_steps(read_metrics, 100)


def two_lanes_meet(connect: Connect, read_metrics: ReadMetrics) -> None:
    """Metrics and files, sent from two threads with a connection each, are in one place, each metric once."""
    numbers, files = connect(), connect()
    faults: list[Exception] = []
    begin = threading.Barrier(2)

    def send(tracker: Tracker, sent: Sequence[Publication]) -> None:
        begin.wait()
        try:
            for publication in sent:
                tracker.publish(publication)
        except Exception as error:  # whatever it is, the check fails with it
            faults.append(error)

    whole = [example_publication(step) for step in (100, 200)]
    threads = [
        threading.Thread(
            target=send, args=(numbers, [dataclasses.replace(publication, files={}) for publication in whole])
        ),
        threading.Thread(
            target=send, args=(files, [dataclasses.replace(publication, metrics={}, tags={}) for publication in whole])
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _expect(not faults, "both connections can write at once", faults)
    _expect(numbers.where() == files.where(), f"both are at {numbers.where()}", files.where())
    _expect_steps(read_metrics, 100, 200)
    numbers.close()
    files.close()


def files_alone_bring_no_metrics(connect: Connect, read_metrics: ReadMetrics) -> None:
    """A publication of files alone, after its libraries were loaded, leaves the metrics that are there."""
    tracker = connect()
    tracker.prepare()
    tracker.publish(example_publication(100))
    tracker.publish(dataclasses.replace(example_publication(200), metrics={}, tags={}))
    tracker.close()
    _expect_steps(read_metrics, 100)
    _expect(not read_metrics(200), "files alone have no metrics", read_metrics(200))


def what_was_sent_is_read_back(connect: Connect, read_metrics: ReadMetrics) -> None:  # noqa: ARG001 -- as all checks
    """A tracker that can (`spi.HistoryReader`) gives each checkpoint's file once, in order, and the last alerts."""
    tracker = connect()
    for step in (100, 200, 100):
        tracker.publish(example_publication(step))
    tracker.close()
    other = connect()
    if isinstance(other, HistoryReader):
        with TemporaryDirectory() as folder:
            kept = other.read_back(Path(folder))
        wanted = tuple((f"step-{step:09d}.json", f'{{"step": {step}}}') for step in (100, 200))
        _expect(kept.reports == wanted, f"the files of checkpoints are {wanted}", kept.reports)
        _expect(kept.alerts == ("[200]",), "the alerts are those of the last checkpoint", kept.alerts)
        _expect(bool(kept.name.strip() and kept.place.strip()), "the run has a name and a place", kept)
    other.close()


def pages_bring_no_metrics(connect: Connect, read_metrics: ReadMetrics) -> None:
    """A tracker that shows pages (`spi.Showing`) takes them twice, from a connection that sent nothing else, and once
    more of an earlier time; the metrics are as they were.
    """
    tracker = connect()
    tracker.publish(example_publication(100))
    tracker.close()
    other = connect()
    if isinstance(other, Showing):
        with TemporaryDirectory() as folder:
            page, image = Path(folder, "page.html"), Path(folder, "image.png")
            page.write_text("<p>a page")
            image.write_bytes(_ONE_PIXEL)
            shown = Pages(200, 1_700_000_000_200, {"peel/report.html": page}, {"peel/margins": image})
            for pages in (shown, shown, dataclasses.replace(shown, step=100, timestamp_ms=1_700_000_000_100)):
                other.show(pages)
    other.close()
    _expect_steps(read_metrics, 100)
    _expect(not read_metrics(200), "pages have no metrics", read_metrics(200))


_ONE_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0000003010100"
    "18dd8db00000000049454e44ae426082"
)
"""A PNG image."""

CHECKS: tuple[Callable[[Connect, ReadMetrics], None], ...] = (
    publication_lands,
    repetition_changes_nothing,
    steps_stay_apart,
    reconnection_continues,
    a_check_changes_no_result,
    two_lanes_meet,
    files_alone_bring_no_metrics,
    what_was_sent_is_read_back,
    pages_bring_no_metrics,
)


def foreign_values_stay(connect: Connect, read_foreign: Callable[[], Mapping[str, object]]) -> None:
    """What others keep in the same place is as it was: for trackers that share it, as a run with its trainer."""
    before = dict(read_foreign())
    _expect(bool(before), "the place holds something of others before the check", before)
    tracker = connect()
    tracker.publish(example_publication(100))
    tracker.close()
    _expect(dict(read_foreign()) == before, f"foreign values are still {before}", read_foreign())


def _expect_steps(read_metrics: ReadMetrics, *steps: int) -> None:
    for step in steps:
        wanted = {key: [value] for key, value in example_publication(step).metrics.items()}
        read = {key: list(values) for key, values in read_metrics(step).items()}
        _expect(read == wanted, f"step {step} holds {wanted}", read)


def _expect(holds: bool, claim: str, actual: object) -> None:
    if not holds:
        raise AssertionError(f"{claim}; found {actual!r}")
