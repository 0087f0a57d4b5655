"""The TensorBoard tracker against the conformance kit, read back by TensorBoard itself."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from peel_agent.errors import DestinationDenied, DestinationUnavailable
from peel_agent.records import Publication
from peel_agent.spi import Tracker
from peel_agent.testing.trackers import CHECKS, example_publication
from peel_plugins.trackers import event_files, tensorboard_files
from peel_plugins.trackers.event_files import FILE
from peel_plugins.trackers.tensorboard_files import TensorboardSettings
from tests import servers
from tests.waiting import wait_for

NOW = 1_700_000_000_000


class Place:
    """A log folder, and what TensorBoard's own accumulators read of it."""

    def __init__(self, folder: Path) -> None:
        self.log_dir = folder / "logs"
        self.state_dir = folder / "state"

    def connect(self) -> Tracker:
        return tensorboard_files.PLUGIN.connect(
            TensorboardSettings(self.log_dir), checkpoint_dir="/runs/mine/checkpoints", state_dir=self.state_dir
        )

    def directories(self) -> list[Path]:
        return sorted(file.parent for file in self.log_dir.rglob(FILE))

    def points(self) -> list[tuple[str, int, float, float]]:
        """Key, step, time and value, in the digits of its single precision, of every scalar in every directory."""
        points = []
        for directory in self.directories():
            reader = EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()
            for key in reader.PluginTagToContent("scalars"):
                points += [
                    (key, event.step, event.wall_time, float(str(tensor_util.make_ndarray(event.tensor_proto))))
                    for event in reader.Tensors(key)
                ]
        return points

    def read_metrics(self, step: int) -> dict[str, list[float]]:
        values_by_key: dict[str, list[float]] = {}
        for key, at, _, value in self.points():
            if at == step:
                values_by_key.setdefault(key, []).append(value)
        return values_by_key

    def steps(self) -> list[list[int]]:
        """The steps of the loss, by directory."""
        return [
            [event.step for event in EventAccumulator(str(one)).Reload().Tensors("peel/loss")]
            for one in self.directories()
        ]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(check: Callable, place: Place) -> None:
    """It passes every check of the kit, read back by TensorBoard's EventAccumulator."""
    check(place.connect, place.read_metrics)


def test_a_publication_arrives_whole(place: Place) -> None:
    """Every number is at its step and the checkpoint's time; tags are a text, files lie beside."""
    sent = example_publication(800)
    place.connect().publish(sent)
    at = sent.timestamp_ms / 1000
    assert sorted(place.points()) == sorted((key, 800, at, value) for key, value in sent.metrics.items())
    (directory,) = place.directories()
    (verdict,) = EventAccumulator(str(directory)).Reload().Tensors(event_files.VERDICT)
    words = tensor_util.make_ndarray(verdict.tensor_proto).item().decode()
    assert all(f"{key}: {text}" in words for key, text in sent.tags.items())
    assert {path: (directory.parent / path).read_text() for path in sent.files} == sent.files


