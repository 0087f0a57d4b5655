"""The sidecar finds the training's run by itself: the tag that MLflow adds when peel-agent is installed beside it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from peel_agent.testing.trackers import example_publication
from peel_plugins.trackers import mlflow_run
from peel_plugins.trackers.mlflow_context import DIRECTORY_TAG, VARIABLE, CheckpointDirectory
from peel_plugins.trackers.mlflow_run import NOTE_END, MlflowSettings
from tests import servers

mlflow_uri = servers.mlflow_uri


@pytest.mark.parametrize(
    ("given", "tag"),
    [
        ("{}/checkpoints", "{}/checkpoints"),
        (" {}/checkpoints/ ", "{}/checkpoints"),
        ("{}/link", "{}/checkpoints"),
        ("{}/not/there/../yet", "{}/not/yet"),
        ("checkpoints", "{}/checkpoints"),
        ("~/checkpoints", "{}/checkpoints"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("", None),
        ("  ", None),
        (None, None),
    ],
)
def test_the_tag(given: str | None, tag: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory as the sidecar names it, and no tag where the variable says nothing."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given.format(tmp_path))
    provider = CheckpointDirectory()
    tags = provider.tags() if provider.in_context() else {}
    assert tags == ({} if tag is None else {DIRECTORY_TAG: tag.format(tmp_path)})
    assert DIRECTORY_TAG == mlflow_run.DIRECTORY_TAG


def test_a_training_costs_nothing() -> None:
    """MLflow finds the entry point; loading it imports nothing of peel-agent but the plug-in's own file."""
    (point,) = [
        one for one in entry_points(group="mlflow.run_context_provider") if one.value.startswith("peel_plugins")
    ]
    assert point.load() is CheckpointDirectory
    code = (
        "import sys; before = set(sys.modules); import peel_plugins.trackers.mlflow_context;"
        "print(sorted(name for name in set(sys.modules) - before if 'peel' in name or name in ('torch', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['peel_plugins', 'peel_plugins.trackers', 'peel_plugins.trackers.mlflow_context']\n"


@pytest.mark.parametrize("opens", ["mlflow.start_run", "lightning"])
def test_the_run_is_found_without_configuration(opens: str, mlflow_uri: str, tmp_path: Path) -> None:
    """A training that names its directory in the environment and nothing else: its own run gets the numbers.

    By MLflow's own `start_run`, which transformers and Accelerate call, and by Lightning's logger.
    """
    begin = {
        "mlflow.start_run": "import mlflow; mlflow.set_experiment('{name}'); run = mlflow.start_run().info.run_id",
        "lightning": "from lightning.pytorch.loggers import MLFlowLogger; "
        "run = MLFlowLogger('{name}', tracking_uri='{uri}').run_id",
    }[opens].format(name=tmp_path.name, uri=mlflow_uri)
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}; print('run', run)"],
        cwd=tmp_path,
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": mlflow_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            VARIABLE: "checkpoints",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    (run_id,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("run ")]
    tracker = mlflow_run.PLUGIN.connect(
        MlflowSettings(tracking_uri=mlflow_uri, experiment=tmp_path.name),
        checkpoint_dir=str(tmp_path / "checkpoints"),
        state_dir=tmp_path / "state",
    )
    tracker.publish(example_publication(100))
    assert tracker.where() == f"MLflow run {run_id} at {mlflow_uri}"
    assert servers.mlflow_client(mlflow_uri).get_run(run_id).data.metrics["peel/loss"] == 2.9


def test_an_experiment_that_the_sidecar_makes_opens_as_model_training(mlflow_uri: str, tmp_path: Path) -> None:
    """It has the kind that MLflow's pages know; one that was there keeps what it has."""
    client = servers.mlflow_client(mlflow_uri)
    there = client.create_experiment(f"there {tmp_path.name}", tags={"mlflow.experimentKind": "genai_development"})
    for name in (f"made {tmp_path.name}", f"there {tmp_path.name}"):
        mlflow_run.PLUGIN.connect(
            MlflowSettings(tracking_uri=mlflow_uri, experiment=name),
            checkpoint_dir=str(tmp_path / name),
            state_dir=tmp_path / name,
        ).publish(example_publication(100))
    made = client.get_experiment_by_name(f"made {tmp_path.name}")
    assert made.tags["mlflow.experimentKind"] == "custom_model_development"
    assert client.get_experiment(there).tags["mlflow.experimentKind"] == "genai_development"


def test_a_run_that_the_sidecar_made_says_what_was_found(mlflow_uri: str, tmp_path: Path) -> None:
    """Its note is the latest verdict, over restarts; one that is late or has no words leaves it, and so does any over a
    text of the user's."""
    client = servers.mlflow_client(mlflow_uri)

    def publish(step: int, headline: str) -> str:
        tracker = mlflow_run.PLUGIN.connect(
            MlflowSettings(tracking_uri=mlflow_uri, experiment=tmp_path.name),
            checkpoint_dir=str(tmp_path),
            state_dir=tmp_path / "state",
        )
        tracker.publish(dataclasses.replace(example_publication(step), headline=headline))
        (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
        return run.data.tags.get("mlflow.note.content", "")

    assert publish(100, "") == ""
    assert publish(200, "step 200; layer 3 earns nothing") == "step 200; layer 3 earns nothing" + NOTE_END
    assert publish(100, "step 100; nothing found") == "step 200; layer 3 earns nothing" + NOTE_END
    assert publish(300, "step 300; nothing found") == "step 300; nothing found" + NOTE_END
    assert publish(400, "") == "step 300; nothing found" + NOTE_END
    assert len(publish(500, "x" * 100_000)) < 5_000
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    client.set_tag(run.info.run_id, "mlflow.note.content", "my own words")
    assert publish(600, "step 600; nothing found") == "my own words"
    assert client.get_run(run.info.run_id).data.tags["peel.status"] == "below"


def test_a_run_of_the_trainings_keeps_its_empty_note(mlflow_uri: str, tmp_path: Path) -> None:
    """One that is found by the tag of its directory gets numbers and no note, also when it has none."""
    client = servers.mlflow_client(mlflow_uri)
    experiment = client.create_experiment(tmp_path.name)
    run_id = client.create_run(experiment, tags={DIRECTORY_TAG: str(tmp_path)}).info.run_id
    tracker = mlflow_run.PLUGIN.connect(
        MlflowSettings(tracking_uri=mlflow_uri, experiment=tmp_path.name),
        checkpoint_dir=str(tmp_path),
        state_dir=tmp_path / "state",
    )
    tracker.publish(dataclasses.replace(example_publication(100), headline="step 100; nothing found"))
    data = client.get_run(run_id).data
    assert data.metrics["peel/loss"] == 2.9
    assert "mlflow.note.content" not in data.tags
