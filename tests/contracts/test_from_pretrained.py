"""Whatever transformers' from_pretrained loads is read, by its rules, and gives the loss that transformers gives.

Each case is a checkpoint in another spelling of its names. Both sides open the same folder. Names that only a wrapper
or an older release gave are held against the plain checkpoint, for transformers itself does not take them any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from peel_agent import registry
from peel_agent.errors import WeightsMismatch
from peel_agent.load import open_snapshot
from peel_agent.peel.numerics.losses import logits
from peel_agent.pipeline import locate
from peel_agent.records import Snapshot
from tests import zoo

State = dict[str, Tensor]
IDS = torch.from_numpy(zoo.token_ids(16, 7))
TIED = {
    "gpt2": "transformer.wte.weight",
    "gemma": "model.embed_tokens.weight",
    "opt": "model.decoder.embed_tokens.weight",
}


@dataclass(frozen=True)
class Saved:
    """A model of the zoo saved by transformers: its config.json and its tensors as stored."""

    config: dict[str, Any]
    state: State
    prefix: str
    loss: float


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A model of each kind, saved once."""
    done: dict[str, Saved] = {}

    def of(kind: str) -> Saved:
        if kind not in done:
            model = zoo.build(kind, steps=2)  # no two weights are alike, no bias is 0
            path = zoo.save(model, tmp_path_factory.mktemp(kind))
            done[kind] = Saved(
                json.loads((path / "config.json").read_text()), _stored(path), model.base_model_prefix, _loss(model)
            )
        return done[kind]

    return of


def _stored(path: Path) -> State:
    """The tensors as a reader of our own gives them."""
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    weights = form.open(ref)
    return {name: weights.read(name) for name in weights.shapes()}


@torch.no_grad()
def _loss(model: Any) -> float:
    return float(model(IDS, labels=IDS).loss)