@pytest.mark.parametrize("cut", ["length", "body", "sum", "nothing"])
def test_a_restart_in_the_middle_loses_and_doubles_no_step(place: Place, cut: str) -> None:
    """Killed while it wrote a step: the step is sent again, to a new directory, and each is there once.

    Killed after it wrote it and before that was noted: it is sent again, and nothing changes.
    """
    for step in (100, 200):
        place.connect().publish(example_publication(step))
    file = place.directories()[0] / FILE
    before = file.stat().st_size
    place.connect().publish(example_publication(300))
    after = file.stat().st_size
    os.truncate(file, {"length": before + 5, "body": (before + after) // 2, "sum": after - 1, "nothing": after}[cut])
    for step in (300, 300, 400):
        place.connect().publish(example_publication(step))
    assert place.steps() == ([[100, 200, 300, 400]] if cut == "nothing" else [[100, 200], [300, 400]])


def test_a_training_that_goes_back_begins_a_directory(place: Place) -> None:
    """The steps of after a roll-back are a curve of their own; what was there is sent again without effect."""
    for step in (100, 200, 300):
        place.connect().publish(example_publication(step))
    back = dataclasses.replace(example_publication(200), timestamp_ms=NOW + 900)
    for one in (back, example_publication(300), back):
        place.connect().publish(one)
    assert place.steps() == [[100, 200, 300], [200]]


def test_a_full_disk_leaves_no_half_record(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a full disk cut short is taken back; sent again it is in the same directory, once."""
    tracker = place.connect()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in (100, 200):
        with monkeypatch.context() as fault:
            fault.setattr(os, "fsync", full)
            with pytest.raises(DestinationUnavailable, match="No space left on device"):
                tracker.publish(example_publication(step))
        tracker.publish(example_publication(step))
    assert place.steps() == [[100, 200]]


def test_files_of_the_run_are_those_of_the_latest_checkpoint(place: Place) -> None:
    """An earlier step that is sent late leaves the log of alerts, and brings its own file."""
    for step in (200, 100):
        place.connect().publish(example_publication(step))
    folder = place.directories()[0].parent
    assert (folder / "peel/alerts.jsonl").read_text() == "[200]\n"
    assert json.loads((folder / "peel/checkpoints/step-000000100.json").read_text()) == {"step": 100}


def test_two_runs_share_a_log_folder(tmp_path: Path) -> None:
    """Directories of one name beneath different folders are different runs, each named after its own."""
    for run in ("a", "b"):
        tracker = tensorboard_files.PLUGIN.connect(
            TensorboardSettings(tmp_path), checkpoint_dir=f"/runs/{run}/check points", state_dir=tmp_path
        )
        tracker.publish(example_publication(100))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    assert all(name.startswith("check_points-") for name in names)


@pytest.mark.parametrize("fast", ["true", "false"])
def test_tensorboard_shows_the_numbers(place: Place, fast: str) -> None:
    """A real TensorBoard serves each curve, with either of its readers."""
    place.connect().publish(example_publication(100))
    port = servers.free_port()
    log = place.log_dir / "server.log"
    options = ["--logdir", str(place.log_dir), "--port", str(port), "--load_fast", fast, "--host", "127.0.0.1"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *options], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        at = f"http://127.0.0.1:{port}"
        servers.wait_until_it_answers(at, server, log)
        run = str(place.directories()[0].relative_to(place.log_dir))

        def shown() -> bool:
            with urllib.request.urlopen(f"{at}/data/plugin/scalars/tags", timeout=60) as answer:
                return run in json.load(answer)

        wait_for(shown)
        asked = urllib.parse.urlencode({"run": run, "tag": "peel/loss"})
        with urllib.request.urlopen(f"{at}/data/plugin/scalars/scalars?{asked}", timeout=60) as answer:
            ((_, step, value),) = json.load(answer)
        assert (step, value) == (100, pytest.approx(2.9))
    finally:
        server.terminate()
        server.wait(timeout=240)


def test_without_the_package_it_says_how_to_get_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing and doctor's check name the command that installs it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(DestinationDenied, match="tensorboard cannot be imported") as caught:
        place.connect().publish(example_publication(100))
    assert 'pip install "peel-agent[tensorboard]"' in caught.value.remedy
    (check,) = place.connect().look()
    assert (check.ok, check.remedy) == (False, caught.value.remedy)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file in the folder's place is an error that names the folder and can be tried again; doctor finds it too."""
    (tmp_path / "logs").write_text("")
    place = Place(tmp_path)
    with pytest.raises(DestinationUnavailable, match="Not a directory") as caught:
        place.connect().publish(example_publication(100))
    assert str(place.log_dir) in caught.value.what
    (check,) = place.connect().look()
    assert check.ok is False


def test_it_imports_no_torch() -> None:
    """The courier that writes event files loads neither torch nor tensorflow."""
    code = (
        "import sys; from pathlib import Path; from peel_plugins.trackers.tensorboard_files import PLUGIN;"
        "PLUGIN.connect(PLUGIN.settings(), checkpoint_dir='/c', state_dir=Path('/s')).prepare();"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_long_run_is_read_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection reads the files when it begins, and not again for each checkpoint."""
    tracker = place.connect()
    reads = []
    real = event_files._events
    monkeypatch.setattr(event_files, "_events", lambda file: reads.append(file) or real(file))
    for step in range(1, 6):
        tracker.publish(Publication(step, NOW + step, {"peel/loss": 1.0}, {}))
    assert len(reads) <= 1
