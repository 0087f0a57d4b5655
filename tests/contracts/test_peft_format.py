"""The `peft` format: the conformance kit, every kind of LoRA held against peft itself, and what is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peel_agent import registry
from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.load import open_snapshot
from peel_agent.pipeline import check_unchanged, locate
from peel_agent.records import CheckpointRef, LocalListing
from peel_agent.testing.formats import CHECKS, FormatCase
from peel_agent.watch import Pins
from peel_plugins.formats.peft import adapter_config
from peel_plugins.formats.peft.format import FORMAT as PEFT
from tests import zoo

ENTRY = "peel_plugins.formats.peft.format:FORMAT"
IDS = torch.from_numpy(zoo.token_ids(8, 5))


# ---------------------------------------------------------------- what peft writes

Made = tuple[Path, Any]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base model by its name in the zoo; `untied` after it for one whose head has its own weights."""

    @functools.cache
    def base(kind: str) -> Path:
        model = zoo.build(kind, steps=1)
        return zoo.save(model, tmp_path_factory.mktemp("bases") / kind)

    return base


def adapt(base: Path, folder: Path, prepare: Callable[[Any], None] = lambda _: None, **settings: Any) -> Any:
    """A model that an adapter was trained in, which is saved by peft in `folder`: every weight of it is random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says of what it sets right, and of tied weights
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in (one for one in adapted.parameters() if one.requires_grad):
                parameter.add_(0.1 * torch.randn(parameter.shape))
        adapted.save_pretrained(folder)
    return adapted.eval()


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(model(IDS, labels=IDS).loss)


def read_back(path: Path) -> Any:
    """The model that the product makes of a checkpoint."""
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    assert form.name == "peft"
    snapshot = open_snapshot(ref, form, registry.family)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**snapshot.weights.config()))
    state = {name: snapshot.weights.read(name) for name in snapshot.weights.shapes()}
    model.load_state_dict(state)
    return model.eval()


ATTENTION = ["q_proj", "v_proj"]
SQUARE = ["c_attn", "c_proj", "c_fc"]
LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "a pair": ("llama", {"target_modules": ATTENTION}),
    "alpha": ("llama", {"target_modules": ATTENTION, "r": 3, "lora_alpha": 5}),
    "alpha / sqrt(r)": ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6, "use_rslora": True}),
    "every linear module": ("llama", {"target_modules": "all-linear"}),
    "modules by a regular expression": ("llama", {"target_modules": r".*\.[02]\..*(q_proj|down_proj)"}),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1, 3], "layers_pattern": "layers"}),
    "ranks by pattern": (
        "llama",
        {"target_modules": ATTENTION, "r": 4, "rank_pattern": {"v_proj": 2, r"layers\.[01]\.self_attn.q_proj": 3}},
    ),
    "the first of two patterns": (
        "llama",
        {"target_modules": ATTENTION, "alpha_pattern": {"1.self_attn.q_proj": 3, "q_proj": 20, "_proj": 40}},
    ),
    "one module by its whole name": (
        "llama",
        {"target_modules": ATTENTION, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 30}},
    ),
    "Conv1D": ("gpt2", {"target_modules": SQUARE, "fan_in_fan_out": True}),
    "Conv1D that nobody told": ("gpt2", {"target_modules": SQUARE}),
    "all biases": ("opt", {"target_modules": ATTENTION, "bias": "all"}),
    "the biases of the modules": ("opt", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "B with a bias": ("opt", {"target_modules": ATTENTION, "lora_bias": True}),
    "norms as a whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["norm", "input_layernorm"]}),
    "embedding and head as a whole": (
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "fused projections": ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "the untied head of GPT-NeoX": ("gpt_neox", {"target_modules": ["embed_in", "embed_out"]}),
    "DoRA": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of Conv1D": ("gpt2", {"target_modules": SQUARE, "use_dora": True}),
    "DoRA of an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "DoRA with a bias of the model": ("opt", {"target_modules": ATTENTION, "use_dora": True, "bias": "all"}),
    "begun with singular vectors": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "mica"}),
    "begun orthogonal": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
    "weights begun otherwise": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "rows of tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [3, 1, 7]}),
}


@pytest.mark.parametrize("name", LORA)
def test_a_merged_adapter_is_what_peft_merges(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Each tensor is that of merge_and_unload within float32 rounding, and the loss is that of the adapted model."""
    kind, settings = LORA[name]
    adapted = adapt(bases(kind), tmp_path / "tuned", **settings)
    expected = loss_of(adapted)
    assert abs(expected - loss_of(AutoModelForCausalLM.from_pretrained(bases(kind)))) > 1e-4, "the adapter does nothing"
    mine = read_back(tmp_path / "tuned")
    assert loss_of(mine) == pytest.approx(expected, abs=1e-5)
    merged = adapted.merge_and_unload().state_dict()
    for tensor, weight in mine.state_dict().items():
        torch.testing.assert_close(weight, merged[tensor], rtol=1e-5, atol=1e-6)


TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "head": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),
    "embedding and head": ("gpt2", {"target_modules": ["wte", "lm_head"]}),
    "embedding as a whole": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "head as a whole": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "both as a whole": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}),
    "the embedding of OPT": ("opt", {"target_modules": ["embed_tokens"]}),
    "both tied by peft": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "ensure_weight_tying": True},
    ),
    "embedding tied by peft": ("gpt2", {"target_modules": ["wte"], "ensure_weight_tying": True}),
    "other modules": ("gpt2", {"target_modules": ["c_attn"]}),
    "rows of tokens": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [3, 1, 7]}),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_what_was_trained(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Where embedding and head share a weight and one is adapted, the other keeps the base model's, as in training."""
    kind, settings = TIED[name]
    adapted = adapt(bases(kind), tmp_path / "tuned", **settings)
    assert loss_of(read_back(tmp_path / "tuned")) == pytest.approx(loss_of(adapted), abs=1e-5)


RESIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"target_modules": ATTENTION}),
    "as a whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": ("gpt2", {"target_modules": ["c_attn"]}),
    "rows of tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [20, 21]}),
    "rows of tokens, tied": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [20, 21]}),
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary_comes_with_the_adapter(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Embedding and head of more rows than the base model has, as peft saves them, give the model its vocabulary."""
    kind, settings = RESIZED[name]
    adapted = adapt(bases(kind), tmp_path / "tuned", lambda model: model.resize_token_embeddings(23), **settings)
    mine = read_back(tmp_path / "tuned")
    assert mine.config.vocab_size == 23
    assert loss_of(mine) == pytest.approx(loss_of(adapted), abs=1e-5)


def test_a_head_that_peft_did_not_save_is_missed(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """An adapted embedding of more rows, whose head peft leaves out, is refused and not given other rows."""
    settings = {"target_modules": ["embed_tokens"]}
    adapt(bases("llama"), tmp_path / "tuned", lambda model: model.resize_token_embeddings(23), **settings)
    with pytest.raises(CheckpointError, match=r"embedding and the head with \[19, 23\] rows"):
        PEFT.open(locate(tmp_path / "tuned"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Writes the tensors of an adapter again as `change` makes them."""
    file = folder / "adapter_model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})


def as_pickle(folder: Path, change: Callable[[str], str] = lambda name: name) -> None:
    """Writes the tensors of an adapter with torch.save instead, their names as `change` makes them."""
    file = folder / "adapter_model.safetensors"
    torch.save({change(name): tensor for name, tensor in load_file(file).items()}, folder / "adapter_model.bin")
    file.unlink()


def reconfigure(folder: Path, name: str = "adapter_config.json", **values: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | values))


