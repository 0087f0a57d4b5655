"""The same weights in every format give the same numbers, bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from peel_agent import registry, watch
from peel_agent.pipeline import locate, scan
from peel_agent.publish import report_json
from peel_agent.records import PeelSettings, ProbeSettings
from tests import zoo
from tests.runs import producers


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


def as_adapter(model: Any, folder: Path) -> Path:
    """An adapter of PEFT that replaces one norm of a base model, inside its folder, in which that norm was another."""
    tensors = {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith(("norm.weight", "ln_f.weight"))
    }
    model.save_pretrained(folder / "base")
    stored = load_file(folder / "base" / "model.safetensors")
    save_file({name: one + (name in tensors) for name, one in stored.items()}, folder / "base" / "model.safetensors")
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


WRITERS: dict[str, Callable[[Any, Path], Path]] = {
    "torch folder": as_pickle,
    "nanoGPT layout": as_nano,
    "Lightning layout": as_lightning,
    "distributed": as_distributed,
    "adapter": as_adapter,
}


def numbers(path: Path, probe: Path) -> dict[str, Any]:
    """A report without what tells one file from another."""
    report = scan(
        path,
        probe=ProbeSettings(path=probe, sequence_length=12),
        peeling=PeelSettings(quantities=("margin", "bounds"), maps=((4,), (1, 4))),
        clock=itertools.count().__next__,
    )
    form = report_json(report)
    # `bound_step` is the step of the checkpoint, which a plain file does not know.
    return {key: value for key, value in form.items() if key not in ("checkpoint", "timing", "bound_step")}


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


# ---------------------------------------------------------------- what real trainings write


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every producer of one process wrote."""
    root = tmp_path_factory.mktemp("single")
    producers.run(root, producers.SINGLE, ranks=1)
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks wrote."""
    root = tmp_path_factory.mktemp("pair")
    producers.run(root, producers.PAIR, ranks=2)
    return root


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.npy"
    np.save(path, zoo.token_ids(200, 3))
    return path


PRODUCERS = {
    **{name: ("single", producer) for name, producer in producers.SINGLE.items()},
    **{name: ("pair", producer) for name, producer in producers.PAIR.items()},
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_what_a_training_wrote(name: str, probe: Path, request: pytest.FixtureRequest) -> None:
    """Its format and step are found, and its report is, bit for bit, that of the same weights in safetensors."""
    fixture, producer = PRODUCERS[name]
    folder: Path = request.getfixturevalue(fixture) / name
    ref = locate(folder / producer.checkpoint)
    assert (ref.format, ref.step) == (producer.format, producer.step)
    written, plain = numbers(ref.path, probe), numbers(folder / producers.PLAIN, probe)
    assert written == plain
    assert written["model"]["precision"] == ("bfloat16" if "bfloat16" in name else "float32")


@pytest.mark.parametrize("name", PRODUCERS)
def test_a_watched_folder_has_it_once(name: str, request: pytest.FixtureRequest) -> None:
    """In the folder that the training writes to, the checkpoint is seen once and whole; nothing else is taken for one.

    Of Lightning that is without `last.ckpt`, a link to another.
    """
    fixture, producer = PRODUCERS[name]
    path: Path = request.getfixturevalue(fixture) / name / producer.checkpoint
    seen = watch.scan(path.parent, registry.formats())
    others = [sighting for sighting in seen if sighting.path.name != producers.PLAIN]
    assert [(sighting.path, sighting.readiness.state) for sighting in others] == [(path.resolve(), "complete")]


def test_the_trainings_did_what_they_say(single: Path, pair: Path) -> None:
    """Weights are cut over two ranks, a state is of a compiled model, Lightning's last is a link."""
    for name, within in (
        ("torch.distributed.checkpoint", "step-3"),
        ("the same, asynchronous", "step-3"),
        ("Accelerate, FSDP2", "project/checkpoints/checkpoint_0/pytorch_model_fsdp_0"),
        ("Trainer, FSDP2", "checkpoint-2/pytorch_model_fsdp_0"),
        ("Lightning, ModelParallelStrategy", "epoch=0-step=2.ckpt"),
    ):
        assert {file.name for file in (pair / name / within).glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert (single / "Lightning" / "last.ckpt").readlink() == Path("epoch=1-step=4.ckpt")
    for folder, prefix in ((single / "torch.compile", b"_orig_mod.transformer"), (pair, b"module.transformer")):
        file = folder / "ckpt.pt" if folder != pair else pair / "DistributedDataParallel" / "ckpt.pt"
        assert prefix in file.read_bytes()
