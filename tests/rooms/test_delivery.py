"""From the outbox to the trackers: order, back-off, refusals, and what is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peel_agent.errors import TrackerError, TrackerUnavailable
from peel_agent.ledger import Ledger
from peel_agent.publish import Delivery
from peel_agent.records import CheckpointRef, Publication, Verdict


class Faulty:
    """A tracker that raises what it is told to, and otherwise remembers."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.taken: list[int] = []

    def publish(self, publication: Publication) -> None:
        if self.fault is not None:
            raise self.fault
        self.taken.append(publication.step)

    def where(self) -> str:
        return "nowhere"

    def close(self) -> None:
        self.fault = None


class Desk:
    """A ledger with three publications for one faulty tracker, a clock that is set by hand, and what was said."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.tracker, self.now, self.said = Ledger(folder), Faulty(), 100.0, list[str]()
        for step in (1, 2, 3):
            ref = CheckpointRef(Path(f"/c-{step}"), step, "f", f"print{step}", 1.0)
            sent = Publication(step, 1000, {}, {})
            self.ledger.record(
                ref, report="{}", verdict=Verdict((), ()), alert_lines={}, memory=None, publications={"t": sent}
            )
        trackers: Any = {"t": self.tracker}
        self.delivery = Delivery(self.ledger, trackers, now=lambda: self.now, say=self.said.append)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.ledger.close()


def test_oldest_first_and_gone_when_taken(desk: Desk) -> None:
    """Everything that waits is sent in order, once."""
    desk.delivery.deliver()
    desk.delivery.deliver()
    assert desk.tracker.taken == [1, 2, 3]
    desk.delivery.close()
    assert desk.said == ["findings are in nowhere"]


@pytest.mark.parametrize("fault", [TrackerUnavailable("t is away", remedy="wait"), RuntimeError("from a library")])
def test_back_off(desk: Desk, fault: Exception) -> None:
    """A tracker that is away, or whose library raises what nobody expects, is left alone for longer each time."""
    desk.tracker.fault = fault
    pauses = []
    for _ in range(3):
        start = desk.now
        said = len(desk.said)
        while len(desk.said) == said:
            desk.delivery.deliver()
            desk.now += 0.5
        pauses.append(desk.now - start)
    assert pauses[0] < pauses[1] < pauses[2]
    assert "3 findings kept in" in desk.said[0]
    desk.tracker.fault = None
    desk.now += 1000
    desk.delivery.deliver()
    assert desk.tracker.taken == [1, 2, 3]


def test_refused(desk: Desk) -> None:
    """What a tracker will never take is said once with the remedy; findings stay on disk and it is said where."""
    desk.tracker.fault = TrackerError("the run is deleted", remedy="restore it")
    desk.delivery.deliver()
    desk.delivery.deliver()
    assert len(desk.said) == 1
    assert "restore it" in desk.said[0]
    assert "findings are kept in" in desk.said[0]
    desk.delivery.close()
    assert desk.said[-1].startswith("3 findings in ")
    assert len(desk.ledger.waiting("t")) == 3
