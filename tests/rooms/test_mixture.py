"""Mixtures of experts beside transformers' own models, and weights under other names than the model's."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peel_agent import registry
from peel_agent.capture import open_trace
from peel_agent.errors import CheckpointError, WeightsMismatch
from peel_agent.load import open_snapshot
from peel_agent.peel import peel
from peel_agent.peel.bounds.solvers import descend
from peel_agent.peel.numerics.losses import logits
from peel_agent.peel.numerics.streams import Streams
from peel_agent.pipeline import locate
from peel_agent.records import Chunk, Findings, Plan, Snapshot
from tests import zoo
from tests.runs.test_every_format import numbers

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
SPARSE = {"mixtral": [0, 1, 2, 3], "qwen2_moe": [1, 3], "qwen3_moe": [0, 2, 3], "olmoe": [0, 1, 2, 3]}
"""The blocks that have experts; the others have a dense MLP."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with trained routers, its checkpoint as save_pretrained writes it and with the model's own names."""

    kind: str
    model: Any
    separate: Path
    fused: Path


def own_names(model: Any, folder: Path) -> Path:
    """`pytorch_model.bin` of the state dict, beside config.json."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = zoo.build(request.param, steps=40)
    return Case(request.param, model, zoo.save(model, folder / "separate"), own_names(model, folder / "fused"))


def opened(path: Path) -> Snapshot:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_snapshot(ref, form, registry.family)


# ---------------------------------------------------------------- names


def test_the_mapping_is_transformers_own(case: Case) -> None:
    """What save_pretrained wrote expert by expert is read as from_pretrained reads it, bit for bit."""
    written = set(load_file(case.separate / "model.safetensors"))
    theirs = AutoModelForCausalLM.from_pretrained(case.separate).state_dict()
    ours = opened(case.separate).weights
    fused = {name for name in theirs if ".experts." in name}
    assert len(fused) == 2 * len(SPARSE[case.kind])
    assert not fused & written
    assert ours.shapes() == {name: tuple(weight.shape) for name, weight in theirs.items()}
    for name, weight in theirs.items():
        assert torch.equal(ours.read(name), weight), name
        assert torch.equal(weight, case.model.state_dict()[name]), name


def test_the_models_own_names_are_read_as_they_are(case: Case) -> None:
    """A state dict with fused experts gives the same tensors as the folder with separate ones."""
    fused, separate = opened(case.fused).weights, opened(case.separate).weights
    for name in fused.shapes():
        assert torch.equal(fused.read(name), separate.read(name)), name


def test_a_block_is_read_without_the_others(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts are put together when their block is visited; no tensor of another block is read for it."""
    snapshot = opened(case.separate)
    trace = open_trace(snapshot, zoo.probe())
    stored = snapshot.weights._stored  # type: ignore[attr-defined]
    asked: list[str] = []
    read = type(stored).read
    monkeypatch.setattr(type(stored), "read", lambda self, name: asked.append(name) or read(self, name))
    sparse = SPARSE[case.kind][-1]
    _ = next(iter(trace.blocks(sparse, sparse + 1)))
    assert asked
    assert len(asked) == len(set(asked))
    assert all(name.startswith(f"model.layers.{sparse}.") for name in asked)
    assert set(asked) == {name for name in stored.shapes() if name.startswith(f"model.layers.{sparse}.")}


# ---------------------------------------------------------------- running


def test_loss_is_the_models(case: Case) -> None:
    """The loss of the block by block run is the mean of what transformers' forward gives, in float64, on confirm."""
    trace = zoo.trace_of(case.separate)
    findings = peel(trace, Plan(frozenset({"margin"}), (), ()), itertools.count().__next__)
    assert findings.loss.value == pytest.approx(loss_of(doubled(case.model), trace.probe.confirm), abs=2e-6)


def test_mlp_path_gives_what_the_block_adds(case: Case) -> None:
    """On the same sequences the MLP part run by itself gives the block's output to the last bit."""
    trace = zoo.trace_of(case.separate)
    h = trace.embed(zoo.token_ids(7, 4))
    for block in trace.blocks():
        seen = block.observe(h)
        assert torch.equal(block.run_mlp_part(seen.mid), seen.output)
        assert not torch.equal(seen.mid, seen.output)
        h = seen.output