def _write(folder: Path, config: dict[str, Any], state: State, *, pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        alone = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(alone, folder / "model.safetensors", {"format": "pt"})
    return folder


def _opened(path: Path) -> Snapshot:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_snapshot(ref, form, registry.family)


@torch.no_grad()
def _peeled_loss(path: Path) -> float:
    """The loss of the checkpoint as it is peeled: block by block, from the weights that were read."""
    trace = zoo.trace_of(path)
    h = trace.embed(IDS.numpy())
    for block in trace.blocks():
        h = block.run(h)
    scores = logits(trace.normalise(h), trace.head)
    return float(functional.cross_entropy(scores[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


def _loads_whole(path: Path) -> float:
    """The loss of transformers' model; it must have found every weight."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return _loss(model.eval())


def _renamed(change: Callable[[str], str]) -> Callable[[Saved], State]:
    return lambda saved: {change(name): tensor for name, tensor in saved.state.items()}


def _without_prefix(saved: Saved) -> State:
    return {name.removeprefix(f"{saved.prefix}."): tensor for name, tensor in saved.state.items()}


def _with_prefix(saved: Saved) -> State:
    """Once more; transformers gives Pythia's head its name of today only where it has no prefix."""
    return {
        name if name.startswith("embed_out.") else f"{saved.prefix}.{name}": tensor
        for name, tensor in saved.state.items()
    }


@pytest.mark.parametrize("kind", sorted(zoo.CONFIGS))
def test_a_body_without_its_prefix(saved: Callable[[str], Saved], kind: str, tmp_path: Path) -> None:
    """The first part of the body's names may be missing, as in GPT-2 and OPT as they were published."""
    path = _write(tmp_path, saved(kind).config, _without_prefix(saved(kind)))
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "mixtral", "opt"])
def test_a_prefix_too_many(saved: Callable[[str], Saved], kind: str, tmp_path: Path) -> None:
    """The first part of the body's names may be before all names, those of the body and that of the head."""
    path = _write(tmp_path, saved(kind).config, _with_prefix(saved(kind)))
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)


def _each_block(saved: Saved, name: str, tensor: Tensor) -> State:
    """The stored tensors, and one more in each block."""
    return saved.state | {name.format(block): tensor for block in range(zoo.BLOCKS)}


MASK = torch.ones(1, 1, zoo.CONTEXT, zoo.CONTEXT, dtype=torch.bool).tril()
BUFFERS: dict[str, tuple[str, Callable[[Saved], State]]] = {
    "Llama's frequencies in each block": (
        "llama",
        lambda saved: _each_block(saved, "model.layers.{}.self_attn.rotary_emb.inv_freq", torch.rand(2)),
    ),
    "Llama's frequencies, once": ("llama", lambda saved: saved.state | {"model.rotary_emb.inv_freq": torch.rand(2)}),
    "Mistral's rotary tables": (
        "mistral",
        lambda saved: _each_block(saved, "model.layers.{}.self_attn.rotary_emb.cos_cached", torch.rand(1, 1, 32, 4)),
    ),
    "GPT-2's masks": ("gpt2", lambda saved: _each_block(saved, "transformer.h.{}.attn.bias", MASK)),
    "GPT-2's masks without the prefix": (
        "gpt2",
        lambda saved: _without_prefix(saved) | {f"h.{i}.attn.bias": MASK.byte() for i in range(zoo.BLOCKS)},
    ),
    "GPT-2's number in the masks": (
        "gpt2",
        lambda saved: _each_block(saved, "transformer.h.{}.attn.masked_bias", torch.tensor(-1e4)),
    ),
    "Pythia's masks": ("gpt_neox", lambda saved: _each_block(saved, "gpt_neox.layers.{}.attention.bias", MASK)),
    "Pythia's number in the masks": (
        "gpt_neox",
        lambda saved: _each_block(saved, "gpt_neox.layers.{}.attention.masked_bias", torch.tensor(-1e9)),
    ),
    "Pythia's frequencies": (
        "gpt_neox",
        lambda saved: _each_block(saved, "gpt_neox.layers.{}.attention.rotary_emb.inv_freq", torch.rand(2)),
    ),
    "masks by another name": (
        "llama",
        lambda saved: _each_block(saved, "model.layers.{}.self_attn.bias", MASK),
    ),
    "positions": ("opt", lambda saved: saved.state | {"model.decoder.position_ids": torch.arange(32)[None]}),
    "the version of fairseq": ("opt", lambda saved: saved.state | {"decoder.version": torch.tensor([3.0])}),
    "the scale of embeddings": (
        "gemma3",
        lambda saved: saved.state | {"model.embed_tokens.embed_scale": torch.tensor(9.0)},
    ),
    "frequencies inside a wrapper": (
        "llama",
        lambda saved: _each_block(saved, "_orig_mod.model.layers.{}.self_attn.rotary_emb.inv_freq", torch.rand(2)),
    ),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers(saved: Callable[[str], Saved], name: str, tmp_path: Path) -> None:
    """What a model computes itself is left out of what was stored, whatever its values."""
    kind, change = BUFFERS[name]
    path = _write(tmp_path, saved(kind).config, change(saved(kind)))
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "pickled"), [("gpt2", False), ("gpt2", True), ("gemma", False), ("opt", False)], ids=str
)
@pytest.mark.parametrize("stored", ["once", "twice", "only the head"])
def test_tied_heads(saved: Callable[[str], Saved], kind: str, stored: str, tmp_path: Path, *, pickled: bool) -> None:
    """Head and embeddings that are one tensor may be stored under either name, or under both."""
    state, embeddings = dict(saved(kind).state), TIED[kind]
    if stored != "once":
        state["lm_head.weight"] = state[embeddings]
    if stored == "only the head":
        del state[embeddings]
    path = _write(tmp_path, saved(kind).config, state, pickled=pickled)
    assert _opened(path).tied_head
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)


