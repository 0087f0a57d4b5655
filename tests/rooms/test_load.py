"""Checkpoints: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import peel_agent
from peel_agent import registry
from peel_agent.capture import open_trace
from peel_agent.errors import (
    CheckpointError,
    ConfigurationError,
    PeelError,
    UnknownFamily,
    WeightsMismatch,
)
from peel_agent.load import open_snapshot
from peel_agent.pipeline import locate
from peel_agent.records import CheckpointRef, Snapshot, Weights, WeightSet
from tests import zoo


def opened(path: Path) -> Snapshot:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_snapshot(ref, form, registry.family)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return zoo.save(zoo.build("llama", steps=0), tmp_path / "model")


def test_snapshot_says_what_it_is(llama: Path) -> None:
    """Family, widths, size, precision and tied head come from the checkpoint."""
    snapshot = opened(llama)
    assert (snapshot.family, snapshot.width, snapshot.vocabulary, snapshot.context) == ("llama", 16, 19, 32)
    assert snapshot.precision == "float32"
    assert not snapshot.tied_head
    assert snapshot.parameters == sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())


def test_nothing_is_materialised(llama: Path) -> None:
    """Opening a checkpoint allocates no weights: every parameter is on the meta device."""
    assert {parameter.device.type for parameter in opened(llama).model.parameters()} == {"meta"}


def test_tied_head(tmp_path: Path) -> None:
    """GPT-2 saves no head of its own; it is found through the tie."""
    assert opened(zoo.save(zoo.build("gpt2", steps=0), tmp_path)).tied_head


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    """bfloat16 weights are computed with in float32, and the report says what was stored."""
    model = zoo.build("llama", steps=0)
    expected = model.to(torch.bfloat16).state_dict()["model.layers.0.mlp.down_proj.weight"].float()
    snapshot = opened(zoo.save(model, tmp_path))
    assert snapshot.precision == "bfloat16"
    block = next(iter(zoo.trace_of(tmp_path).blocks(stop=1)))
    assert torch.equal(block.mlp_projection.weight.T, expected)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "mamba"}, UnknownFamily, "mamba"),
        ({"model_type": None}, UnknownFamily, "None"),
        ({"num_hidden_layers": 5}, WeightsMismatch, "missing model.layers.4"),
        ({"num_hidden_layers": 3}, WeightsMismatch, "unexpected model.layers.3"),
        ({"intermediate_size": 28}, WeightsMismatch, r"\[24, 16\] instead of \[28, 16\]"),
        ({"quantization_config": {"quant_method": "gptq"}}, CheckpointError, "gptq"),
        ({"num_attention_heads": "many"}, CheckpointError, "config.json"),
    ],
)
def test_config_that_does_not_fit(llama: Path, changes: dict[str, Any], error: type[PeelError], words: str) -> None:
    """Whatever config.json and the weights disagree on is named."""
    edit_config(llama, **changes)
    with pytest.raises(error, match=words) as caught:
        opened(llama)
    assert caught.value.remedy


def test_remote_code_is_ignored(llama: Path) -> None:
    """A checkpoint that names code of its own is built from transformers' classes, and the code is not looked at."""
    (llama / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    edit_config(llama, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert opened(llama).family == "llama"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_missing_weight(llama: Path, name: str) -> None:
    """A weight that is not there is named."""
    edit_weights(llama, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsMismatch, match=f"missing {name}"):
        opened(llama)


def test_unexpected_weight(llama: Path) -> None:
    """A weight that no module takes is named: the model is not the one it is taken for."""
    edit_weights(llama, lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.zeros(2)}))
    with pytest.raises(WeightsMismatch, match=r"unexpected model\.layers\.0\.adapter\.weight"):
        opened(llama)


def test_a_glob_may_name_modules(llama: Path) -> None:
    """`*.mlp.gate_proj` names the weights of these modules, as `*.mlp.gate_proj.weight` does, and no others."""
    ref = locate(llama)
    (form,) = registry.formats(ref.format)
    ternary = WeightSet.named("ternary")
    for glob in ("*.mlp.gate_proj", "*.mlp.gate_proj.weight"):
        snapshot = open_snapshot(ref, form, registry.family, sets={glob: ternary})
        block = next(iter(open_trace(snapshot, zoo.probe()).blocks()))
        assert {name for name, weight_set in block.sets.items() if weight_set == ternary} == {"mlp.gate_proj.weight"}
    with pytest.raises(ConfigurationError, match=r"`\*\.mlp` .* fits no matrix") as caught:
        open_snapshot(ref, form, registry.family, sets={"*.mlp": ternary})
    assert "the names of modules or weights, such as" in caught.value.remedy


def test_a_checkpoint_is_opened_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peeling parses the headers of a checkpoint one time, whatever asks for its configuration and its weights."""
    (form,) = registry.formats(locate(llama).format)
    opened_times: list[Path] = []

    def counted(ref: CheckpointRef, original: Callable[[CheckpointRef], Weights] = form.open) -> Weights:
        opened_times.append(ref.path)
        return original(ref)

    monkeypatch.setattr(form, "open", counted)
    np.save(tmp_path / "probe.npy", zoo.token_ids(80, 1))
    peel_agent.scan(llama, probe=tmp_path / "probe.npy", quantities=())
    assert len(opened_times) == 1


# ---------------------------------------------------------------- patches


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 under its published names, which lack the first part."""
    path = zoo.save(zoo.build("gpt2", steps=0), tmp_path_factory.mktemp("published"))
    tensors = load_file(path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def patched(path: Path, patch: dict[str, torch.Tensor]) -> Snapshot:
    file = path / "patch" / "patch.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file(patch, file)
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_snapshot(ref, form, registry.family, patch=file)


def test_a_patch_has_the_names_of_the_model(published: Path) -> None:
    """A patch replaces weights by the model's names, whatever they are stored as; a tied one under both its names."""
    norm, embeddings = torch.full((zoo.WIDTH,), 3.0), torch.ones(zoo.VOCABULARY, zoo.WIDTH)
    weights = patched(published, {"transformer.h.1.ln_2.weight": norm, "transformer.wte.weight": embeddings}).weights
    assert torch.equal(weights.read("transformer.h.1.ln_2.weight"), norm)
    assert torch.equal(weights.read("lm_head.weight"), embeddings)
    stored = load_file(published / "model.safetensors")
    assert torch.equal(weights.read("transformer.h.2.ln_2.weight"), stored["h.2.ln_2.weight"])


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"h.1.ln_2.weight": torch.ones(16)}, "`h.1.ln_2.weight` .* is no weight of the model"),
        ({"transformer.h.1.ln_2.weight": torch.ones(8)}, r"\[8\], which is \[16\] in the model"),
    ],
)
def test_a_patch_of_another_model(published: Path, patch: dict[str, torch.Tensor], words: str) -> None:
    """A patch with a name or a shape that the model has not is refused by name."""
    with pytest.raises(WeightsMismatch, match=words):
        patched(published, patch)
