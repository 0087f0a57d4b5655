"""The optional callbacks: real trainings with them and without, read by the watcher, tagged in a real MLflow store."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from transformers import Trainer, TrainerCallback, TrainingArguments

from peel_agent import registry
from peel_agent.callbacks import directory_tag
from peel_agent.callbacks import lightning as for_lightning
from peel_agent.callbacks import transformers as for_transformers
from peel_agent.errors import ConfigurationError
from peel_agent.watch import Folder, Observed
from peel_agent.watch.settle import Settling
from peel_plugins.trackers import mlflow_context, mlflow_run
from tests import servers, zoo
from tests.runs import producers
from tests.runs.producers import Sequences, loader

ROOT = Path(__file__).parents[2]
mlflow_uri = servers.mlflow_uri
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning asks torch in a way that goes away
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),  # few workers, srun
]


def train(folder: Path | str, *callbacks: TrainerCallback, resume: str | None = None, **options: Any) -> Any:
    """transformers' Trainer for four steps of a tiny model, with a checkpoint after each second one."""
    torch.manual_seed(3)
    model = zoo.build("llama", steps=0).train()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **{"report_to": [], "max_steps": 4, "save_steps": 2, "logging_steps": 1, **options},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequences(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Module(lightning.LightningModule):
    """A tiny decoder that Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        self.model = zoo.build("llama", steps=0).train()

    def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=5e-3)


class FolderIO(TorchCheckpointIO):
    """A checkpoint as a folder, as strategies that cut a model over ranks write it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        assert not (Path(path) / "STABLE").exists(), "it is written over while it has its marker"
        weights = {name.removeprefix("model."): one for name, one in checkpoint["state_dict"].items()}
        torch.save(weights, Path(path) / "pytorch_model.bin")
        (Path(path) / "config.json").write_text(json.dumps(zoo.CONFIGS["llama"].to_dict()))


def fit(
    folder: Path, *callbacks: Any, plugins: Any = None, logger: Any = False, epochs: int = 2, **saving: Any
) -> ModelCheckpoint:
    """Lightning's Trainer.fit, two steps an epoch, with a checkpoint after each."""
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **saving)
    lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, saver],
        plugins=plugins,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    ).fit(Module(), loader())
    return saver


def look(folder: Path) -> Observed:
    """What the watcher sees of a folder that has been at rest, with `ready_markers = ["STABLE"]`."""
    return Folder(folder, registry.formats(), Settling(10), ("STABLE",)).look(time.time() + 60)


def taken(folder: Path) -> list[str]:
    return [ref.path.name for ref in look(folder).ready]


# ---------------------------------------------------------------- transformers