def torch_base(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def renamed(base: Path, name: Callable[[str], str]) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({name(tensor_name): tensor for tensor_name, tensor in tensors.items()}, base / "model.safetensors")


def trainers_base(adapter: Path, base: Path) -> None:
    (base / "trainer_state.json").write_text('{"global_step": 7}')
    reconfigure(adapter, base_model_name_or_path=str(base.rename(base.with_name("checkpoint-7"))))


def moved_inside(adapter: Path, base: Path) -> None:
    base.rename(adapter / "base")
    reconfigure(adapter, base_model_name_or_path="base")


OTHER_FILES: dict[str, Callable[[Path, Path], None]] = {
    "torch.save": lambda adapter, base: as_pickle(adapter),
    "torch.save of a wrapped model": lambda adapter, base: as_pickle(
        adapter, lambda name: "module." + name.replace(".weight", ".default.weight")
    ),
    "wrappers inside names": lambda adapter, base: as_pickle(
        adapter, lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers.").replace("0.", "0._orig_mod.")
    ),
    "a base model in torch.save": lambda adapter, base: torch_base(base),
    "a base model in shards": lambda adapter, base: AutoModelForCausalLM.from_pretrained(base).save_pretrained(
        base, max_shard_size="6KB"
    ),
    "a base model of Trainer": trainers_base,
    "a base model without its prefix": lambda adapter, base: renamed(base, lambda name: name.removeprefix("model.")),
    "a base model inside the adapter's folder": moved_inside,
}


@pytest.fixture
def tuned(bases: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path, Any]:
    """An adapter, a base model of its own and the adapted model."""
    shutil.copytree(bases("llama"), tmp_path / "base")
    adapted = adapt(tmp_path / "base", tmp_path / "tuned", target_modules=ATTENTION)
    return tmp_path / "tuned", tmp_path / "base", adapted


Tuned = tuple[Path, Path, Any]


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_of_the_same_adapter(name: str, tuned: Tuned) -> None:
    """Names as wrapped models have them, pickled tensors and each layout of a base model give the adapted model."""
    adapter, base, adapted = tuned
    OTHER_FILES[name](adapter, base)
    if name == "a base model without its prefix":
        ref = locate(adapter)
        weights = PEFT.open(ref)
        merged = adapted.merge_and_unload().state_dict()
        for tensor in weights.shapes():
            expected = merged[tensor if tensor.startswith("lm_head") else f"model.{tensor}"]
            torch.testing.assert_close(weights.read(tensor), expected, rtol=1e-5, atol=1e-6)
        return
    assert loss_of(read_back(adapter)) == pytest.approx(loss_of(adapted), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_in_16_bits_is_merged_in_float32(
    dtype: torch.dtype, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """An adapter too small for the base model's own dtype is not lost: every tensor comes in float32."""
    AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=dtype).save_pretrained(tmp_path / "base")
    adapt(tmp_path / "base", tmp_path / "tuned", target_modules=ATTENTION)
    rewrite(tmp_path / "tuned", lambda tensors: {name: tensor * 1e-4 for name, tensor in tensors.items()})
    weights, base = PEFT.open(locate(tmp_path / "tuned")), load_file(tmp_path / "base" / "model.safetensors")
    for name, stored in base.items():
        merged = weights.read(name)
        assert merged.dtype == torch.float32
        assert torch.equal(merged.to(dtype), stored)
        assert torch.equal(merged, stored.float()) == (not name.endswith(("q_proj.weight", "v_proj.weight")))


# ---------------------------------------------------------------- the conformance kit


def produce(
    path: Path, *, step: int | None = None, pickled: bool = False, base: str = "../base"
) -> Mapping[str, Tensor]:
    """An adapter whose merged tensors are exact, so that every bit is known, and its base model."""
    model = zoo.build("llama", steps=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-8, 8, parameter.shape).float())
    place = path / base
    model.save_pretrained(place)
    named = base if not base.startswith("..") else str(place.resolve())
    state: dict[str, Tensor] = dict(model.state_dict())
    tensors = {}
    for block in range(2):
        module = f"model.layers.{block}.self_attn.q_proj"
        a, b = torch.randint(-4, 4, (2, zoo.WIDTH)).float(), torch.randint(-4, 4, (zoo.WIDTH, 2)).float()
        state[f"{module}.weight"] = state[f"{module}.weight"] + 2 * b @ a
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": named}
    (path / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        as_pickle(path)
    if step is not None:
        (path / "optimizer.pt").write_bytes(b"not read")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return state


KIT = {
    "trainer": FormatCase(PEFT, ENTRY, functools.partial(produce, step=20), "checkpoint-20", 20),
    "folder": FormatCase(PEFT, ENTRY, produce, "step_800", 800),
    "pickled": FormatCase(PEFT, ENTRY, functools.partial(produce, pickled=True), "final", None, "*.bin"),
    "base model inside": FormatCase(PEFT, ENTRY, functools.partial(produce, base="base"), "final", None),
}


@pytest.mark.parametrize("name", KIT)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[FormatCase, Path], None], name: str, tmp_path: Path) -> None:
    """Every check of the kit holds, for the files of the base model too."""
    check(KIT[name], tmp_path)


