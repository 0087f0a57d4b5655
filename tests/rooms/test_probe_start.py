"""A probe that does not suit the model is told when the watch starts, and by doctor; reports say what is unused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peel_agent
from peel_agent.cli.watch import check_length
from peel_agent.config import RunSettings, WatchSettings, load_settings
from peel_agent.doctor import folder as folder_module
from peel_agent.doctor.model_child import answered
from peel_agent.doctor.places import check_place
from peel_agent.errors import ConfigurationError, ProbeError
from peel_agent.records import ProbeSettings
from tests import zoo


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's work is done here: this process has imported torch, which takes a child seconds."""
    monkeypatch.setattr(folder_module, "ask_child", lambda request: answered(json.loads(json.dumps(request))))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint of a model with context 32, and a probe in it; not to be written to."""
    folder = tmp_path_factory.mktemp("run")
    zoo.save(zoo.build("llama", steps=1), folder, step=10)
    np.save(folder / "probe.npy", zoo.token_ids(400, 1).reshape(-1))
    return folder


def run_of(root: Path, probe: Path, **more: object) -> RunSettings:
    return RunSettings("run", WatchSettings(path=str(root)), probe=ProbeSettings(path=probe, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [64, 33, 1, 0])
def test_a_sequence_length_that_does_not_suit_the_model(root: Path, length: int) -> None:
    """Neither the watch nor doctor waits for the first peel: both name the length, the context and the key."""
    run = run_of(root, root / "probe.npy", sequence_length=length)
    words = f"sequences of {length} tokens do not fit the model, whose context is 32"
    with pytest.raises(ProbeError, match=f"checkpoint-10: {words}") as caught:
        check_length(run, time.time())
    assert "sequence_length (--sequence-length) between 2 and 32" in caught.value.remedy
    checks = {check.what: check for check in check_place(run, None, "", time.time)}
    assert checks["probe"].ok is False
    assert checks["probe"].words == words


def test_a_length_that_no_model_has() -> None:
    """A sequence of one token has nothing to predict: the configuration is wrong by itself."""
    with pytest.raises(ConfigurationError, match=r"`probe\.sequence_length` is 1"):
        load_settings(None, {"probe.sequence_length": 1})


@pytest.mark.parametrize("length", [None, 2, 16, 32])
def test_one_that_does(root: Path, length: int | None) -> None:
    """The watch begins where the length suits the model."""
    check_length(run_of(root, root / "probe.npy", sequence_length=length), time.time())


def test_where_the_model_is_not_known(root: Path, tmp_path: Path) -> None:
    """Without a checkpoint, or with one that cannot be opened, the watch begins, and the agent tells what comes."""
    check_length(run_of(tmp_path, root / "probe.npy", sequence_length=64), time.time())
    check_length(run_of(tmp_path / "nowhere", root / "probe.npy", sequence_length=64), time.time())
    zoo.save(zoo.build("llama", steps=0), tmp_path, step=10)
    (tmp_path / "checkpoint-10" / "config.json").write_text('{"model_type": "no_such"}')
    check_length(run_of(tmp_path, root / "probe.npy", sequence_length=64), time.time())


def test_the_report_says_what_is_masked(root: Path, tmp_path: Path) -> None:
    """A peel of a masked probe is that of the tokens that the mask leaves, and its report says how many it masks."""
    ids = zoo.token_ids(100, 1)
    np.save(tmp_path / "plain.npy", ids)
    padded = torch.from_numpy(np.pad(ids, ((0, 0), (4, 0)), constant_values=3))
    mask = torch.from_numpy(np.pad(np.ones_like(ids), ((0, 0), (4, 0))))
    save_file({"input_ids": padded, "attention_mask": mask}, tmp_path / "masked.safetensors")
    plain, masked = (
        peel_agent.scan(root / "checkpoint-10", probe=tmp_path / name, effort="quick")
        for name in ("plain.npy", "masked.safetensors")
    )
    assert (masked.probe, masked.loss) == (plain.probe, plain.loss)
    assert "400 masked tokens of the probe" in [one.what for one in masked.skipped]
    assert not any("masked" in one.what for one in plain.skipped)