class Witness(TrainerCallback):
    """Notes what the watcher takes as each save ends, before the callbacks behind this one."""

    def __init__(self) -> None:
        self.taken: list[list[str]] = []

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.taken.append(taken(Path(args.output_dir)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_training_is_the_same_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of every checkpoint byte for byte, each loss, and all generators of random numbers at the end; but for
    the markers, without which the watcher takes nothing, and with which it takes both.
    """
    runs = {}
    for name, callbacks in {"without": [], "with": [for_transformers.PeelAgentCallback()]}.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # training_args.bin holds the name of the folder
        random.seed(3)
        np.random.seed(3)
        trainer = train("out", *callbacks)
        losses = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
        generators = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())
        runs[name] = (contents(Path("out")), losses, generators)
    files = runs["with"][0]
    markers = {path: files.pop(path) for path in list(files) if path.endswith("STABLE")}
    assert markers == {f"checkpoint-{step}/STABLE": b"" for step in (2, 4)}
    assert len(files) > 10
    assert runs["with"] == runs["without"]
    assert [step for step, _ in runs["with"][1]] == [1, 2, 3, 4]
    assert [reason for _, reason, _ in look(tmp_path / "without" / "out").waiting] == ["waits for STABLE"] * 2
    assert taken(tmp_path / "without" / "out") == []
    assert taken(tmp_path / "with" / "out") == ["checkpoint-2", "checkpoint-4"]


def test_a_marker_comes_last_and_goes_before_a_second_save(tmp_path: Path) -> None:
    """Until the callback is called, a save is not taken, nor is an earlier one that is saved over after a restart; the
    checkpoint that the run goes on from stays marked.
    """
    first, second = Witness(), Witness()
    train(tmp_path, first, for_transformers.PeelAgentCallback())
    assert first.taken == [[], ["checkpoint-2"]]
    train(tmp_path, second, for_transformers.PeelAgentCallback(), resume=str(tmp_path / "checkpoint-2"))
    assert second.taken == [["checkpoint-2"]]
    assert taken(tmp_path) == ["checkpoint-2", "checkpoint-4"]


class ToldToEnd(TrainerCallback):
    """Does what SIGTERM does in a training with `enable_jit_checkpoint`, after three steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            handler = signal.getsignal(signal.SIGTERM).__self__  # type: ignore[union-attr] # Trainer's own
            handler.is_checkpoint_requested = True


def test_what_is_saved_as_a_training_is_told_to_end(tmp_path: Path) -> None:
    """Trainer says nothing to its callbacks of the save before its last step; it is marked as the training ends."""
    train(tmp_path, ToldToEnd(), for_transformers.PeelAgentCallback(), enable_jit_checkpoint=True)
    assert taken(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_marker_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The training goes on, and a warning says what the sidecar will not read."""

    class InTheWay(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (tmp_path / f"checkpoint-{state.global_step}" / "STABLE").mkdir(parents=True)

    trainer = train(tmp_path, InTheWay(), for_transformers.PeelAgentCallback())
    assert trainer.state.global_step == 4
    (first, second) = [one.getMessage() for one in caplog.records if one.name == "peel_agent.callbacks"]
    assert "checkpoint-2 cannot be marked with STABLE" in first
    assert "checkpoint-4 cannot be marked with STABLE" in second


@pytest.mark.parametrize("marker", ["a/b", "/STABLE", "..", "a/"])
@pytest.mark.parametrize("callback", [for_transformers.PeelAgentCallback, for_lightning.PeelAgentCallback])
def test_a_marker_is_a_file_name(callback: Any, marker: str) -> None:
    with pytest.raises(ConfigurationError, match="is no file name"):
        callback(marker)


# ---------------------------------------------------------------- Lightning


@pytest.mark.parametrize("saving", [{}, {"save_last": True}, {"monitor": "step", "mode": "max"}])
def test_folders_of_lightning_are_marked(saving: dict[str, Any], tmp_path: Path) -> None:
    """Each checkpoint that is a folder, by whatever rule it is kept; `last.ckpt`, which is written over, never while it
    is written.
    """
    marked: list[list[str]] = []

    class Each(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            marked.append(taken(tmp_path))

    fit(tmp_path, for_lightning.PeelAgentCallback(), Each(), plugins=[FolderIO()], **saving)
    last = ["last.ckpt"] if "save_last" in saving else []
    assert marked == [[], [], *[["step=2.ckpt", *last]] * 2]
    assert taken(tmp_path) == ["step=2.ckpt", "step=4.ckpt", *last]


def test_a_single_file_of_lightning_needs_no_marker(tmp_path: Path) -> None:
    """None is written, also by a thread in the background, and the watcher takes it with `ready_markers`."""
    for plugins in (None, [AsyncCheckpointIO()]):
        folder = tmp_path / str(plugins is None)
        fit(folder, for_lightning.PeelAgentCallback(), plugins=plugins)
        (folder / "config.json").write_text(json.dumps(zoo.CONFIGS["llama"].to_dict()))
        assert taken(folder) == ["step=2.ckpt", "step=4.ckpt"]
        assert list(folder.rglob("STABLE")) == []


def test_a_folder_that_is_written_in_the_background_is_not_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing says when it is whole; that is said once."""
    fit(tmp_path, for_lightning.PeelAgentCallback(), plugins=[AsyncCheckpointIO(FolderIO())], epochs=3)
    assert taken(tmp_path) == []
    (told,) = [one.getMessage() for one in caplog.records if one.name == "peel_agent.callbacks"]
    assert "written in the background (AsyncCheckpointIO of FolderIO)" in told


# ---------------------------------------------------------------- two ranks


@pytest.mark.long
def test_two_ranks_save_before_one_marks(tmp_path: Path) -> None:
    """No marker is there until the last rank is done with its part, and then there is one; both trainings end."""
    producers.run(tmp_path, producers.MARKED, ranks=2)
    for name, producer in producers.MARKED.items():
        assert taken(tmp_path / name) == [producer.checkpoint]
    late = tmp_path / "Trainer, marked" / "checkpoint-2" / producers.LATE
    assert json.loads(late.read_text()) is False


# ---------------------------------------------------------------- the tag


@pytest.fixture
def store(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of a real MLflow server, which is this process's too for the time of a test; nothing else is set."""
    client = servers.mlflow_client(mlflow_uri)
    import mlflow

    before = mlflow.get_tracking_uri()
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", directory_tag.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    mlflow.set_tracking_uri(mlflow_uri)
    mlflow.set_experiment(tmp_path.name)
    yield client
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_experiment("Default")
    mlflow.set_tracking_uri(before)


def tags_of(client: Any, name: str) -> list[str | None]:
    """The tag of each run of an experiment."""
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return [run.data.tags.get(mlflow_run.DIRECTORY_TAG) for run in runs]


def test_it_is_the_tag_that_the_sidecar_looks_for() -> None:
    assert {directory_tag.DIRECTORY_TAG, mlflow_context.DIRECTORY_TAG} == {mlflow_run.DIRECTORY_TAG}
    assert directory_tag.VARIABLE == mlflow_context.VARIABLE


def test_the_run_of_trainer_is_tagged(store: Any, tmp_path: Path) -> None:
    """The run that Trainer's own callback begins has the folder of the checkpoints, absolute and without links."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    train(tmp_path / "link", for_transformers.PeelAgentCallback(marker=None), report_to=["mlflow"], max_steps=2)
    assert tags_of(store, tmp_path.name) == [str(tmp_path / "real")]
    assert list(tmp_path.rglob("STABLE")) == []


def test_the_run_of_lightnings_logger_is_tagged(store: Any, mlflow_uri: str, tmp_path: Path) -> None:
    """It is the logger's, and not the active one, and it is that of the ModelCheckpoint's folder."""
    import mlflow

    with mlflow.start_run():
        logger = MLFlowLogger(tmp_path.name + " logged", tracking_uri=mlflow_uri)
        fit(tmp_path / "c", for_lightning.PeelAgentCallback(), logger=logger, epochs=1)
    assert tags_of(store, tmp_path.name + " logged") == [str(tmp_path / "c")]
    assert tags_of(store, tmp_path.name) == [None]


@pytest.mark.parametrize(
    ("checkpoint_dir", "variable", "expected"),
    [
        (None, "", "{}/out"),
        (None, "{}/elsewhere", "{}/elsewhere"),
        ("s3://bucket/run", "{}/elsewhere", "s3://bucket/run"),
        ("out/../there", "", "{}/there"),
    ],
)
@pytest.mark.parametrize("named_by", ["active", "MLFLOW_RUN_ID"])
def test_which_run_and_which_folder(
    named_by: str,
    checkpoint_dir: str | None,
    variable: str,
    expected: str,
    store: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The active run, else that of MLFLOW_RUN_ID, gets the callback's folder, else the variable's, else the
    training's; once.
    """
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(directory_tag.VARIABLE, variable.format(tmp_path))
    run_id = mlflow.start_run().info.run_id
    if named_by == "MLFLOW_RUN_ID":
        mlflow.end_run()
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    store.delete_tag(run_id, mlflow_run.DIRECTORY_TAG) if variable else None  # MLflow's own provider was before us
    drawn = random.getstate()
    tag = directory_tag.DirectoryTag(checkpoint_dir)
    tag.put("out")
    assert tags_of(store, tmp_path.name) == [expected.format(tmp_path)]
    store.set_tag(run_id, mlflow_run.DIRECTORY_TAG, "what somebody wrote since")
    tag.put("out")
    assert tags_of(store, tmp_path.name) == ["what somebody wrote since"]
    assert random.getstate() == drawn


def test_a_run_that_begins_later_is_tagged_then(store: Any, tmp_path: Path) -> None:
    """A training that begins its run by itself after the callbacks were called: the next save finds it."""
    import mlflow

    class Begins(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if mlflow.active_run() is None:
                mlflow.start_run()

    train(tmp_path, Begins(), for_transformers.PeelAgentCallback(), max_steps=2)
    assert tags_of(store, tmp_path.name) == [str(tmp_path)]


def test_a_tag_that_fails_ends_nothing(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that is not there: one warning with what to do, and the training goes on to its end."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    trainer = train(tmp_path, for_transformers.PeelAgentCallback())
    assert trainer.state.global_step == 4
    assert taken(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    (told,) = [one.getMessage() for one in caplog.records if one.name == "peel_agent.callbacks"]
    assert f"set the tag to {tmp_path} by hand" in told
    assert "--run-id" in told


# ---------------------------------------------------------------- what it costs a training


def test_an_import_brings_nothing_along() -> None:
    """Where the training has its libraries already, nothing but these modules is loaded, and no thread begins."""
    code = (
        "import sys, threading, transformers.trainer_callback, lightning.pytorch;"
        "before, threads = set(sys.modules), threading.active_count();"
        "import peel_agent.callbacks.transformers, peel_agent.callbacks.lightning;"
        "print(threading.active_count() - threads, 'mlflow' in sys.modules, *sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = [f"peel_agent.callbacks.{name}" for name in ("directory_tag", "lightning", "marker", "transformers")]
    expected = ["0", "False", "peel_agent", "peel_agent.callbacks", *modules, "peel_agent.errors"]
    assert done.stdout.splitlines()[-1].split() == expected


EXAMPLES = re.findall(
    r"```python\n(.*?)```",
    (ROOT / "docs" / "running.md").read_text().partition("## From inside the training")[2].partition("\n## ")[0],
    flags=re.DOTALL,
)


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize(("example", "ends"), list(zip(EXAMPLES, ("trainer", "module"), strict=True)))
def test_the_examples_run(example: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/running.md, as it stands, marks what it saves."""
    monkeypatch.chdir(tmp_path)
    given = {"model": zoo.build("llama", steps=0), "data": Sequences()}
    if ends == "module":
        given |= {"module": Module(), "batches": loader()}
    exec(compile(example, "docs/running.md", "exec"), given)  # the text of this repository
    saved = [path for path in (tmp_path / "checkpoints").iterdir() if "step" in path.name or "checkpoint-" in path.name]
    assert len(saved) > 0
    assert all((path / "STABLE").exists() for path in saved if path.is_dir())