def test_an_adapter_is_held_without_its_base_model(tuned: Tuned, tmp_path: Path) -> None:
    """A pin holds the adapter's files only, is the same checkpoint as before, and reads the base model in its place."""
    adapter, base, adapted = tuned
    os.utime(base / "model.safetensors", (4e9, 4e9))
    ref = locate(adapter)
    assert ref.committed_at < 4e9, "the base model is no news of the adapter"
    (tmp_path / "state").mkdir()
    pins = Pins(tmp_path, tmp_path / "state")
    held = pins.pin(ref)
    assert held.held is not None
    assert {file.name for file in held.held.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    shutil.rmtree(adapter)
    check_unchanged(held, PEFT)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = adapted.merge_and_unload().state_dict()[name]
    torch.testing.assert_close(PEFT.open(held.in_place()).read(name), expected)


def test_a_base_model_that_changes_tears_its_adapter(tuned: Tuned) -> None:
    """A base model that is written again is another checkpoint before it is opened, and torn while it is read."""
    adapter, base, _ = tuned
    ref = locate(adapter)
    weights = PEFT.open(ref)
    os.utime(base / "model.safetensors", (5, 5))
    assert locate(adapter).fingerprint != ref.fingerprint
    with pytest.raises(TornCheckpoint):
        weights.read("model.norm.weight")
    with pytest.raises(TornCheckpoint):
        PEFT.open(ref)
    with pytest.raises(TornCheckpoint):
        check_unchanged(ref, PEFT)


# ---------------------------------------------------------------- what is refused, by name and with a way out

MERGE = "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(NEW)"
NAME_IT = "base_model_name_or_path"
PEEL_THE_BASE = "peel the base model instead"
NO_ONE_MODEL = "there is no one merged model: peel its base model"


def configured(**values: Any) -> Callable[[Path, Path], None]:
    return lambda adapter, base: reconfigure(adapter, **values)


def with_tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[Path, Path], None]:
    return lambda adapter, base: rewrite(adapter, change)


def linked_out(adapter: Path, base: Path) -> None:
    (base / "model.safetensors").rename(base.parent / "elsewhere")
    (base / "model.safetensors").symlink_to(base.parent / "elsewhere")


def without(end: str) -> Callable[[Path, Path], None]:
    return with_tensors(lambda tensors: {name: one for name, one in tensors.items() if not name.endswith(end)})


def also(name: str, *shape: int) -> Callable[[Path, Path], None]:
    return with_tensors(lambda tensors: {**tensors, f"base_model.model.{name}": torch.zeros(shape)})