def test_a_head_of_its_own_although_config_json_ties_it(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    """A stored head that is not the embeddings is the head, as transformers has it, and is not called tied."""
    gpt2 = saved("gpt2")
    path = _write(tmp_path, gpt2.config, gpt2.state | {"lm_head.weight": torch.randn(zoo.VOCABULARY, zoo.WIDTH) / 4})
    assert not _opened(path).tied_head
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)
    assert _peeled_loss(path) != pytest.approx(gpt2.loss, abs=1e-3)


RENAMED: dict[str, tuple[str, Callable[[Saved], State]]] = {
    "Pythia's head": ("gpt_neox", _renamed(lambda name: name.replace("lm_head.", "embed_out."))),
    "experts of Mixtral without the prefix": ("mixtral", _without_prefix),
    "torch.save with prefix": ("llama", _with_prefix),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_that_transformers_changes(saved: Callable[[str], Saved], name: str, tmp_path: Path) -> None:
    """Names that transformers turns into its own are read, in files of torch.save alike."""
    kind, change = RENAMED[name]
    path = _write(tmp_path, saved(kind).config, change(saved(kind)), pickled=True)
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)


WRAPPED: dict[str, tuple[str, Callable[[str], str]]] = {
    "torch.compile": ("llama", lambda name: f"_orig_mod.{name}"),
    "a compiled block": ("llama", lambda name: name.replace(".mlp.", ".mlp._orig_mod.")),
    "a compiled body, and the head as it is": ("llama", lambda name: name.replace("model.", "model._orig_mod.", 1)),
    "DistributedDataParallel": ("gpt2", lambda name: f"module.{name}"),
    "both": ("gpt2", lambda name: f"module._orig_mod.{name}"),
    "FSDP": (
        "llama",
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    ),
    "activation checkpointing": (
        "gpt_neox",
        lambda name: name.replace(".attention.", "._checkpoint_wrapped_module.attention."),
    ),
    "all at once, without the prefix": (
        "mixtral",
        lambda name: (
            "_orig_mod.module._fsdp_wrapped_module."
            + name.removeprefix("model.").replace(".mlp.", "._checkpoint_wrapped_module.mlp.")
        ),
    ),
}


@pytest.mark.parametrize(("name", "pickled"), [*((name, False) for name in WRAPPED), ("FSDP", True)], ids=str)
def test_wrappers(saved: Callable[[str], Saved], name: str, tmp_path: Path, *, pickled: bool) -> None:
    """Modules that only wrap others are taken out of a name wherever they are in it."""
    kind, change = WRAPPED[name]
    path = _write(tmp_path, saved(kind).config, _renamed(change)(saved(kind)), pickled=pickled)
    assert _peeled_loss(path) == pytest.approx(saved(kind).loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt"])
def test_older_names_of_norms(saved: Callable[[str], Saved], kind: str, tmp_path: Path) -> None:
    """gamma and beta of norms are their weight and bias."""
    stored = saved(kind)

    def older(name: str) -> str:
        if "norm" not in name and ".ln_" not in name:
            return name
        return name.replace(".weight", ".gamma").replace(".bias", ".beta")

    state = _renamed(older)(stored)
    assert any(name.endswith(".beta") for name in state)
    assert _peeled_loss(_write(tmp_path, stored.config, state)) == pytest.approx(stored.loss, abs=1e-5)


OLDER_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "pretraining_tp": 1}),
    ("llama", {"rope_theta": 500.0, "rope_scaling": None, "pad_token_id": -1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "rope_theta": 1e6}),
    ("gemma3", {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}),
    ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 100}),
    (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.1, 1.2], "long_factor": [2.0, 3.0]},
            "original_max_position_embeddings": 8,
            "rope_theta": 1e4,
        },
    ),
]


