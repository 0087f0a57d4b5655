"""The agent and its children, killed at random beside a real MLflow server: the short form of tests/runs/kills.py."""

from __future__ import annotations

from pathlib import Path

from tests.runs.kills import kill_at_random
from tests.servers import free_port, mlflow_server


def test_killed_a_few_times(tmp_path: Path) -> None:
    """Every checkpoint is in MLflow once, every notice at the sink, nothing is peeled twice whose answer had come."""
    (tmp_path / "server").mkdir()
    (tmp_path / "run").mkdir()
    with mlflow_server(tmp_path / "server", free_port()) as uri:
        outcome = kill_at_random(tmp_path / "run", uri, kills=5, checkpoints=3, seed=1)
    assert outcome.wrong == []
    assert sum(outcome.kills.values()) == 5