REFUSED: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    # the base model
    "a name on the Hub": (
        configured(base_model_name_or_path="meta/llama"),
        "`meta/llama` is a name on the Hub",
        NAME_IT,
    ),
    "a relative path": (configured(base_model_name_or_path="../base"), "relative to where the training ran", NAME_IT),
    "the adapter's folder": (configured(base_model_name_or_path="."), "relative to where the training ran", NAME_IT),
    "no base model": (configured(base_model_name_or_path=None), "names no base model", NAME_IT),
    "an empty name": (configured(base_model_name_or_path=""), "names no base model", NAME_IT),
    "no text": (configured(base_model_name_or_path=["x"]), r"\['x'\], not a text", MERGE),
    "an impossible name": (configured(base_model_name_or_path="/a\0b"), r"`/a\\x00b`", NAME_IT),
    "a name for a terminal": (configured(base_model_name_or_path="\x1b[31m"), r"`\\x1b\[31m`", NAME_IT),
    "a folder that is not there": (lambda adapter, base: shutil.rmtree(base), "is no folder that is there", NAME_IT),
    "a file": (configured(base_model_name_or_path="/etc/hostname"), "/etc/hostname is no folder", NAME_IT),
    "a folder of other things": (configured(base_model_name_or_path="/etc"), "/etc is no folder with weights", NAME_IT),
    "another adapter": (
        lambda adapter, base: (
            shutil.copytree(adapter, base, dirs_exist_ok=True),
            (base / "model.safetensors").unlink(),
        ),
        "is no folder with weights",
        NAME_IT,
    ),
    "a link out of it": (linked_out, "model.safetensors is a link to .*elsewhere", "cp -rL"),
    "damaged weights": (
        lambda adapter, base: (base / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"),
        "base cannot be used: model.safetensors",
        "save the checkpoint again",
    ),
    "quantised weights": (
        lambda adapter, base: reconfigure(base, "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "base is stored quantised",
        "before it was quantised",
    ),
    # its settings
    "prompts": (configured(peft_type="PREFIX_TUNING"), "of type PREFIX_TUNING", PEEL_THE_BASE),
    "another adapter of PEFT": (configured(peft_type="IA3"), "of type IA3", MERGE),
    "an unknown adapter": (configured(peft_type="NEWEST"), "of type NEWEST", "if peft can merge it"),
    "no type": (configured(peft_type=None), "has peft_type None", MERGE),
    "activated LoRA": (configured(alora_invocation_tokens=[1]), "alora_invocation_tokens", NO_ONE_MODEL),
    "routed LoRA": (configured(arrow_config={"top_k": 3}), "arrow_config", NO_ONE_MODEL),
    "parameters": (configured(target_parameters=["mlp.experts.down_proj"]), "target_parameters", MERGE),
    "replicated layers": (configured(layer_replication=[[0, 2], [1, 3]]), "layer_replication", MERGE),
    "PiSSA": (configured(init_lora_weights="pissa"), "'pissa': it changed the base model's weights", MERGE),
    "PiSSA in steps": (configured(init_lora_weights="pissa_niter_16"), "'pissa_niter_16'", MERGE),
    "OLoRA": (configured(init_lora_weights="olora"), "'olora'", MERGE),
    "LoftQ": (configured(init_lora_weights="loftq"), "'loftq'", MERGE),
    "a setting to come": (configured(brand_new={"a": 1}), "has brand_new", MERGE),
    "no rank": (configured(r="8"), "has r = '8'", MERGE),
    "a rank of 0": (configured(rank_pattern={"q_proj": 0}), "rank_pattern: q_proj = 0", MERGE),
    "no number": (configured(lora_alpha=float("nan")), "has lora_alpha = nan", MERGE),
    "no patterns": (configured(alpha_pattern=["q_proj"]), "has alpha_pattern that is no object", MERGE),
    "an endless pattern": (configured(rank_pattern={"(a+)+b": 2}), r"the pattern '\(a\+\)\+b'", MERGE),
    "a long pattern": (configured(rank_pattern={".*.*.*.*q": 2}), "the pattern", MERGE),
    "no pattern": (configured(rank_pattern={"(q_proj": 2}), "the pattern", MERGE),
    "neither true nor false": (configured(use_rslora="yes"), "use_rslora = 'yes'", MERGE),
    "no tokens": (configured(trainable_token_indices=[-1]), "trainable_token_indices", MERGE),
    # its tensors
    "another rank": (configured(r=3), r"q_proj.lora_A.weight` has shape \[8, 16\]; .* says rank 3", MERGE),
    "half a pair": (without("0.self_attn.q_proj.lora_B.weight"), "q_proj` has no lora_B", MERGE),
    "no magnitudes": (configured(use_dora=True), r"has no magnitude \(DoRA\)", MERGE),
    "another model's": (also("model.layers.9.self_attn.q_proj.bias", 16), "which its base model does not store", MERGE),
    "another shape": (also("model.norm.weight", 3), r"has shape \[3\] instead of \[16\]", MERGE),
    "another width": (
        with_tensors(
            lambda tensors: {
                name: torch.cat([one, one], 1) if "lora_A" in name else one for name, one in tensors.items()
            }
        ),
        r"has matrices for a weight of \[16, 32\]; that of its base model is \[16, 16\]",
        MERGE,
    ),
    "another part": (also("model.norm.lora_E", 3), "lora_E` has a name that is not known", MERGE),
    "another prefix": (
        with_tensors(lambda tensors: {name.removeprefix("base_model."): one for name, one in tensors.items()}),
        "does not begin with base_model.model.",
        MERGE,
    ),
    "two adapters": (
        lambda adapter, base: as_pickle(
            adapter, lambda name: name.replace(".weight", f".{'one' if '.0.' in name else 'two'}.weight")
        ),
        "holds several adapters: one, two",
        MERGE,
    ),
    "nothing": (with_tensors(lambda tensors: {}), "changes no tensor", MERGE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_merged_is_refused_by_name(name: str, tuned: Tuned) -> None:
    """Each adapter that is not merged is named, with a way out; it is never waited for."""
    adapter, base, _ = tuned
    change, words, way_out = REFUSED[name]
    change(adapter, base)
    with pytest.raises(CheckpointError, match=words) as caught:
        PEFT.open(CheckpointRef(adapter, None, "peft", "", 0.0))
    assert not isinstance(caught.value, IncompleteCheckpoint)
    assert way_out in caught.value.remedy
    assert "wait" not in caught.value.remedy


UNFINISHED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "tensors first": (
        lambda adapter, base: (adapter / "adapter_config.json").unlink(),
        "adapter_config.json is not there",
    ),
    "settings first": (lambda adapter, base: (adapter / "adapter_model.safetensors").unlink(), "neither adapter_model"),
    "half of the settings": (
        lambda adapter, base: (adapter / "adapter_config.json").write_text('{"peft_type": "LO'),
        "adapter_config.json does not parse",
    ),
    "half of the base model": (
        lambda adapter, base: os.truncate(base / "model.safetensors", 900),
        "base model .*base is not whole: model.safetensors has 900 of",
    ),
    "Trainer's settings": (lambda adapter, base: (base / "config.json").unlink(), "is not whole: config.json"),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_what_may_still_be_written_is_incomplete(name: str, tuned: Tuned) -> None:
    """An adapter, or a base model, of which a file is missing or short is waited for, and the file is named."""
    adapter, base, _ = tuned
    change, words = UNFINISHED[name]
    change(adapter, base)
    readiness = PEFT.inspect(LocalListing(adapter))
    assert readiness.state == "incomplete"
    assert re.search(words, readiness.reason)


def test_every_setting_of_lora_is_understood_or_refused() -> None:
    """A setting that peft has and this format does not know is refused when it is set; each of today's is decided."""
    known = adapter_config.UNDERSTOOD | adapter_config.WITHOUT_EFFECT
    refused = {
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
        "monteclora_config", "target_parameters", "use_bdlora", "use_qalora", "velora_config",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(LoraConfig)} == known | refused


FITTING: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1]},
    "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 10},
}


