"""The daemon's judgement of what went wrong; workers are replaced to inject the faults."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from peel_agent import registry
from peel_agent.config import Settings, TrackerSettings, WatchSettings
from peel_agent.daemon import Daemon
from peel_agent.errors import CheckpointError, ConfigurationError, TornCheckpoint, WorkerError
from peel_agent.ledger import Ledger
from peel_agent.records import Peeled, Sketches, YesMemory
from peel_agent.rounds import ATTEMPTS, Rounds
from peel_agent.watch import Folder, Pins, Settling
from peel_agent.worker import Request
from tests import zoo
from tests.rooms.test_publish_form import FULL
from tests.rooms.test_watch_scan import write_checkpoint
from tests.waiting import wait_for

DEATH = WorkerError("the worker ended with signal SIGKILL", remedy="memory")

MEMORY = YesMemory("p", "n", ())
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

    def run(
        self,
        measure: Callable[[Any], Peeled],
        emit: Callable[[str], None] | None = None,
        backlog: str | None = None,
    ) -> int:
        settings = dataclasses.replace(SETTINGS, watch=dataclasses.replace(SETTINGS.watch, backlog=backlog))
        daemon = Daemon(str(self.root), settings, self.ledger, say=self.said.append, emit=emit)
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


@pytest.mark.parametrize("error", [DEATH, RuntimeError("a bug"), TornCheckpoint("torn", remedy="wait")])
def test_what_may_pass_is_tried_again(station: Station, error: Exception) -> None:
    """A dead worker, an unexpected error and a torn read cost an attempt, not the checkpoint."""
    assert station.run(failing(error)) == 0
    assert station.ledger.count("peeled") == 1


def test_a_worker_that_always_dies_is_no_verdict_on_the_checkpoint(station: Station) -> None:
    """After three attempts it is left, but not refused: the next start tries it anew."""
    assert station.run(failing(*[DEATH] * ATTEMPTS)) == 3
    assert "left after 3 attempts, until the next start" in "\n".join(station.said)
    assert station.run(failing()) == 0


def test_an_unusable_checkpoint_is_refused_and_told_again(station: Station) -> None:
    """Its reason is told at the end of a back-fill; the next start tries it anew: the cause may have been elsewhere."""
    assert station.run(failing(CheckpointError("NaN in it", remedy="take another"))) == 3
    assert sum("NaN in it" in line for line in station.said) == 2
    assert station.run(failing()) == 0


def test_a_reader_that_hangs_up_does_not_undo_a_finding(station: Station) -> None:
    """`watch --json | head -1`: the report is final before it is printed."""

    def hang_up(_line: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        station.run(failing(), emit=hang_up)
    assert station.ledger.count("peeled") == 1
    assert len(station.ledger.waiting("jsonl")) == 1
    assert station.run(failing()) == 0
    assert station.ledger.waiting("jsonl") == ()


def write(root: Path, step: int) -> Path:
    return write_checkpoint(root / f"checkpoint-{step}", step)


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[Station]:
    """A daemon on a directory that the test changes under way."""
    (tmp_path / "run").mkdir()
    station = Station(tmp_path / "run", tmp_path / "state")
    yield station
    station.ledger.close()


def held(station: Station) -> list[str]:
    """The checkpoints whose files are held."""
    return sorted(path.name for path in (station.ledger.state_dir / "pins").glob("*/*"))


def test_scanning_goes_on_while_a_checkpoint_is_peeled(moving: Station) -> None:
    """What is written and rotated away during one long peel is held, and peeled after it; then only the last one is
    held, for the next to be compared with.
    """
    write(moving.root, 10)
    seen = []

    def slow(request: Request) -> Peeled:
        seen.append((request.ref.step, request.ref.in_place().path.exists()))
        if request.ref.step == 10:
            path = write(moving.root, 20)
            wait_for(lambda: any((moving.ledger.state_dir / "pins").glob("*/checkpoint-20/trainer_state.json")))
            shutil.rmtree(path)
        return Peeled(FULL, None)

    assert moving.run(slow) == 0
    assert seen == [(10, True), (20, True)]
    assert held(moving) == ["checkpoint-20"]


def test_what_vanishes_is_counted_and_no_error(moving: Station) -> None:
    """A checkpoint that is removed while it is read, where nothing could be held, is told, and is not refused."""
    path = write(moving.root, 10)

    def remove(request: Request) -> Peeled:
        shutil.rmtree(path)
        raise TornCheckpoint("vanished while it was read", remedy="")

    assert moving.run(remove) == 3
    assert moving.ledger.count("vanished") == 1
    assert moving.ledger.refused() == ()
    assert any("removed before it was peeled (1 so far)" in line for line in moving.said)


def test_one_that_was_torn_is_copied_the_next_time(moving: Station) -> None:
    """A file that is rewritten in place faster than it is peeled would else be torn for ever."""
    write(moving.root, 10)
    copies = []

    def torn_once(request: Request) -> Peeled:
        copies.append(request.copy_to)
        if request.copy_to is None:
            raise TornCheckpoint("rewritten", remedy="")
        return Peeled(FULL, None)

    assert moving.run(torn_once) == 0
    assert copies == [None, moving.ledger.state_dir / "pins"]


@pytest.mark.parametrize(("backlog", "peeled"), [("latest", [30]), ("every:2", [20, 30]), (None, [10, 20, 30])])
def test_a_backlog(moving: Station, backlog: str | None, peeled: list[int]) -> None:
    """What is passed over is said and remembered: a restart does not come back to it, unless it is told to."""
    for step in (10, 20, 30):
        write(moving.root, step)
    done: list[int | None] = []

    def measure(request: Request) -> Peeled:
        done.append(request.ref.step)
        return Peeled(FULL, None)

    assert moving.run(measure, backlog=backlog) == 0
    assert moving.run(measure, backlog=backlog) == 0
    assert done == peeled
    assert moving.ledger.count("passed over") == 3 - len(peeled)
    assert sum("passed over" in line for line in moving.said) == 3 - len(peeled)
    assert moving.run(measure, backlog="all") == 0
    assert sorted(step or 0 for step in done) == [10, 20, 30]


def test_history_is_no_observation(moving: Station) -> None:
    """A checkpoint that comes after a later one is reported; alerts and the running minimum stay as they were."""
    write(moving.root, 30)
    memories: list[Any] = []

    def measure(request: Request) -> Peeled:
        memories.append(request.earlier)
        return Peeled(FULL, MEMORY if request.ref.step == 30 else YesMemory("p", "another", ()))

    moving.run(measure)
    older = write(moving.root, 10)
    for file in older.iterdir():
        os.utime(file, (1, 1))
    moving.run(measure)
    assert memories == [None, None]
    assert moving.ledger.bound_memory() == MEMORY
    assert moving.ledger.count("peeled") == 2


def test_what_is_held_survives_the_death_of_a_worker_and_a_rotation(moving: Station) -> None:
    """The second attempt reads the files that were held for the first."""
    path = write(moving.root, 10)
    seen = []

    def die_once(request: Request) -> Peeled:
        seen.append(request.ref.in_place().path.exists())
        if len(seen) == 1:
            shutil.rmtree(path)
            raise DEATH
        return Peeled(FULL, None)

    assert moving.run(die_once) == 0
    assert seen == [True, True]
    assert moving.ledger.count("vanished") == 0


def test_a_restart_takes_up_what_was_held(moving: Station) -> None:
    """A checkpoint that was rotated away while the agent was down is peeled when it is back, and held for the next one
    alone: a later start neither peels it again nor lets go of it.
    """
    path = write(moving.root, 10)

    def stop(_request: Request) -> Peeled:
        os.kill(os.getpid(), signal.SIGTERM)
        raise DEATH

    moving.run(stop)
    shutil.rmtree(path)
    done = []

    def measure(request: Request) -> Peeled:
        done.append((request.ref.step, request.ref.in_place().path.exists()))
        return Peeled(FULL, None)

    assert moving.run(measure) == 0
    assert done == [(10, True)]
    assert held(moving) == ["checkpoint-10"]
    moving.run(measure)
    assert done == [(10, True)]
    assert held(moving) == ["checkpoint-10"]


def sketches(step: int | None) -> Sketches:
    return Sketches({"w": f"{step}"}, {"w": (1,)}, "float32")


class Comparing:
    """Stands in for the worker: keeps what each checkpoint was to be held against, and the trainer rotates it away."""

    def __init__(self, rotates: bool = True) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.why_not: dict[int | None, str | None] = {}
        self.keep: list[bool] = []
        self._rotates = rotates

    def __call__(self, request: Request) -> Peeled:
        step, before = request.ref.step, request.before
        assert before is not None
        files = None if before.ref is None else (before.ref.path.name, before.ref.in_place().path.exists())
        self.seen.append((step, before.step, files, before.sketches))
        self.why_not[step] = before.why_not
        self.keep.append(request.keep_sketches)
        if self._rotates:
            shutil.rmtree(request.ref.path)
        return Peeled(FULL, None, sketches(step))


def test_each_checkpoint_is_held_against_the_one_before(moving: Station) -> None:
    """The files of the one observed last are at hand, though rotated away, and its sketches; also after a restart."""
    for step in (10, 20):
        write(moving.root, step)
    compare = Comparing()
    assert moving.run(compare, backlog="all") == 0
    assert held(moving) == ["checkpoint-20"]
    write(moving.root, 30)
    assert moving.run(compare, backlog="all") == 0
    assert compare.seen == [
        (10, None, None, None),
        (20, 10, ("checkpoint-10", True), sketches(10)),
        (30, 20, ("checkpoint-20", True), sketches(20)),
    ]
    assert compare.why_not == {10: "it is the first checkpoint of this run", 20: None, 30: None}
    assert compare.keep == [True, True, True]
    assert held(moving) == ["checkpoint-30"]


def test_without_its_files_the_sketches_are_left(moving: Station) -> None:
    """Where somebody removed what was held, a checkpoint is still compared with the sketches in the ledger."""
    write(moving.root, 10)
    compare = Comparing()
    moving.run(compare)
    shutil.rmtree(moving.ledger.state_dir / "pins")
    write(moving.root, 20)
    moving.run(compare)
    assert compare.seen[1] == (20, 10, None, sketches(10))
    assert compare.why_not[20] is None


def test_a_full_disk_lets_go_of_the_last(moving: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training needs the room: what is held for comparison alone is let go of, and that is said."""
    write(moving.root, 10)
    compare = Comparing()
    moving.run(compare)
    assert held(moving) == ["checkpoint-10"]
    write(moving.root, 20)
    monkeypatch.setattr(Pins, "crowded", lambda _: True)
    moving.run(compare)
    assert compare.seen[1] == (20, 10, None, sketches(10))
    assert any("the last checkpoint is not kept for comparison" in line for line in moving.said)


