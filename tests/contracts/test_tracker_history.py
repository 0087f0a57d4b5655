"""What was published to a tracker is read back as it was sent: MLflow, a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peel_agent.cli import main
from peel_agent.publish import alert_line, history_of, publication
from peel_agent.records import Verdict
from peel_agent.spi import HistoryReader
from peel_plugins.trackers import jsonl_file, mlflow_run
from peel_plugins.trackers.jsonl_file import JsonlSettings
from peel_plugins.trackers.mlflow_run import MlflowSettings
from tests import histories, servers
from tests.rooms.test_views import data_of, records

mlflow_uri = servers.mlflow_uri

STEPS = (100, 200, 300)


def publish(uri: str, folder: Path) -> str:
    """A run with three checkpoints and one alert; its id."""
    client = servers.mlflow_client(uri)
    run_id = client.create_run("0", run_name="a run").info.run_id
    tracker = mlflow_run.PLUGIN.connect(
        MlflowSettings(tracking_uri=uri, run_id=run_id), checkpoint_dir="/runs/one", state_dir=folder
    )
    for step in STEPS:
        sent = publication(histories.report(step), Verdict((), ()), committed_at=float(step), max_series=400)
        tracker.publish(sent)
    client.log_text(run_id, alert_line(histories.notice("firing", 200)) + "\n", "peel/alerts.jsonl")
    tracker.close()
    return str(run_id)


def test_reports_come_back_as_they_were_sent(
    mlflow_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reports of a run's artifacts are those that were published, in order, and the page is made of them."""
    run_id = publish(mlflow_uri, tmp_path)
    settings = MlflowSettings(tracking_uri=mlflow_uri, run_id=run_id)
    tracker = mlflow_run.PLUGIN.connect(settings, checkpoint_dir="", state_dir=tmp_path)
    assert isinstance(tracker, HistoryReader)
    (tmp_path / "files").mkdir()
    history = history_of(tracker.read_back(tmp_path / "files"))
    assert history.reports == tuple(histories.report(step) for step in STEPS)
    assert history.notices == (histories.notice("firing", 200),)
    assert (history.name, history.gaps) == ("a run", None)
    out = tmp_path / "report.html"
    assert main(["report", run_id, "--tracking-uri", mlflow_uri, "--out", str(out)]) == 0
    data = data_of(out.read_text())
    assert [row["step"] for row in records(data["tables"]["checkpoints"])] == list(STEPS)
    assert "a tracker does not know which were missed" in out.read_text()
    capsys.readouterr()
    assert main(["compare", run_id, run_id, "--tracking-uri", mlflow_uri, "--format", "json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in compared["steps"]] == list(STEPS)
    assert compared["a"]["run"] == "a run"


def test_a_run_without_reports_has_no_page(mlflow_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of somebody else is told to have none, with exit status 3; one that is not there is named."""
    run_id = servers.mlflow_client(mlflow_uri).create_run("0", run_name="another").info.run_id
    out = tmp_path / "report.html"
    assert main(["report", run_id, "--tracking-uri", mlflow_uri, "--out", str(out)]) == 3
    assert "there is no report of another" in capsys.readouterr().err
    assert main(["report", "f" * 32, "--tracking-uri", mlflow_uri, "--out", str(out)]) == 3
    assert f"MLflow run {'f' * 32} at {mlflow_uri} does not exist" in capsys.readouterr().err
    away = f"http://secret:word@127.0.0.1:{servers.free_port()}"
    assert main(["report", "f" * 32, "--tracking-uri", away, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "cannot be read" in said
    assert "word" not in said
    assert not out.exists()


def test_a_tracker_without_it_says_so(tmp_path: Path) -> None:
    """The file of publications is not read back."""
    tracker = jsonl_file.PLUGIN.connect(JsonlSettings(), checkpoint_dir="", state_dir=tmp_path)
    assert not isinstance(tracker, HistoryReader)