@pytest.mark.parametrize("size", [1, 3, 5])
def test_routing_is_per_token(case: Case, size: int) -> None:
    """What a sequence gives does not depend on the sequences that it is run with."""
    trace = zoo.trace_of(case.separate)
    h = trace.embed(zoo.token_ids(11, 4))
    for block in trace.blocks():
        together = block.observe(h)
        apart = [block.observe(piece) for piece in h.split(size)]
        parts = [block.run_mlp_part(piece) for piece in together.mid.split(size)]
        torch.testing.assert_close(
            torch.cat([observed.output for observed in apart]), together.output, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(torch.cat(parts), together.output, rtol=1e-6, atol=1e-6)
        h = together.output


def test_tokens_go_to_different_experts(case: Case) -> None:
    """The models of these tests do route: every expert is somewhere among the chosen, and none is for all tokens."""
    trace = zoo.trace_of(case.separate)
    h = trace.embed(zoo.token_ids(40, 4))
    for block in trace.blocks():
        if block.index in SPARSE[case.kind]:
            gate = case.model.model.layers[block.index].mlp.gate
            normed = case.model.model.layers[block.index].post_attention_layernorm(block.observe(h).mid)
            share = torch.bincount(gate(normed)[2].flatten(), minlength=4) / normed[..., 0].numel()
            assert ((share > 0) & (share < 1)).all(), share
        h = block.run(h)


def test_router_logits_that_are_recorded(case: Case, tmp_path: Path) -> None:
    """`output_router_logits` in config.json, with which models are trained, changes nothing."""
    model = copy.deepcopy(case.model)
    model.config.output_router_logits = True
    ids = zoo.token_ids(6, 5)
    streams = []
    for path in (zoo.save(model, tmp_path / "recorded"), case.separate):
        trace = zoo.trace_of(path)
        h = trace.embed(ids)
        for block in trace.blocks():
            h = block.run(h)
        streams.append(h)
    assert torch.equal(*streams)


# ---------------------------------------------------------------- margins


class _Nothing(nn.Module):
    """Adds nothing to the stream."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


class _NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _Identity(nn.Module):
    def forward(self, h: Tensor, **_: Any) -> Tensor:
        return h


def doubled(model: Any) -> Any:
    """The model in float64, its experts one after another as the class itself has them."""
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    return double


@torch.no_grad()
def loss_of(model: Any, ids: Any) -> float:
    """The mean over tokens of transformers' own forward."""
    tokens = torch.from_numpy(ids)
    predicted = model(tokens).logits[:, :-1]
    return float(nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten()))


def test_margins_are_those_of_the_model_without_the_part(case: Case) -> None:
    """Each margin against `skip` is what transformers' forward loses without the block, its attention, or its MLP."""
    tokens = zoo.probe(fit=20, select=4, confirm=8)  # so few that the first heat takes all of them
    plan = Plan(frozenset({"margin"}), ("skip",), ())
    findings = peel(zoo.trace_of(case.separate, tokens), plan, itertools.count().__next__)
    trained = loss_of(doubled(case.model), tokens.confirm)
    assert len(findings.layers) == zoo.BLOCKS
    for layer in findings.layers:
        expected = []
        for change in (drop_block, drop_attention, drop_mlp):
            model = doubled(case.model)
            change(model.model.layers, layer.index)
            expected.append(loss_of(model, tokens.confirm) - trained)
        margins = (layer.margin, layer.parts["attention"].margin, layer.parts["mlp"].margin)
        assert [margin.value for margin in margins if margin] == pytest.approx(expected, abs=5e-6)


def drop_block(layers: Any, index: int) -> None:
    layers[index] = _Identity()


def drop_attention(layers: Any, index: int) -> None:
    layers[index].self_attn = _NoAttention()


