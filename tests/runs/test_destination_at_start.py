"""A destination that is not there is told at the start, and a back-fill that could not send ends with status 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import servers
from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.command import environment_of
from tests.runs.sidecar import Sidecar
from tests.waiting import wait_for

mlflow_uri = servers.mlflow_uri


def back_fill(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`watch --once` over two checkpoints, by an engine that answers at once."""
    for step in () if (folder / "run").exists() else (10, 20):
        write_checkpoint(folder / "run" / f"checkpoint-{step}", step)
    np.save(folder / "heldout.npy", np.arange(8))
    command = [sys.executable, "-m", "tests.runs.instant_agent", "watch", folder / "run", "--once", *arguments]
    command += ["--probe", folder / "heldout.npy", "--state", folder / "state"]
    return subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True,
        env=environment_of(
            folder, PEELS=str(folder / "peels"), PEEL__WATCH__SETTLE_SECONDS="0", PEEL__WATCH__BACKLOG='"all"',
            **environment,
        ),
    )  # fmt: skip


def test_a_mistyped_run_id_is_told_before_anything_is_peeled(mlflow_uri: str, tmp_path: Path) -> None:
    """The place is empty yet: the run id and its remedy are in the log, `status` is not ready, nothing is written."""
    more = f'[tracker.mlflow]\ntracking_uri = "{mlflow_uri}"\n'
    variables = {"MLFLOW_RUN_ID": f" {'f' * 32}\n", "MLFLOW_EXPERIMENT_NAME": "of the training"}
    with Sidecar(tmp_path, more, **variables).running() as sidecar:
        sidecar.wait_for_words("does not exist")
        said = sidecar.said()
        assert f"run_id is {'f' * 32}, from MLFLOW_RUN_ID" in said
        assert "experiment is of the training, from MLFLOW_EXPERIMENT_NAME" in said
        assert "correct [tracker.mlflow] run_id" in said
        assert "peeling" not in said
        wait_for(lambda: not sidecar.status()["ready"])
    assert servers.mlflow_client(mlflow_uri).get_experiment_by_name("of the training") is None


@pytest.mark.parametrize("kind", ["run id", "experiment", "server"])
def test_a_back_fill_that_could_not_send(kind: str, mlflow_uri: str, tmp_path: Path) -> None:
    """Status 1, the cause with its remedy, and the command that sends what is kept; so again when nothing is new."""
    uri = mlflow_uri if kind != "server" else f"http://127.0.0.1:{servers.free_port()}"
    variables = {"run id": {"MLFLOW_RUN_ID": "f" * 32}, "experiment": {"MLFLOW_EXPERIMENT_ID": "987654"}}.get(kind, {})
    for _ in range(2):
        finished = back_fill(tmp_path, "--tracking-uri", uri, **variables)
        assert finished.returncode == 1, finished.stderr
        assert {"run id": "f" * 32, "experiment": "987654", "server": uri}[kind] in finished.stderr
        assert " -> " in finished.stderr
        assert "2 numbers are kept in" in finished.stderr
        assert "the next `peel-agent watch` on it, with --once or without, sends them" in finished.stderr
    assert len((tmp_path / "peels").read_text().split()) == 2


def test_a_back_fill_in_the_experiment_of_the_environment(mlflow_uri: str, tmp_path: Path) -> None:
    """It is sent into MLFLOW_EXPERIMENT_NAME's experiment, which is said; a second one finds its run again."""
    name = f"back-fill {tmp_path.name}"
    for _ in range(2):
        finished = back_fill(tmp_path, MLFLOW_EXPERIMENT_NAME=f" {name} ", MLFLOW_TRACKING_URI=f"{mlflow_uri}\n")
        assert finished.returncode == 0, finished.stderr
        assert f"experiment is {name}, from MLFLOW_EXPERIMENT_NAME" in finished.stderr
    client = servers.mlflow_client(mlflow_uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "peel/loss")] == [10, 20]