def test_a_refused_checkpoint_is_nothing_to_compare_with(moving: Station) -> None:
    """What could not be peeled is let go of; the next one is held against the last that was."""
    write(moving.root, 10)
    compare = Comparing()
    moving.run(compare)
    write(moving.root, 20)
    moving.run(failing(CheckpointError("NaN in it", remedy="")))
    assert held(moving) == ["checkpoint-10"]
    shutil.rmtree(moving.root / "checkpoint-20")
    write(moving.root, 30)
    moving.run(compare)
    assert compare.seen[1] == (30, 10, ("checkpoint-10", True), sketches(10))


def test_what_is_out_of_order_is_held_against_nothing(moving: Station) -> None:
    """A checkpoint that comes late, and the first after the run went back, are told so; the one after is compared."""
    compare = Comparing(rotates=False)
    write(moving.root, 30)
    moving.run(compare)
    late = write(moving.root, 10)
    for file in late.iterdir():
        os.utime(file, (1, 1))
    moving.run(compare)
    assert held(moving) == ["checkpoint-30"]
    for number, step in enumerate((20, 25), start=1):
        path = write(moving.root, step)
        for file in path.iterdir():
            os.utime(file, (time.time() + number,) * 2)
        moving.run(compare)
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
    assert held(moving) == ["checkpoint-25"]