def drop_mlp(layers: Any, index: int) -> None:
    layers[index].mlp = _Nothing()


def test_what_cannot_be_refitted(case: Case) -> None:
    """The attention's projection is told, the MLP has none: checks that need both are left out, with the reason."""
    trace = zoo.trace_of(case.separate)
    block = next(iter(trace.blocks(stop=1)))
    o_proj = case.model.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(block.attention_projection.weight.T, o_proj)
    assert not hasattr(block, "mlp_projection")
    assert not block.has_projections
    plan = Plan(frozenset({"margin", "headroom"}), ("skip", "previous"), ())
    findings: Findings = peel(trace, plan, itertools.count().__next__)
    assert {"`previous` references", "headroom"} <= {skipped.what for skipped in findings.skipped}


def test_descent_reaches_the_experts(case: Case) -> None:
    """The solver that needs no projections moves every expert and the router."""
    trace = zoo.trace_of(case.separate)
    index = SPARSE[case.kind][0]
    block = next(iter(trace.blocks(index, index + 1)))
    h = trace.embed(zoo.token_ids(20, 4))
    seen: list[Mapping[str, Tensor]] = []
    run_with = block.run_with
    block.run_with = lambda inputs, free: seen.append(free) or run_with(inputs, free)  # type: ignore[method-assign,func-returns-value]
    descend(block, block.initial_parameters(), Streams(h, h, 5), Streams(h, h, 5), Chunk(20))
    start, fitted = block.initial_parameters(), seen[-1]
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert ((fitted[name] - start[name]).abs().amax(dim=(1, 2)) > 1e-4).all(), name
    assert (fitted["mlp.gate.weight"] != start["mlp.gate.weight"]).any()


# ---------------------------------------------------------------- formats


def test_numbers_do_not_depend_on_the_names(case: Case, tmp_path: Path) -> None:
    """scan() of the safetensors folder and of pytorch_model.bin with the model's own names agree bit for bit."""
    np.save(tmp_path / "probe.npy", zoo.token_ids(100, 3))
    assert numbers(case.fused, tmp_path / "probe.npy") == numbers(case.separate, tmp_path / "probe.npy")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_have_the_models_own_names(case: Case, tmp_path: Path) -> None:
    """A torch.distributed.checkpoint folder gives the tensors of the model."""
    dcp.save({"model": case.model.state_dict()}, checkpoint_id=tmp_path / "step-7")
    case.model.config.save_pretrained(tmp_path / "step-7")
    weights = opened(tmp_path / "step-7").weights
    for name, weight in case.model.state_dict().items():
        assert torch.equal(weights.read(name), weight), name


# ---------------------------------------------------------------- other names for the same weights


def test_a_renamed_weight_under_the_models_own_name(tmp_path: Path) -> None:
    """GPT-NeoX saves its head as `embed_out`; a state dict has it as `lm_head`, and both give the same tensor."""
    model = zoo.build("gpt_neox", steps=0)
    saved, renamed = zoo.save(model, tmp_path / "saved"), own_names(model, tmp_path / "own")
    assert "embed_out.weight" in load_file(saved / "model.safetensors")
    for path in (saved, renamed):
        assert torch.equal(opened(path).weights.read("lm_head.weight"), model.lm_head.weight)


def titan_weights(config: Any) -> dict[str, Tensor]:
    """Random weights under torchtitan's names, of the sizes of this configuration."""
    rng, d, ff = torch.Generator().manual_seed(5), config.hidden_size, config.intermediate_size
    keys = d * config.num_key_value_heads // config.num_attention_heads
    sizes = {"tok_embeddings": (zoo.VOCABULARY, d), "norm": (d,), "output": (zoo.VOCABULARY, d)}
    for index in range(config.num_hidden_layers):
        sizes |= {f"layers.{index}.{norm}": (d,) for norm in ("attention_norm", "ffn_norm")}
        shapes = {"wq": (d, d), "wk": (keys, d), "wv": (keys, d), "wo": (d, d)}
        sizes |= {f"layers.{index}.attention.{name}": shape for name, shape in shapes.items()}
        shapes = {"w1": (ff, d), "w2": (d, ff), "w3": (ff, d)}
        sizes |= {f"layers.{index}.feed_forward.{name}": shape for name, shape in shapes.items()}
    return {f"{name}.weight": torch.randn(shape, generator=rng) * 0.3 for name, shape in sizes.items()}


