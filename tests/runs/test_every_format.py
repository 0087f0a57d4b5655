"""The same weights in every format give the same numbers, bit for bit."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from peel_agent.config import PeelSettings, ProbeSettings
from peel_agent.pipeline import scan
from peel_agent.publish import report_json
from tests import zoo


def as_pickle(model: Any, folder: Path) -> Path:
    """`pytorch_model.bin` with config.json."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def as_nano(model: Any, folder: Path) -> Path:
    """One file with an optimizer beside a compiled model's names."""
    model.config.save_pretrained(folder)
    state = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save({"model": state, "optimizer": optimiser, "iter_num": 70, "best_val_loss": 1.0}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def as_lightning(model: Any, folder: Path) -> Path:
    """A Lightning module's file, written in its layout."""
    model.config.save_pretrained(folder)
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    path = folder / "epoch=1-step=70.ckpt"
    torch.save({"epoch": 1, "global_step": 70, "state_dict": state, "pytorch-lightning_version": "2.5.0"}, path)
    return path


def as_distributed(model: Any, folder: Path) -> Path:
    """torch.distributed.checkpoint by one process."""
    path = folder / "step-70"
    dcp.save({"model": model.state_dict()}, checkpoint_id=path)
    model.config.save_pretrained(path)
    return path


WRITERS: dict[str, Callable[[Any, Path], Path]] = {
    "torch folder": as_pickle,
    "nanoGPT layout": as_nano,
    "Lightning layout": as_lightning,
    "distributed": as_distributed,
}


def numbers(path: Path, probe: Path) -> dict[str, Any]:
    """A report without what tells one file from another."""
    found = scan(
        path,
        probe=ProbeSettings(path=probe, sequence_length=12),
        peeling=PeelSettings(quantities=("margin", "bounds"), maps=((4,), (1, 4))),
        clock=itertools.count().__next__,
    )
    form = report_json(found)
    return {key: value for key, value in form.items() if key not in ("checkpoint", "timing")}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", WRITERS)
def test_numbers_are_those_of_safetensors(name: str, kind: str, tmp_path: Path) -> None:
    """Loss, margins, bounds and all their intervals are equal, not close."""
    model = zoo.build(kind, steps=20)
    np.save(tmp_path / "probe.npy", zoo.token_ids(200, 3))
    plain, other = tmp_path / "plain", tmp_path / "other"
    other.mkdir()
    model.save_pretrained(plain)
    path = WRITERS[name](model, other)
    assert numbers(path, tmp_path / "probe.npy") == numbers(plain, tmp_path / "probe.npy")
    shutil.rmtree(other)