def test_what_is_peeled_is_never_missed(moving: Station) -> None:
    """A root that is away for a moment, and back, and away again is no reason to peel anything twice."""
    write(moving.root, 10)
    done = []

    def measure(request: Request) -> Peeled:
        done.append(request.ref.step)
        return Peeled(FULL, None)

    source = Folder(moving.root, registry.formats(), Settling(10.0))
    answers: list[Future[Peeled]] = []

    def submit(request: Request) -> Future[Peeled]:
        answers.append(Future())
        answers[-1].set_result(measure(request))
        return answers[-1]

    rounds = Rounds(source, "all", SETTINGS, moving.ledger, submit, moving.said.append)
    now = time.time() + 100
    aside = moving.root.with_name("aside")
    for away in (False, False, True, False, True, False, False):
        if away != aside.exists():
            moving.root.rename(aside) if away else aside.rename(moving.root)
        now += 1.0
        rounds.make(now)
    now += 60
    rounds.make(now)
    rounds.make(now)
    assert done == [10]
    assert moving.ledger.count("peeled") == 1


def test_a_users_mistake_ends_the_watch_a_checkpoints_does_not(moving: Station) -> None:
    """An error of the configuration is raised as long as nothing was peeled with it; then it is that checkpoint's."""
    write(moving.root, 10)
    wrong = ConfigurationError("a probe of another vocabulary", remedy="")
    with pytest.raises(ConfigurationError):
        moving.run(failing(wrong))
    assert moving.run(failing()) == 0
    write(moving.root, 20)
    assert moving.run(failing(wrong)) == 0
    assert moving.ledger.count("refused") == 1


def test_a_round_that_fails_does_not_end_the_watch(moving: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a bug of a plug-in is told, once, and the next round is made; a back-fill ends with it."""
    rounds = []

    def fail(*_: Any, **__: Any) -> Any:
        rounds.append(1)
        if len(rounds) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Rounds, "make", fail)
    daemon = Daemon(str(moving.root), SETTINGS, moving.ledger, say=moving.said.append)
    assert daemon.run(once=False) == 0
    assert sum("No space left" in line for line in moving.said) == 1
    with pytest.raises(OSError, match="No space"):
        moving.run(failing())