def titan_logits(weights: Mapping[str, Tensor], config: Any, ids: Tensor) -> Tensor:
    """Llama in float64 with rotary positions as complex numbers made of adjacent rows, as torchtitan has them."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
    size = config.hidden_size // config.num_attention_heads
    frequencies = 10000.0 ** -(torch.arange(0, size, 2).double() / size)
    angles = torch.arange(ids.shape[1]).double()[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(h: Tensor, name: str) -> Tensor:
        return h * (h.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * w[name]

    def heads(x: Tensor, *, turned: bool) -> Tensor:
        x = x.unflatten(-1, (-1, size))
        if turned:
            x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)
        return x.repeat_interleave(config.num_attention_heads // x.shape[2], dim=2).transpose(1, 2)

    h = w["tok_embeddings"][ids]
    hidden = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for index in range(config.num_hidden_layers):
        attention, feed_forward = f"layers.{index}.attention", f"layers.{index}.feed_forward"
        x = norm(h, f"{attention}_norm")
        q, k = (heads(x @ w[f"{attention}.{name}"].T, turned=True) for name in ("wq", "wk"))
        v = heads(x @ w[f"{attention}.wv"].T, turned=False)
        scores = (q @ k.transpose(2, 3) / size**0.5).masked_fill(hidden, -torch.inf)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{attention}.wo"].T
        x = norm(h, f"layers.{index}.ffn_norm")
        gated = nn.functional.silu(x @ w[f"{feed_forward}.w1"].T) * (x @ w[f"{feed_forward}.w3"].T)
        h = h + gated @ w[f"{feed_forward}.w2"].T
    return norm(h, "norm") @ w["output"].T


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchtitans_names(tmp_path: Path) -> None:
    """A DCP folder with torchtitan's names and its order of rows gives what that order of rows computes."""
    config = zoo.CONFIGS["llama"]
    weights = titan_weights(config)
    optimiser = {f"optimizer.state.{name}.exp_avg": torch.zeros(1) for name in weights}
    dcp.save({**weights, **optimiser}, checkpoint_id=tmp_path / "step-7")
    config.save_pretrained(tmp_path)
    ref = locate(tmp_path / "step-7")
    (form,) = registry.formats(ref.format)
    trace = open_trace(open_snapshot(ref, form, registry.family), zoo.probe())
    ids = zoo.token_ids(5, 2)
    h = trace.embed(ids)
    for block in trace.blocks():
        h = block.run(h)
    scores = logits(trace.normalise(h), trace.head).double()
    torch.testing.assert_close(scores, titan_logits(weights, config, torch.from_numpy(ids)), rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------- refusals


def tampered(case: Case, folder: Path, change: Any) -> Path:
    """The folder of separate experts with other tensors in it."""
    tensors = load_file(case.separate / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((case.separate / "config.json").read_text())
    return folder


def an_expert(case: Case, number: int = 2) -> str:
    """The up matrix of an expert of the last block, under its name on disk."""
    if case.kind == "mixtral":
        return f"model.layers.3.block_sparse_moe.experts.{number}.w3.weight"
    return f"model.layers.3.mlp.experts.{number}.up_proj.weight"


def test_missing_expert(case: Case, tmp_path: Path) -> None:
    """A matrix of an expert that is not there is named, and nothing else is."""
    path = tampered(case, tmp_path, lambda tensors: tensors.pop(an_expert(case)))
    with pytest.raises(WeightsMismatch, match=f"config.json: missing {an_expert(case)}\n"):
        opened(path)


def test_missing_experts_of_a_whole_block(case: Case, tmp_path: Path) -> None:
    """Where no expert is there, the weight of the model is named."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.") and ".experts." in name]:
            del tensors[name]

    whole = "model.layers.3.mlp.experts"
    with pytest.raises(WeightsMismatch, match=f"missing {whole}.gate_up_proj, {whole}.down_proj\n"):
        opened(tampered(case, tmp_path, change))


def test_misshapen_expert(case: Case, tmp_path: Path) -> None:
    """An expert of another width is named with both shapes."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[an_expert(case)] = torch.zeros(7, zoo.WIDTH)

    rows = 24 if case.kind in ("mixtral", "olmoe") else 12
    words = rf"misshapen {an_expert(case)} \[7, 16\] instead of \[{rows}, 16\]\n"
    with pytest.raises(WeightsMismatch, match=words):
        opened(tampered(case, tmp_path, change))


def test_one_expert_too_many(case: Case, tmp_path: Path) -> None:
    """An expert that config.json has no place for is unexpected."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[an_expert(case, 4)] = tensors[an_expert(case)].clone()

    with pytest.raises(WeightsMismatch, match=f"unexpected {an_expert(case, 4)}\n"):
        opened(tampered(case, tmp_path, change))


def test_a_number_written_in_another_way(case: Case, tmp_path: Path) -> None:
    """`experts.02` is not expert 2: two names never stand for one matrix."""
    other = an_expert(case).replace("experts.2", "experts.02")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[other] = tensors.pop(an_expert(case))

    with pytest.raises(WeightsMismatch, match=f"missing {an_expert(case)}; unexpected {other}\n"):
        opened(tampered(case, tmp_path, change))


def test_fused_and_separate(case: Case, tmp_path: Path) -> None:
    """Experts that are stored under both names are refused: nothing says which are the model's."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.3.mlp.experts.down_proj"
        tensors[name] = case.model.state_dict()[name].clone()

    words = r"stored under two names model\.layers\.3\.mlp\.experts\.down_proj and model\.layers\.3\..*experts\.0\."
    with pytest.raises(WeightsMismatch, match=words):
        opened(tampered(case, tmp_path, change))


def test_experts_of_two_precisions(case: Case, tmp_path: Path) -> None:
    """An expert in another dtype than the others is named when its block is read."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[an_expert(case)] = tensors[an_expert(case)].bfloat16()

    weights = opened(tampered(case, tmp_path, change)).weights
    with pytest.raises(WeightsMismatch, match=rf"{an_expert(case)} is torch\.bfloat16"):
        weights.read("model.layers.3.mlp.experts.gate_up_proj")


def edited(case: Case, folder: Path, **changes: Any) -> Path:
    path = tampered(case, folder, lambda _: None)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def count_key(case: Case) -> str:
    return "num_experts" if case.kind in ("qwen2_moe", "olmoe") else "num_local_experts"


@pytest.mark.parametrize("count", [5, 10**9])
def test_more_experts_claimed_than_stored(case: Case, tmp_path: Path, count: int) -> None:
    """However many experts config.json claims, the first one that is not there is named, at once."""
    path = edited(case, tmp_path, **{count_key(case): count})
    with pytest.raises(WeightsMismatch, match=r"missing .*model\.layers\.\d\.\S+\.experts\.4\.") as caught:
        opened(path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(("chosen", "count"), [(5, 4), (0, 4), (2, -1)])
def test_routing_that_cannot_be(case: Case, tmp_path: Path, chosen: int, count: int) -> None:
    """More experts a token than there are, or none, is refused before a model is built."""
    path = edited(case, tmp_path, num_experts_per_tok=chosen, **{count_key(case): count})
    with pytest.raises(CheckpointError, match=f"each token to {chosen} of {count} experts"):
        opened(path)


@pytest.mark.parametrize("key", ["experts_implementation", "_experts_implementation"])
def test_code_from_elsewhere_is_not_chosen_by_a_checkpoint(case: Case, tmp_path: Path, key: str) -> None:
    """transformers would load kernels from its hub for such a config.json; it is refused by name."""
    with pytest.raises(CheckpointError, match=f"config.json has `{key}`"):
        opened(edited(case, tmp_path, **{key: "deepgemm"}))
