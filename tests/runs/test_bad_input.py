"""A user's own mistakes: each message names the value and the remedy, each exit code is the contract's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peel_agent.cli.watch import check_place
from peel_agent.errors import ConfigurationError
from tests import zoo
from tests.runs.command import peel_agent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one tiny checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    zoo.save(zoo.build("llama", steps=20), folder, step=5)
    return folder


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.npy"
    np.save(path, np.concatenate([zoo.token_ids(150, seed) for seed in range(3)]))
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("watch",), 2, ["no directory to watch", "peel-agent watch PATH"]),
        (("watch", "{probe}", "--probe", "{probe}"), 2, ["{probe} is no directory"]),
        (
            ("watch", "{run}/nowhere", "--probe", "{probe}", "--once"),
            3,
            ["{run}/nowhere is not there", "ask again once it is there"],
        ),
        (("watch", "{run}"), 2, ["no probe is named", "--probe FILE"]),
        (("watch", "{run}", "--probe", "{run}/none.npy"), 2, ["no probe at {run}/none.npy"]),
        (("watch", "{run}", "-c", "{run}/none.toml"), 2, ["cannot read the configuration {run}/none.toml"]),
        (("watch", "{empty}", "--probe", "{probe}", "--once"), 3, ["nothing readable in {empty}", "checkpoint-N"]),
        (("scan", "{run}/checkpoint-9", "--probe", "{probe}"), 3, ["no checkpoint at {run}/checkpoint-9"]),
        (("scan", "{empty}", "--probe", "{probe}"), 3, ["{empty} is no checkpoint", "watch --once"]),
        (("scan", "{run}", "--probe", "{probe}"), 3, ["there are checkpoints in it (checkpoint-5)", "watch --once"]),
        (("scan", "{run}/checkpoint-5"), 2, ["no probe is named"]),
        (("scan", "{run}/checkpoint-5", "--probe", "{run}/none.npy"), 2, ["no probe at"]),
        (("scan", "{run}/checkpoint-5", "--probe", "{big}"), 2, ["token id 99", "vocabulary is 19"]),
        (("scan", "{run}/checkpoint-5", "--probe", "{few}"), 2, ["12 tokens", "sequences are needed"]),
        (
            ("scan", "{run}/checkpoint-5", "--probe", "{probe}", "--maps", "[[3,2]]"),
            2,
            ["no target map", "3 before it"],
        ),
        (("scan", "{run}/checkpoint-5", "--probe", "{probe}", "--maps", "[[3,2"), 2, ["--maps is"]),
        (
            ("scan", "{run}/checkpoint-5", "--probe", "{probe}", "--maps", "all"),
            2,
            ["all target maps of 4 blocks are 41"],
        ),
        (("scan", "{run}/checkpoint-5", "--probe", "{probe}", "--quantities", "x"), 2, ["`x`", "margin, bounds"]),
        (("scan", "{run}/checkpoint-5", "--probe", "{probe}", "--device", "cuda:7"), 2, ["cuda:7", "--device cpu"]),
        (
            ("scan", "{run}/checkpoint-5", "--probe", "{probe}", "--effort", "quick", "--fail-on", "caution"),
            2,
            ["--fail-on caution needs bounds"],
        ),
        (
            ("scan", "{run}/checkpoint-5", "--probe", "{probe}", "--out", "{run}/no/f"),
            2,
            ["cannot write to {run}/no/f"],
        ),
        (("scan",), 2, ["usage:"]),
        (("peel",), 2, ["invalid choice"]),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], code: int, words: list[str], checkpoints: Path, probe: Path, tmp_path: Path
) -> None:
    """One line says what is wrong with which value, the next what to do; nothing is a traceback."""
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "big.npy", np.full((100, 12), 99))
    np.save(tmp_path / "few.npy", np.zeros((5, 12), dtype=int))
    names = {
        "run": checkpoints,
        "probe": probe,
        "empty": tmp_path / "empty",
        "big": tmp_path / "big.npy",
        "few": tmp_path / "few.npy",
    }
    finished = peel_agent(*(argument.format(**names) for argument in arguments), home=tmp_path)
    assert finished.returncode == code, finished.stderr
    for word in words:
        assert word.format(**names) in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_probe_that_never_fits_ends_the_watch(checkpoints: Path, tmp_path: Path) -> None:
    """Wrong vocabulary is a wrong configuration: every checkpoint would fail the same way, so the first one tells."""
    np.save(tmp_path / "big.npy", np.full((100, 12), 99))
    finished = peel_agent(
        "watch", checkpoints, "--probe", tmp_path / "big.npy", "--once", home=tmp_path, PEEL__TRACKER__USE='["jsonl"]'
    )
    assert finished.returncode == 2
    assert "token id 99" in finished.stderr


def test_a_directory_that_is_not_there_yet_is_no_mistake(tmp_path: Path) -> None:
    """The training may be about to make it: the watch waits for it. A file is none."""
    check_place(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="file is no directory"):
        check_place(str(tmp_path / "file"))


def test_unknown_key(checkpoints: Path, probe: Path, tmp_path: Path) -> None:
    """A misspelt key names its neighbour."""
    (tmp_path / "peel.toml").write_text("[watch]\nsetle_seconds = 3\n")
    finished = peel_agent("watch", checkpoints, "-c", tmp_path / "peel.toml", "--probe", probe, home=tmp_path)
    assert finished.returncode == 2
    assert "did you mean `settle_seconds`" in finished.stderr


def test_truncated_checkpoint(checkpoints: Path, probe: Path, tmp_path: Path) -> None:
    """A truncated file is waited for, then reported with both sizes; the whole checkpoint beside it is peeled."""
    run = tmp_path / "run"
    shutil.copytree(checkpoints, run)
    shutil.copytree(run / "checkpoint-5", run / "checkpoint-10")
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    weights = run / "checkpoint-10" / "model.safetensors"
    whole = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(20_000)
    (tmp_path / "peel.toml").write_text("[watch]\nsettle_seconds = 1\npoll_seconds = 0.3\n[tracker]\nuse = ['jsonl']\n")
    finished = peel_agent(
        "watch", run, "-c", tmp_path / "peel.toml", "--probe", probe, "--once", "--json", home=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert [json.loads(line)["checkpoint"]["step"] for line in finished.stdout.splitlines()] == [5]
    assert f"model.safetensors has 20,000 of {whole:,} bytes" in finished.stderr
    scanned = peel_agent("scan", run / "checkpoint-10", "--probe", probe, home=tmp_path)
    assert scanned.returncode == 3
    assert "20,000 of" in scanned.stderr


def test_nan_weights(checkpoints: Path, probe: Path, tmp_path: Path) -> None:
    """A diverged model is refused by name; no NaN reaches a report."""
    path = tmp_path / "checkpoint-5"
    shutil.copytree(checkpoints / "checkpoint-5", path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.full_like(
        tensors["model.layers.1.mlp.up_proj.weight"], torch.nan
    )
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    finished = peel_agent("scan", path, "--probe", probe, "--format", "json", home=tmp_path)
    assert (finished.returncode, finished.stdout) == (3, "")
    assert "not a finite number" in finished.stderr


def test_one_bad_checkpoint_among_good_ones(checkpoints: Path, probe: Path, tmp_path: Path) -> None:
    """`scan` says what it cannot use, goes on with the rest, and tells by its exit code."""
    good = checkpoints / "checkpoint-5"
    finished = peel_agent("scan", tmp_path / "none", good, "--probe", probe, "--format", "json", home=tmp_path)
    assert finished.returncode == 3
    assert [json.loads(line)["checkpoint"]["path"] for line in finished.stdout.splitlines()] == [str(good)]


def test_too_few_fit_tokens_are_undecided(checkpoints: Path, tmp_path: Path) -> None:
    """With fewer fit tokens than a fit can be trusted with, blocks are undecided and the number needed is told."""
    np.save(tmp_path / "small.npy", zoo.token_ids(100, 1)[:, :2])
    finished = peel_agent(
        "scan", checkpoints / "checkpoint-5", "--probe", tmp_path / "small.npy", "--format", "json",
        home=tmp_path, PEEL__PROBE__FIT_TOKENS="30", PEEL__PROBE__SELECT_TOKENS="10", PEEL__PROBE__CONFIRM_TOKENS="40",
    )  # fmt: skip
    report = json.loads(finished.stdout)
    assert "above" not in {layer["status"] for layer in report["layers"]}
    assert {entry["what"]: entry["why"] for entry in report["skipped"]} == {
        "affine references": "30 fit tokens; a fit of 17 columns needs 34",
        "`previous` references": "30 fit tokens; a fit of 24 columns needs 48",
        **{
            f"map {label}": "30 fit tokens; a fit of 24 columns needs 48"
            for label in ("4", "1-4", "4-4", "1-2-4", "1-4-4", "1-3-4")
        },
    }
    assert [bound["label"] for bound in report["bounds"]] == ["head"]