@pytest.mark.parametrize("kind", [kind for kind in PeftType if kind != PeftType.LORA], ids=lambda kind: kind.value)
def test_the_way_out_of_every_other_adapter_exists(
    kind: PeftType, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where peft can merge, its merger is run as the remedy says and gives a checkpoint that is read; where it cannot,
    the remedy names the base model.
    """
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps({"peft_type": kind.value}))
    with pytest.raises(CheckpointError, match=f"of type {kind.value}") as caught:
        PEFT.open(CheckpointRef(tmp_path / "tuned", None, "peft", "", 0.0))
    if MERGE not in caught.value.remedy:
        assert "peel" in caught.value.remedy
        assert not can_be_merged(kind)
        return
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], **FITTING.get(kind.value, {})}
    base = AutoModelForCausalLM.from_pretrained(bases("opt" if kind == PeftType.BEFT else "llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings)).save_pretrained(tmp_path / "tuned")
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "tuned").merge_and_unload().save_pretrained(
            tmp_path / "new"
        )
    assert locate(tmp_path / "new").format == "safetensors"


def can_be_merged(kind: PeftType) -> bool:
    """Whether peft has a merger of its own for this type."""
    merge = getattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload", None)
    return merge is not None and kind.value not in adapter_config.DEPEND_ON_INPUT
