"""The sidecar on real checkpoints and a real MLflow server."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.runs.command import environment_of, peel_agent, published, reports_of
from tests.runs.conftest import HELD_BACK, Train
from tests.runs.sidecar import workers_of
from tests.waiting import wait_for

FAST = ("--quantities", "margin", "--sequence-length", "64")
CONFIGURATION = """
[watch]
settle_seconds = 0.5
poll_seconds = 0.5
[probe]
fit_tokens = 4096
select_tokens = 2048
confirm_tokens = 8192
[[rule]]
name = "layer_below"
kind = "layer_below"
after_step = 300
"""


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    path = tmp_path / "peel.toml"
    path.write_text(CONFIGURATION)
    return path


@pytest.fixture(scope="module")
def run_directory(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last three checkpoints of the training with a held-back block."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (300, 400, 500):
        shutil.copytree(train("llama", False) / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def new_run(uri: str) -> tuple[Any, str]:
    """A run as a training has it: RUNNING, with a note and a loss of its own."""
    client = servers.mlflow_client(uri)
    run = client.create_run("0", run_name="training", tags={"mlflow.note.content": "mine"})
    client.log_metric(run.info.run_id, "loss", 1.25, step=400)
    return client, run.info.run_id


def test_findings_reach_the_run(
    run_directory: Path, probe_file: Path, configuration: Path, tmp_path: Path, mlflow_uri: str
) -> None:
    """`watch --once` writes every checkpoint's metrics, tags, report and the alert into the training's own run.

    Read back through MLflow's client: values at their training steps with the checkpoint's time, the run's status,
    note and own metric untouched. A second `watch --once` has nothing left to do and changes nothing.
    """
    client, run_id = new_run(mlflow_uri)
    arguments = (
        "watch", run_directory, "-c", configuration, "--probe", probe_file, "--run-id", run_id,
        "--tracking-uri", mlflow_uri, "--once", "--json",
    )  # fmt: skip
    finished = peel_agent(*arguments, home=tmp_path)
    assert finished.returncode == 0, finished.stderr
    reports = {json.loads(line)["checkpoint"]["step"]: json.loads(line) for line in finished.stdout.splitlines()}
    assert list(reports) == [300, 400, 500]

    def histories() -> dict[str, list[tuple[int, float, int]]]:
        keys = (
            "peel/loss",
            "peel/bound",
            "peel/gap",
            f"peel/margin/L{HELD_BACK:03d}",
            "peel/layers_below",
            "peel/yes/head",
        )
        return {key: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run_id, key)] for key in keys}

    written = histories()
    assert [(step, value) for step, value, _ in written["peel/loss"]] == [
        (step, report["loss"]["value"]) for step, report in reports.items()
    ]
    assert [value for _, value, _ in written[f"peel/margin/L{HELD_BACK:03d}"]] == [
        report["layers"][HELD_BACK]["margin"]["value"] for report in reports.values()
    ]
    times = [stamp for _, _, stamp in written["peel/loss"]]
    for step, stamp in zip((300, 400, 500), times, strict=True):
        read = (run_directory / f"checkpoint-{step}" / name for name in ("model.safetensors", "config.json"))
        newest = max(file.stat().st_mtime for file in read)
        assert stamp / 1000 == pytest.approx(newest, abs=0.002)

    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.note.content"] == "mine"
    assert run.data.metrics["loss"] == 1.25
    assert run.data.tags["peel.status"] == "below"
    assert run.data.tags["peel.alert.layer_below"].startswith("firing: ")
    assert f"L{HELD_BACK:03d}" in run.data.tags["peel.alert.layer_below"]

    def artifact(name: str) -> str:
        return Path(client.download_artifacts(run_id, name, str(tmp_path))).read_text()

    stored = json.loads(artifact("peel/checkpoints/step-000000500.json"))
    assert stored == reports[500]
    alerts = map(json.loads, artifact("peel/alerts.jsonl").splitlines())
    (alert,) = [alert for alert in alerts if alert["subject"] == f"model.layers.{HELD_BACK}"]
    assert (alert["state"], alert["step"]) == ("firing", 400)
    assert "ALERT firing" in finished.stderr
    assert f"model.layers.{HELD_BACK}" in finished.stderr

    again = peel_agent(*arguments, home=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")
    assert histories() == written


def test_scan_and_watch_give_the_same_numbers(
    run_directory: Path, probe_file: Path, configuration: Path, tmp_path: Path
) -> None:
    """The same checkpoint and probe have the same report, whichever command made it."""
    common = ("-c", configuration, "--probe", probe_file, *FAST)
    scanned = peel_agent("scan", run_directory / "checkpoint-500", *common, "--format", "json", home=tmp_path)
    only = tmp_path / "only"
    shutil.copytree(run_directory / "checkpoint-500", only / "checkpoint-500")
    watched = peel_agent("watch", only, *common, "--once", "--json", home=tmp_path, PEEL__TRACKER__USE='["jsonl"]')
    first, second = json.loads(scanned.stdout), json.loads(watched.stdout)
    for ours, theirs in zip(first["layers"], second["layers"], strict=True):
        assert ours["margin"] == pytest.approx(theirs["margin"], abs=1e-5)
        assert (ours["status"], ours["best_reference"]) == (theirs["status"], theirs["best_reference"])
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert first["probe"] == second["probe"]


def test_server_away_then_back(run_directory: Path, small_probe: Path, configuration: Path, tmp_path: Path) -> None:
    """With MLflow away the findings stay on disk, and it is said where (status 1); the next `watch` delivers them."""
    folder = tmp_path / "server"
    folder.mkdir()
    port = servers.free_port()
    uri = f"http://127.0.0.1:{port}"
    arguments = ("watch", run_directory, "-c", configuration, "--probe", small_probe, *FAST, "--tracking-uri", uri)
    away = peel_agent(*arguments, "--once", home=tmp_path)
    assert away.returncode == 1, away.stderr
    assert "the next `peel-agent watch` on it" in away.stderr
    for kind in ("numbers", "files"):
        assert f"3 {kind} are kept in" in away.stderr
    assert uri in away.stderr
    (state,) = tmp_path.glob("peel-agent/*")
    assert len(reports_of(state)) == 3
    with servers.mlflow_server(folder, port):
        back = peel_agent(*arguments, "--once", "--json", home=tmp_path)
        assert (back.returncode, back.stdout) == (0, "")
        client = servers.mlflow_client(uri)
        (run,) = client.search_runs(["0"])
        assert run.data.tags["peel.checkpoint_dir"] == str(run_directory)
        history = client.get_metric_history(run.info.run_id, "peel/loss")
        assert [point.step for point in history] == [300, 400, 500]


def test_daemon_sees_new_checkpoints_and_survives_restarts(
    run_directory: Path, small_probe: Path, configuration: Path, tmp_path: Path
) -> None:
    """A running sidecar peels what appears, ends cleanly on SIGTERM, and its successor goes on where it stopped.

    The alert needs two checkpoints in a row, one on each side of the restart: the streak survives.
    """
    folder = tmp_path / "live"
    folder.mkdir()
    state = tmp_path / "state"
    command = [sys.executable, "-m", "peel_agent", "watch", str(folder), "-c", str(configuration)]
    command += ["--probe", str(small_probe), "--state", str(state), *FAST]
    environment = environment_of(tmp_path, PEEL__TRACKER__USE='["jsonl"]')

    def session(step: int) -> str:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        shutil.copytree(run_directory / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        wait_for(lambda: any(f'"step": {step},' in line for line in published(state)) or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        return said

    alert = f"ALERT firing: model.layers.{HELD_BACK} "
    assert alert not in session(300)
    said = session(400)
    assert said.count(alert) == 1
    assert "step 300;" not in said
    assert [path.name for path in reports_of(state)] == ["step-000000300.json", "step-000000400.json"]
    steps = [json.loads(line)["step"] for line in published(state)]
    assert list(dict.fromkeys(steps)) == [300, 400]


def test_a_killed_worker_is_tried_again(
    run_directory: Path, small_probe: Path, configuration: Path, tmp_path: Path
) -> None:
    """A worker killed in the middle costs one attempt, not the checkpoint."""
    import psutil

    only = tmp_path / "only"
    shutil.copytree(run_directory / "checkpoint-300", only / "checkpoint-300")
    command = [sys.executable, "-m", "peel_agent", "watch", str(only), "-c", str(configuration), "--once"]
    command += ["--probe", str(small_probe), *FAST]
    environment = environment_of(tmp_path, PEEL__TRACKER__USE='["jsonl"]')
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    children: list[psutil.Process] = []

    def started() -> bool:
        children[:] = workers_of(process.pid)
        return bool(children)

    wait_for(started)
    children[0].kill()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert re.search(r"ended with signal SIGKILL -> .*; try 2 of 3 follows at once", said), said
    assert "step 300" in said
