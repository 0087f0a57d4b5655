"""The example of deploy/examples/own_model.py: a decoder without transformers, trained, saved and peeled."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peel_agent.errors import CheckpointError, ConfigurationError
from peel_agent.load.architecture import of_factory
from tests import zoo
from tests.runs.command import peel_agent

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "own_model.py"
ARGUMENTS = {"n_layer": 4, "n_head": 4, "n_embd": 16, "block_size": 32, "vocab_size": zoo.VOCABULARY}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(example: ModuleType) -> Any:
    """A model of the example after a few steps, block 2 held at its initial weights' effect: nothing."""
    torch.manual_seed(0)
    model = example.Decoder(**ARGUMENTS)
    for projection in (model.transformer["h"][2].attn.c_proj, model.transformer["h"][2].mlp.c_proj):
        torch.nn.init.zeros_(projection.weight).requires_grad_(False)
        torch.nn.init.zeros_(projection.bias).requires_grad_(False)
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=5e-3)
    ids = torch.from_numpy(zoo.token_ids(64, 0))
    for _ in range(80):
        optimiser.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
    return model.eval()


def loss_of(model: Any, ids: np.ndarray[Any, Any]) -> float:
    with torch.no_grad():
        tokens = torch.from_numpy(ids)
        return float(F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).double(), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("kind", ["nanoGPT's file", "safetensors"])
def test_it_is_peeled(trained: Any, kind: str, tmp_path: Path) -> None:
    """`watch --once` finds the block that does nothing, and the loss is the model's own on the same sequences."""
    run = tmp_path / "run"
    run.mkdir()
    if kind == "safetensors":
        from safetensors.torch import save_model

        save_model(trained, run / "step_70.safetensors")
        (run / "config.json").write_text(json.dumps(ARGUMENTS))
    else:
        state = {f"_orig_mod.{name}": weight for name, weight in trained.state_dict().items()}
        torch.save({"model": state, "model_args": ARGUMENTS, "iter_num": 70}, run / "ckpt.pt")
    ids = zoo.token_ids(400, 9)
    np.save(tmp_path / "probe.npy", ids)
    (tmp_path / "code").mkdir()
    shutil.copy(EXAMPLE, tmp_path / "code")
    finished = peel_agent(
        "watch", run, "--once", "--json", "--probe", tmp_path / "probe.npy", home=tmp_path,
        PYTHONPATH=f"{tmp_path / 'code'}:{os.environ.get('PYTHONPATH', '')}",
        PEEL__MODEL__FACTORY="own_model:factory", PEEL__WATCH__SETTLE_SECONDS="0", PEEL__TRACKER__USE='["jsonl"]',
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["checkpoint"]["step"] == 70
    assert report["model"]["family"] == "own_model:factory"
    assert [layer["name"] for layer in report["layers"]] == [f"transformer.h.{index}" for index in range(4)]
    statuses = [layer["status"] for layer in report["layers"]]
    assert statuses[2] == "below", statuses
    assert report["layers"][2]["margin"]["value"] == pytest.approx(0.0, abs=1e-3)
    assert report["loss"]["low"] - 0.05 < loss_of(trained, ids) < report["loss"]["high"] + 0.05
    assert report["bound"] is not None


def test_without_a_factory_it_is_refused_with_the_way_out(trained: Any, tmp_path: Path) -> None:
    """A model that transformers does not have needs one: the refusal says so."""
    torch.save({"model": trained.state_dict(), "model_args": ARGUMENTS}, tmp_path / "ckpt.pt")
    np.save(tmp_path / "probe.npy", zoo.token_ids(400, 9))
    finished = peel_agent("scan", tmp_path / "ckpt.pt", "--probe", tmp_path / "probe.npy", home=tmp_path)
    assert finished.returncode == 3
    assert "[model] factory" in finished.stderr


def test_parameters_take_no_memory(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a factory builds has its parameters on the meta device, tied ones still one; registration is as before."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    before = torch.nn.Module.register_parameter
    built = of_factory("own_model:factory", ARGUMENTS)
    assert {parameter.device.type for parameter in built.module.parameters()} == {"meta"}
    assert built.tied == {"transformer.wte.weight": "lm_head.weight", "lm_head.weight": "transformer.wte.weight"}
    assert torch.nn.Module.register_parameter is before


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (None, ConfigurationError, "cannot be imported(.|\n)*PYTHONPATH"),
        ("factory = 3", ConfigurationError, "is no callable"),
        ("raise SystemError('at import')", ConfigurationError, "SystemError: at import"),
        ("def factory(config): return config", ConfigurationError, "gave a dict"),
        ("def factory(config): return config['n_layers']", CheckpointError, "KeyError: 'n_layers'"),
    ],
)  # fmt: skip
def test_factories_that_cannot_be_used(
    code: str | None, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told with its name and the cause; one that fails on a checkpoint is that checkpoint's trouble."""
    name = f"factory_{abs(hash((code, words)))}"
    if code is not None:
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error, match=words):
        of_factory(f"{name}:factory", ARGUMENTS)


@pytest.mark.parametrize("field", ["blocks", "attention_output", "mlp_path", "final_norm", "head"])
def test_an_anatomy_that_is_not_the_models(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the model has no module of is told at once."""
    name = f"wrong_{field}"
    value = "('nowhere',)" if field == "mlp_path" else "'nowhere'"
    (tmp_path / f"{name}.py").write_text(
        "import dataclasses, own_model\n"
        "def factory(config):\n"
        "    made = own_model.factory(config)\n"
        f"    return dataclasses.replace(made, anatomy=dataclasses.replace(made.anatomy, {field}={value}))\n"
    )
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"nowhere(.|\n)*correct"):
        of_factory(f"{name}:factory", ARGUMENTS)