@pytest.mark.parametrize(("kind", "keys"), OLDER_CONFIGS, ids=lambda value: value if isinstance(value, str) else "")
def test_config_json_of_older_releases(
    saved: Callable[[str], Saved], kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Rotary settings and windows are what older keys of config.json say, as transformers takes them."""
    today = {"rope_parameters", "layer_types", "dtype", "transformers_version"}
    config = {key: value for key, value in saved(kind).config.items() if key not in today} | keys
    path = _write(tmp_path, config | {"torch_dtype": "float16"}, saved(kind).state)
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)


# what from_pretrained refuses, or initialises anew


def _refusal(path: Path) -> WeightsMismatch:
    with pytest.raises(WeightsMismatch) as caught:
        _opened(path)
    return caught.value


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_padded_vocabulary_has_its_size_named(saved: Callable[[str], Saved], kind: str, tmp_path: Path) -> None:
    """More rows than config.json says are refused by transformers and here; with the size named, both read them."""
    stored = saved(kind)
    state = {
        name: torch.cat([tensor, torch.zeros(5, zoo.WIDTH)]) if len(tensor) == zoo.VOCABULARY else tensor
        for name, tensor in stored.state.items()
    }
    path = _write(tmp_path, stored.config, state)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(path)
    refusal = _refusal(path)
    assert "[24, 16] instead of [19, 16]" in refusal.what
    assert "set vocab_size to 24 in config.json" in refusal.remedy
    _write(tmp_path, stored.config | {"vocab_size": 24}, state)
    assert _peeled_loss(path) == pytest.approx(_loads_whole(path), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "change", "words", "remedy"),
    [
        (
            "llama",
            lambda saved: saved.state | {"norm.weight": torch.ones(16)},
            "two names model.norm.weight and norm.weight",
            "once",
        ),
        (
            "llama",
            lambda saved: saved.state | {"module.model.norm.weight": torch.ones(16)},
            "two names model.norm.weight and module.model.norm.weight",
            "once",
        ),
        (
            "gpt2",
            lambda saved: saved.state | {"transformer.ln_f.gamma": torch.ones(16)},
            "two names .*ln_f.*ln_f",
            "once",
        ),
        (
            "llama",
            lambda saved: {name: tensor for name, tensor in _without_prefix(saved).items() if "lm_head" not in name},
            "missing lm_head.weight$",
            "AutoModelForCausalLM",
        ),
        (
            "llama",
            lambda saved: {name: tensor for name, tensor in saved.state.items() if "layers.2" not in name},
            "missing model.layers.2",
            "save_pretrained",
        ),
        (
            "gpt2",
            lambda saved: {
                name: tensor.T if name.endswith(("c_attn.weight", "c_fc.weight")) else tensor
                for name, tensor in saved.state.items()
            },
            r"misshapen .*\[48, 16\] instead of \[16, 48\]",
            "nanoGPT",
        ),
        (
            "llama",
            lambda _: {f"model.layers.{i}._fsdp_wrapped_module._flat_param": torch.ones(99) for i in range(zoo.BLOCKS)},
            "unexpected model.layers.0._fsdp_wrapped_module._flat_param",
            "FULL_STATE_DICT",
        ),
        ("llama", lambda saved: saved.state | {"v_head.weight": torch.ones(1, 16)}, "unexpected v_head.weight", ""),
        (
            "llama",
            lambda saved: _each_block(saved, "model.layers.{}.self_attn.bias", torch.ones(16)),
            "unexpected .*attn.bias",
            "",
        ),
    ],
    ids=[
        "prefix twice",
        "wrapper twice",
        "gamma twice",
        "no head",
        "a block less",
        "nanoGPT",
        "FSDP",
        "value head",
        "bias",
    ],
)
def test_refused_by_name(
    saved: Callable[[str], Saved],
    kind: str,
    change: Callable[[Saved], State],
    words: str,
    remedy: str,
    tmp_path: Path,
) -> None:
    """Two names of one weight, weights that would be made up, and weights of another model are refused by name."""
    refusal = _refusal(_write(tmp_path, saved(kind).config, change(saved(kind))))
    assert re.search(words, refusal.what), refusal.what
    assert remedy in refusal.remedy
