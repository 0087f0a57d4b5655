"""`peel-agent init` and `peel-agent doctor` as a user runs them, over folders as they are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peel_agent.config import Settings, load_settings
from tests import servers, zoo
from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.command import environment_of, peel_agent

mlflow_uri = servers.mlflow_uri


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and held-out tokens beside it."""
    folder = tmp_path_factory.mktemp("place")
    model = zoo.build("llama", steps=1)
    for step in (5, 10):
        zoo.save(model, folder / "run", step=step)
    np.save(folder / "heldout.npy", zoo.token_ids(400, 1))
    return folder


def doctor(*arguments: object, home: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the checks by what they are of."""
    finished = peel_agent("doctor", "--json", *arguments, home=home)
    form = json.loads(finished.stdout)
    assert form["ok"] == (finished.returncode == 0), finished.stderr
    return finished.returncode, {check["what"]: check for check in form["checks"]}


def test_from_nothing_to_a_run_that_is_well(place: Path, mlflow_uri: str, tmp_path: Path) -> None:
    """What `init` writes loads and names what was found; with the probe named, `doctor` finds the run well."""
    file = tmp_path / "peel.toml"
    written = peel_agent("init", place / "run", "--out", file, home=tmp_path)
    assert (written.returncode, written.stdout) == (0, ""), written.stderr
    assert "llama, 4 blocks, width 16, vocabulary 19, context 32" in file.read_text()
    assert "# sequence_length = 32 " in file.read_text()
    settings = load_settings(file, {})
    assert [run.watch.path for run in settings.runs] == [str(place / "run")]
    assert (settings.probe, settings.peel, settings.rules) == (Settings().probe, Settings().peel, Settings().rules)

    status, checks = doctor("-c", file, "--tracking-uri", mlflow_uri, home=tmp_path)
    assert (status, [what for what, check in checks.items() if check["ok"] is False]) == (1, ["probe"])
    assert "[probe] path" in checks["probe"]["remedy"]

    text = file.read_text().replace("[probe]\n", f'[probe]\npath = "{place / "heldout.npy"}"\n')
    file.write_text(text + f'[tracker.mlflow]\ntracking_uri = "{mlflow_uri}"\n')
    shown = peel_agent("doctor", "-c", file, home=tmp_path)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[-1] == "nothing is wrong"
    assert {line.split(maxsplit=1)[0] for line in lines[:-1]} == {"ok", "?"}
    assert not (tmp_path / "peel-agent").exists()


def test_a_file_that_is_there_stays(place: Path, tmp_path: Path) -> None:
    """`init` writes over nothing, unless it is told to; `-` is stdout."""
    file = tmp_path / "peel.toml"
    file.write_text("mine")
    (tmp_path / "empty").mkdir()
    refused = peel_agent("init", tmp_path / "empty", "--out", file, home=tmp_path)
    assert (refused.returncode, file.read_text()) == (2, "mine")
    assert "--force" in refused.stderr
    shown = peel_agent("init", tmp_path / "empty", "--out", "-", home=tmp_path)
    assert peel_agent("init", tmp_path / "empty", "--out", file, "--force", home=tmp_path).returncode == 0
    assert file.read_text() == shown.stdout
    assert peel_agent("init", tmp_path / "none", "--out", "-", home=tmp_path).returncode == 2


@pytest.mark.parametrize("what", ["too high", "declined"])
def test_a_folder_without_checkpoints(what: str, tmp_path: Path) -> None:
    """Both commands say what was found one or two levels below, and `init` writes its file all the same."""
    root = tmp_path / "runs"
    below = root / "exp1" / "checkpoints"
    if what == "too high":
        write_checkpoint(below / "checkpoint-5", 5)
    else:
        below.mkdir(parents=True)
        (below / "model.gguf").write_text("x")
    said = {"too high": "exp1/checkpoints there is a checkpoint", "declined": "model.gguf is a GGUF file"}[what]
    written = peel_agent("init", root, "--out", tmp_path / "peel.toml", home=tmp_path)
    assert written.returncode == 0
    assert said in written.stderr
    status, checks = doctor("-c", tmp_path / "peel.toml", home=tmp_path)
    assert (status, checks["watched place"]["ok"]) == (1, False)
    assert said in checks["watched place"]["words"]


def test_a_broken_configuration(place: Path, tmp_path: Path) -> None:
    """The fault is named, and everything else is looked at: the model too."""
    file = tmp_path / "peel.toml"
    file.write_text(f'[watch]\npath = "{place / "run"}"\n[peel]\neffrt = "quick"\n[tracker]\nuse = ["jsonl"]\n')
    status, checks = doctor("-c", file, "--probe", place / "heldout.npy", home=tmp_path)
    assert (status, [what for what, check in checks.items() if check["ok"] is False]) == (1, ["configuration"])
    assert "did you mean `effort`?" in checks["configuration"]["remedy"]
    assert checks["model"]["ok"]
    assert checks["probe"]["ok"]


def test_neither_imports_torch(place: Path, tmp_path: Path) -> None:
    """Torch is imported in children alone; and a torch.py in the working directory is not what they import."""
    (tmp_path / "torch.py").write_text("raise SystemExit('not torch')")
    program = (
        "import sys\nsys.path = [path for path in sys.path if path]\nfrom peel_agent.cli import main\n"
        "codes = [main(arguments) for arguments in eval(sys.argv[1])]\n"
        "print(codes, sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    commands = [
        ["init", str(place / "run"), "--out", str(tmp_path / "peel.toml")],
        ["doctor", str(place / "run"), "--probe", str(place / "heldout.npy")],
    ]
    finished = subprocess.run(
        [sys.executable, "-c", program, repr(commands)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment_of(tmp_path),
    )
    assert finished.stderr.splitlines()[-1] == "[0, 0] []", finished.stdout
    assert not (tmp_path / "mlflow.db").exists()
