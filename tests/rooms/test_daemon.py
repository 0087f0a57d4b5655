"""The daemon's judgement of what went wrong; workers are replaced to inject the faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peel_agent.config import Settings, TrackerSettings, WatchSettings
from peel_agent.daemon import ATTEMPTS, Daemon
from peel_agent.errors import CheckpointError, TornCheckpoint, WorkerError
from peel_agent.ledger import Ledger
from peel_agent.records import Peeled
from tests import zoo
from tests.rooms.test_publish_form import FULL

SETTINGS = Settings(watch=WatchSettings(settle_seconds=0.0, poll_seconds=0.0), tracker=TrackerSettings(use=("jsonl",)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    zoo.save(zoo.build("llama", steps=0), folder, step=5)
    return folder


class Station:
    """A daemon on one checkpoint, and what it said."""

    def __init__(self, root: Path, state: Path) -> None:
        self.root, self.ledger, self.said = root, Ledger(state), list[str]()

    def run(self, measure: Callable[[Any], Peeled], emit: Callable[[str], None] | None = None) -> int:
        daemon = Daemon(self.root, SETTINGS, self.ledger, say=self.said.append, emit=emit)
        daemon._measure = measure  # type: ignore[method-assign]
        return daemon.run(once=True)


@pytest.fixture
def station(root: Path, tmp_path: Path) -> Iterator[Station]:
    station = Station(root, tmp_path)
    yield station
    station.ledger.close()


def failing(*errors: Exception) -> Callable[[Any], Peeled]:
    """Raises each error once, then measures."""
    left = list(errors)

    def measure(_ref: Any) -> Peeled:
        if left:
            raise left.pop(0)
        return Peeled(FULL, None)

    return measure


DEATH = WorkerError("the worker ended with signal SIGKILL", remedy="memory")


@pytest.mark.parametrize("error", [DEATH, RuntimeError("a bug"), TornCheckpoint("torn", remedy="wait")])
def test_what_may_pass_is_tried_again(station: Station, error: Exception) -> None:
    """A dead worker, an unexpected error and a torn read cost an attempt, not the checkpoint."""
    assert station.run(failing(error)) == 0
    assert station.ledger.peeled() == 1


def test_a_worker_that_always_dies_is_no_verdict_on_the_checkpoint(station: Station) -> None:
    """After three attempts it is left, but not refused: the next start tries it anew."""
    assert station.run(failing(*[DEATH] * ATTEMPTS)) == 3
    assert "left after 3 attempts, until the next start" in "\n".join(station.said)
    assert station.run(failing()) == 0


def test_an_unusable_checkpoint_is_refused_and_told_again(station: Station) -> None:
    """Its reason is kept: a later back-fill that finds nothing else says why."""
    assert station.run(failing(CheckpointError("NaN in it", remedy="take another"))) == 3
    station.said.clear()
    assert station.run(failing()) == 3
    assert any("NaN in it" in line for line in station.said)


def test_a_reader_that_hangs_up_does_not_undo_a_finding(station: Station) -> None:
    """`watch --json | head -1`: the report is final before it is printed."""

    def hang_up(_line: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        station.run(failing(), emit=hang_up)
    assert station.ledger.peeled() == 1
    assert len(station.ledger.waiting("jsonl")) == 1
    assert station.run(failing()) == 0
    assert station.ledger.waiting("jsonl") == ()
