"""One agent with every tracker at once: each is read back by its own reader, and all hold the same numbers."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import servers
from tests.contracts import test_tracker_tensorboard, test_tracker_wandb
from tests.runs.sidecar import Sidecar
from tests.waiting import wait_for

mlflow_uri = servers.mlflow_uri


def test_all_trackers_agree_over_a_kill(mlflow_uri: str, tmp_path: Path) -> None:
    """Killed while it sends and started again: MLflow, TensorBoard, W&B and the file hold each step once."""
    logs = tmp_path / "logs"
    sidecar = Sidecar(
        tmp_path,
        '[tracker]\nuse = ["mlflow", "tensorboard", "wandb", "jsonl"]\nreport = false\n'  # pages have tests apart
        f'[tracker.mlflow]\ntracking_uri = "{mlflow_uri}"\nexperiment = "every tracker"\n'
        f'[tracker.tensorboard]\nlog_dir = "{logs}"\n',
    )
    with sidecar.running():
        sidecar.write(100, 200)
        wait_for(lambda: any(logs.rglob("*.tfevents.*")) and any(sidecar.state.rglob("wandb/offline-run-*")))
        sidecar.stop(signal.SIGKILL)
    with sidecar.running():
        sidecar.write(300)
        sidecar.wait_for_steps(100, 200, 300)
        # What was put off as the agent was killed is sent at once, not after its pause of up to minutes.
        wait_for(lambda: sidecar.command("deliveries", "resend").returncode == 0 and sidecar.owed() == 0)
    (state,) = (sidecar.state / "runs").iterdir()
    sent = {}
    for line in (state / "publications.jsonl").read_text().splitlines():
        form = json.loads(line)
        if form["metrics"]:
            assert form["step"] not in sent
            sent[form["step"]] = form["metrics"]
    assert list(sent) == [100, 200, 300]
    boards = test_tracker_tensorboard.Place(tmp_path)
    offline = test_tracker_wandb.Place(tmp_path)
    offline.folder = state / "wandb"
    client = servers.mlflow_client(mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("every tracker").experiment_id])
    for step, metrics in sent.items():
        once = {key: [value] for key, value in metrics.items()}
        assert offline.read_metrics(step) == once
        assert boards.read_metrics(step) == {key: [pytest.approx(value, rel=1e-6)] for key, value in metrics.items()}
        for key, value in metrics.items():
            history = client.get_metric_history(run.info.run_id, key)
            assert [point.value for point in history if point.step == step] == [value]
    noise = [line for line in sidecar.said().splitlines() if line.startswith("wandb:")]
    assert noise == []
