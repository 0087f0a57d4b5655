"""The front door: `peel-agent demo`."""

from __future__ import annotations

from pathlib import Path

from tests.runs.command import peel_agent


def test_demo_finds_the_block_it_held_back(tmp_path: Path) -> None:
    """A real training, an MLflow store and the sidecar: the held-back block is found, the alert fires, and the end says
    where to look.
    """
    finished = peel_agent("demo", "--keep", tmp_path / "demo", home=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "ALERT firing: model.layers.3" in finished.stdout
    assert "Finding: model.layers.3 was never trained" in finished.stdout
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/demo/mlflow.db" in finished.stdout
    (report,) = [line.split()[-1] for line in finished.stdout.splitlines() if line.startswith("Report:")]
    assert Path(report).is_file()
