"""The W&B tracker against the conformance kit, and uploaded by W&B's own `wandb sync`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2 as wandb_records

from peel_agent.errors import DestinationDenied, DestinationUnavailable
from peel_agent.spi import Tracker
from peel_agent.testing.trackers import CHECKS, example_publication
from peel_plugins.trackers import wandb_run
from peel_plugins.trackers.wandb_run import WandbSettings
from tests.wandb_server import WandbServer, wandb_server

NOW = 1_700_000_000_000
BLOCK = 32_768
"""Bytes of a block in the log of an offline run, which is a log of LevelDB's."""

CANARY = "canary-of-the-login-" + "a" * 20


def _records(file: Path) -> Iterator[wandb_records.Record]:
    """The records of an offline run, by W&B's own description of them."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<4xHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece of one
            yield wandb_records.Record.FromString(record)
            record = b""


class Place:
    """A state folder, and what lies in its offline runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state" / "wandb"
        self.state_dir = folder / "state"

    def connect(self) -> Tracker:
        return wandb_run.PLUGIN.connect(
            WandbSettings(), checkpoint_dir="/runs/mine/checkpoints", state_dir=self.state_dir
        )

    def runs(self) -> list[Path]:
        return sorted((self.folder / "wandb").glob("offline-run-*"))

    def rows(self) -> list[dict[str, float]]:
        """Every row of every offline run, in the order of W&B's own step."""
        rows = []
        for file in self.folder.glob("wandb/*/*.wandb"):
            for record in _records(file):
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        return sorted(rows, key=lambda row: row["_step"])

    def read_metrics(self, step: int) -> dict[str, list[float]]:
        values_by_key: dict[str, list[float]] = {}
        for row in (row for row in self.rows() if row["peel/step"] == step):
            for key in row.keys() - {"peel/step", "_step", "_runtime", "_timestamp"}:
                values_by_key.setdefault(key, []).append(row[key])
        return values_by_key

    def upload(self, server: WandbServer) -> str:
        """All that was not uploaded yet, by W&B's own command; its words."""
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--yes"],
            cwd=self.folder,
            env={
                **os.environ,
                "WANDB_BASE_URL": server.uri,
                "WANDB_API_KEY": "a" * 40,
                "WANDB_ERROR_REPORTING": "false",
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout + done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(check: Callable, place: Place) -> None:
    """It passes every check of the kit, read back from its offline runs."""
    check(place.connect, place.read_metrics)


def test_uploads_make_one_run_without_a_lost_or_doubled_step(place: Place) -> None:
    """Uploaded in the middle, and again after a restart and `wandb clean`: W&B has each step once, in one run.

    Every row bears the training's step, and W&B's own goes up where the training went back. Summary and files are
    those of the checkpoint that came last.
    """
    back = dataclasses.replace(example_publication(100), timestamp_ms=NOW + 900)
    with wandb_server() as server:
        for step in (100, 200):
            place.connect().publish(example_publication(step))
        place.upload(server)
        assert [row["peel/step"] for row in server.rows.values()] == [100, 200]
        for run in place.runs():
            shutil.rmtree(run)
        for one in (example_publication(200), example_publication(300), back, back):
            place.connect().publish(one)
        place.upload(server)
    rows = [server.rows[place] for place in sorted(server.rows)]
    assert [row["peel/step"] for row in rows] == [100, 200, 300, 100]
    for row, sent in zip(rows, (*map(example_publication, (100, 200, 300)), back), strict=True):
        assert {key: row[key] for key in sent.metrics} == sent.metrics
        assert row["_timestamp"] == sent.timestamp_ms / 1000
    assert back.tags.items() <= server.summary.items()
    assert back.files.items() <= {path: content.decode() for path, content in server.files.items()}.items()
    assert server.projects == {"peel-agent"}


@pytest.mark.parametrize("moved", [False, True])
def test_a_restart_in_the_middle_loses_and_doubles_no_step(
    moved: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before an offline run was whole, or when it was moved and not noted: each step is there once."""
    place.connect().publish(example_publication(100))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as fault:
        fault.setattr(wandb_run.WandbTracker, "_note" if moved else "_make", killed)
        with pytest.raises(KeyboardInterrupt):
            place.connect().publish(example_publication(200))
    (place.folder / "unfinished" / "wandb" / "offline-run-torn").mkdir(parents=True)
    for step in (200, 300):
        place.connect().publish(example_publication(step))
    rows = place.rows()
    assert [row["peel/step"] for row in rows] == [100, 200, 300]
    assert len({row["_step"] for row in rows}) == 3
    assert not (place.folder / "unfinished").exists()


def test_an_earlier_step_sent_late_leaves_what_stands_for_the_run(place: Place) -> None:
    """Its row and its own file come; the summary and the log of alerts stay those of the later checkpoint."""
    for step in (200, 100):
        place.connect().publish(example_publication(step))
    late = [run for run in place.runs() if "-100-" in run.name]
    assert {str(f.relative_to(run / "files")) for run in late for f in (run / "files").rglob("*.json*")} == {
        "peel/checkpoints/step-000000100.json"
    }
    summaries = [
        {item.key: item.value_json for item in record.summary.update if item.key}
        for run in late
        for record in _records(next(run.glob("*.wandb")))
        if record.WhichOneof("record_type") == "summary"
    ]
    assert {one["peel.alert.layer_below"] for one in summaries if "peel.alert.layer_below" in one} == {
        '"firing at 200"'
    }


def test_the_environment_neither_turns_it_off_nor_leaks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_MODE and a server's address change nothing, and the login is in no file."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    place.connect().publish(example_publication(100))
    assert [row["peel/step"] for row in place.rows()] == [100]
    written = b"".join(file.read_bytes() for file in place.state_dir.rglob("*") if file.is_file())
    assert b"peel/loss" in written
    assert CANARY.encode() not in written


def test_it_connects_to_nobody(place: Place) -> None:
    """Neither this process nor W&B's own service, which is another program, asks the way out of this machine."""
    code = (
        "from pathlib import Path; from peel_agent.testing.trackers import example_publication;"
        "from peel_plugins.trackers.wandb_run import PLUGIN; import sys;"
        f"t = PLUGIN.connect(PLUGIN.settings(), checkpoint_dir='/c', state_dir=Path({str(place.state_dir)!r}));"
        "t.publish(example_publication(100)); print('torch' in sys.modules)"
    )
    with socket.create_server(("127.0.0.1", 0)) as way_out:
        proxy = f"http://127.0.0.1:{way_out.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), proxy)
        environment = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"} | proxies
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        way_out.setblocking(False)
        with pytest.raises(BlockingIOError):
            way_out.accept()
    assert done.stdout == "False\n"
    assert [row["peel/step"] for row in place.rows()] == [100]


def test_without_the_package_it_says_how_to_get_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing and doctor's check name the command that installs it."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DestinationDenied, match="wandb cannot be imported") as caught:
        place.connect().publish(example_publication(100))
    assert 'pip install "peel-agent[wandb]"' in caught.value.remedy
    (check,) = place.connect().look()
    assert (check.ok, check.remedy) == (False, caught.value.remedy)


def test_a_folder_that_cannot_be_made_is_named(place: Place) -> None:
    """A file in the folder's place is an error that names the folder and can be tried again; doctor finds it too."""
    place.state_dir.mkdir()
    place.folder.write_text("")
    with pytest.raises(DestinationUnavailable, match="Not a directory") as caught:
        place.connect().publish(example_publication(100))
    assert str(place.folder) in caught.value.what
    (check,) = place.connect().look()
    assert check.ok is False
