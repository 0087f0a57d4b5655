"""Headroom, shares and redundancy beside their float64 oracles, and the backward sweep beside autograd."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peel_agent import registry
from peel_agent.capture import open_trace
from peel_agent.load import open_snapshot
from peel_agent.peel import peel
from peel_agent.peel.headroom.gradients import backwards, descents
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.sweep.forward import sweep
from peel_agent.peel.sweep.heats import nowhere
from peel_agent.pipeline import locate
from peel_agent.precision import quantise
from peel_agent.records import Findings, Plan, Probe, WeightSet
from tests import zoo
from tests.oracles import headroom as oracle
from tests.oracles import redundancy as redundancy_oracle
from tests.oracles.decoder import Decoder
from tests.oracles.intervals import paired

PLAN = Plan(frozenset({"headroom", "redundancy"}), (), "ends")
HEADROOM = Plan(frozenset({"headroom"}), (), ())
SILENCED = 1
CLEAR = 2e-3
"""Winners nearer than this on select may swap between float32 and float64."""
GLOBS = {"llama": "model.layers.*_proj.weight", "gpt2": "transformer.h.*.weight"}


class Case:
    """A tiny model whose blocks are low-bit (or not), as the product sees it and as the oracle does."""

    def __init__(self, kind: str, name: str, folder: Path) -> None:
        model = zoo.build(kind, steps=40)
        path, ref = zoo.save(model, folder), None
        self.sets = {} if name == "none" else {GLOBS[kind]: WeightSet.named(name)}
        ref = locate(path)
        (form,) = registry.formats(ref.format)
        self.trace = open_trace(open_snapshot(ref, form, registry.family, sets=self.sets), zoo.probe())
        self.decoder = Decoder(effective(model, kind, name), model.config.to_dict())
        self.findings = found_in(self.trace)
        self.parts = {} if name == "none" else {"attention": name, "mlp": name}


def found_in(trace: Any, plan: Plan = PLAN) -> Findings:
    """What the peel room finds when ridge and length of a step are picked on all of select, as the oracle does."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.import_module("peel_agent.peel.headroom.headroom"), "SELECT_FRACTION", 1)
        return peel(trace, plan, itertools.count().__next__)


def effective(model: Any, kind: str, name: str) -> dict[str, Any]:
    """The weights of a forward pass in float64: those of the blocks quantised."""
    inside = "model.layers." if kind == "llama" else "transformer.h."
    found = {}
    for key, weight in model.state_dict().items():
        own = weight.double()
        if key.startswith(inside) and own.dim() == 2 and name != "none":
            upright = own if kind == "llama" else own.T
            upright = quantise(upright.float(), WeightSet.named(name)).double()
            own = upright if kind == "llama" else upright.T
        found[key] = own.numpy()
    return found


@pytest.fixture(
    scope="module",
    params=[("llama", "none"), ("gpt2", "none"), ("llama", "ternary"), ("gpt2", "sign"), ("llama", "int3-channel")],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(*request.param, tmp_path_factory.mktemp("headroom"))


def test_headroom_of_blocks_and_parts(case: Case) -> None:
    """Values and intervals are the oracle's wherever its winner is clear; some block of each case is."""
    probe, compared = case.trace.probe, 0
    for layer in case.findings.layers:
        theirs = oracle.headroom(case.decoder, layer.index, probe.fit, probe.select, probe.confirm, case.parts or None)
        ours = {
            "block": layer.headroom,
            "attention": layer.parts["attention"].headroom,
            "mlp": layer.parts["mlp"].headroom,
        }
        for target, own in ours.items():
            assert own is not None
            if theirs[target]["margin_on_select"] > CLEAR:
                compared += 1
                np.testing.assert_allclose([own.value, own.low, own.high], theirs[target]["estimate"], atol=2e-3)
    assert compared >= 3


def test_typical_additions(case: Case) -> None:
    """What the parts of each block add to the stream, by whose median a step is as long as it is, is the oracle's."""
    probe = case.trace.probe
    stopwatch = Stopwatch(itertools.count().__next__)
    swept = sweep(case.trace, Plan(frozenset(), (), ()), nowhere(case.trace), frozenset(), stopwatch)
    score = np.concatenate([probe.select, probe.confirm])
    for part, expected in oracle.typical_additions(case.decoder, score).items():
        sizes = [visited.added[part] for visited in swept.visited]
        assert np.median(sizes) == pytest.approx(expected, rel=1e-5)
        assert max(sizes) > 1.1 * min(sizes)  # blocks differ, so that the median is none of them by chance


@pytest.fixture(scope="module")
def trained() -> Any:
    """Briefly trained models by kind, to be copied before they are changed."""
    return functools.cache(zoo.build)


def silenced(model: Any, name: str) -> Any:
    """A copy in which one weight of block SILENCED is all zero."""
    model = copy.deepcopy(model)
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[SILENCED]
    dict(block.named_parameters())[name].data.zero_()
    return model


@pytest.mark.parametrize(
    ("kind", "part", "name"),
    [
        ("llama", "attention", "self_attn.o_proj.weight"),
        ("llama", "mlp", "mlp.down_proj.weight"),
        ("gpt2", "attention", "attn.c_proj.weight"),
        ("gpt2", "mlp", "mlp.c_proj.weight"),
    ],
)
def test_a_silent_part_has_headroom(trained: Any, kind: str, part: Any, name: str, tmp_path: Path) -> None:
    """A part whose output matrix is all zero is not thought perfect: its headroom, the oracle's, is proven."""
    model, probe = silenced(trained(kind), name), zoo.probe(fit=200, select=40, confirm=100)
    trace = zoo.trace_of(zoo.save(model, tmp_path), probe)
    layer = found_in(trace, HEADROOM).layers[SILENCED]
    own = layer.parts[part]
    assert own.dead == f"its output is zero: `{name}` is all zero"
    assert own.headroom is not None
    assert own.headroom.low > 0.0
    assert layer.headroom is not None
    assert layer.headroom.low > 0.0
    ours = [own.headroom.value, own.headroom.low, own.headroom.high]
    assert any(np.allclose(ours, theirs, rtol=0, atol=2e-4) for theirs in best_of(zoo.decoder_of(model), part, probe))


def best_of(decoder: Decoder, part: Any, probe: Probe) -> list[Any]:
    """The oracle's headroom of every candidate for the part of block SILENCED that is as good as the best on select."""
    tried = oracle.candidates(
        oracle.steps(decoder, SILENCED, probe.fit, np.concatenate([probe.select, probe.confirm])), part
    )
    select, confirm = (decoder.streams(ids)[SILENCED] for ids in (probe.select, probe.confirm))
    on_select = [oracle.losses(decoder, SILENCED, select, probe.select, own).mean() for own in tried]
    best = [own for own, loss in zip(tried, on_select, strict=True) if loss < min(on_select) + CLEAR]
    trained = oracle.losses(decoder, SILENCED, confirm, probe.confirm, {})
    return [paired(trained - oracle.losses(decoder, SILENCED, confirm, probe.confirm, own)) for own in best]


@pytest.mark.parametrize(
    ("kind", "part", "name"),
    [
        ("llama", "mlp", "mlp.up_proj.weight"),
        ("llama", "mlp", "mlp.gate_proj.weight"),
        ("llama", "mlp", "post_attention_layernorm.weight"),
        ("llama", "attention", "self_attn.v_proj.weight"),
        ("llama", "attention", "input_layernorm.weight"),
        ("gpt2", "mlp", "mlp.c_fc.weight"),
        ("gpt2", "mlp", "ln_2.weight"),
        ("gpt2", "attention", "ln_1.weight"),  # its bias goes on: values that are equal but for rounding
    ],
)
def test_a_part_without_features_is_dead(trained: Any, kind: str, part: Any, name: str, tmp_path: Path) -> None:
    """Where a part computes the same for every token no output matrix helps: no headroom, and the zero weight by name;
    the other part and the other blocks have theirs.
    """
    trace = zoo.trace_of(zoo.save(silenced(trained(kind), name), tmp_path))
    layers = found_in(trace, HEADROOM).layers
    own = layers[SILENCED].parts[part]
    assert own.headroom is None
    assert own.dead == f"what it computes is the same for every token: `{name}` is all zero"
    for layer in layers:
        assert layer.headroom is not None
        for other, report in layer.parts.items():
            if (layer.index, other) != (SILENCED, part):
                assert report.headroom is not None
                assert report.dead is None


@pytest.mark.parametrize(
    ("part", "name"),
    [("attention", "self_attn.o_proj.weight"), ("mlp", "mlp.experts.down_proj"), ("mlp", "mlp.experts.gate_up_proj")],
)
def test_a_dead_part_of_a_mixture(trained: Any, part: Any, name: str, tmp_path: Path) -> None:
    """Where blocks have no output projections to look behind, a part is dead when what it adds is always the same."""
    trace = zoo.trace_of(zoo.save(silenced(trained("mixtral"), name), tmp_path))
    findings = found_in(trace, Plan(frozenset({"margin", "headroom"}), ("skip",), ()))
    dead = {(layer.index, own): report.dead for layer in findings.layers for own, report in layer.parts.items()}
    said = dead.pop((SILENCED, part))
    assert said == f"what it computes is the same for every token: `{name}` is all zero"
    assert set(dead.values()) == {None}


def test_shares_add_up(case: Case) -> None:
    """A low-bit block's two shares are what free weights would win in all; a free block has none."""
    probe = case.trace.probe
    for layer in case.findings.layers:
        if not case.parts:
            assert layer.quantization_share is layer.optimization_share is None
            continue
        assert layer.optimization_share == layer.headroom.value  # type: ignore[union-attr]
        free = oracle.headroom(case.decoder, layer.index, probe.fit, probe.select, probe.confirm)["block"]
        inside = oracle.headroom(case.decoder, layer.index, probe.fit, probe.select, probe.confirm, case.parts)["block"]
        if min(free["margin_on_select"], inside["margin_on_select"]) > CLEAR:
            better = free if min(free["select_losses"]) < min(inside["select_losses"]) else inside
            total = layer.quantization_share + layer.optimization_share  # type: ignore[operator]
            assert total == pytest.approx(better["estimate"][0], abs=2e-3)


def test_redundancy(case: Case) -> None:
    """The matrix is the oracle's, zero on the diagonal and below; low-bit stand-ins differ from free ones."""
    probe, ours = case.trace.probe, np.array(case.findings.redundancy)
    theirs = redundancy_oracle.redundancy(case.decoder, probe.fit, probe.select, probe.confirm)
    assert (ours[np.tril_indices(zoo.BLOCKS)] == 0).all()
    if case.parts:
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() > 1e-3
    else:
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_low_bit_refits_stay_in_their_set(case: Case) -> None:
    """What stands in for blocks of a low-bit model is low-bit too."""
    from peel_agent.peel.numerics.streams import embedded
    from peel_agent.peel.references import refit
    from peel_agent.precision import recognise

    h = embedded(case.trace)
    first, second = case.trace.blocks(stop=2)
    middle = h.through(first.run, case.trace.chunk)
    (fitted,) = refit(first, h, [middle.through(second.run, case.trace.chunk)], case.trace.chunk)
    assert not torch.equal(fitted.mlp.weight, first.mlp_projection.weight)
    if case.parts:
        kind = first.mlp_set.kind
        assert recognise(fitted.mlp.weight.T).kind == kind or kind == "int"
        np.testing.assert_allclose(quantise_codes(fitted.mlp.weight.T, kind), 0.0, atol=1e-4)


def quantise_codes(matrix: Any, kind: str) -> Any:
    """How far entries are from multiples of their row's largest value over the number of levels."""
    levels = {"sign": 1, "ternary": 1, "int": 3}[kind]
    steps = matrix / matrix.abs().amax(dim=1, keepdim=True) * levels
    return steps - steps.round()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_backward_sweep_is_autograd(kind: str, tmp_path: Path) -> None:
    """Gradients at every block's output and input are those of transformers' own backward pass, last block first."""
    model = zoo.build(kind, steps=40)
    trace = zoo.trace_of(zoo.save(model, tmp_path))
    ids = torch.from_numpy(trace.probe.fit)
    outputs, typical = model(ids, output_hidden_states=True), {"attention": 0.5, "mlp": 0.25}
    hidden = outputs.hidden_states
    for own in hidden:
        own.retain_grad()
    logits = outputs.logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    seen = []
    for block, entering, gradient, hand_back in backwards(trace):
        seen.append(block.index)
        torch.testing.assert_close(entering.fit, hidden[block.index].detach(), atol=1e-5, rtol=1e-4)
        if block.index + 1 < zoo.BLOCKS:  # transformers' last hidden state is taken after the final norm
            torch.testing.assert_close(gradient, hidden[block.index + 1].grad, atol=1e-5, rtol=1e-3)
        attention, mlp, further = descents(block, entering.fit, gradient, trace.chunk, typical)
        assert (attention.typical, mlp.typical) == (0.5, 0.25)
        torch.testing.assert_close(further, hidden[block.index].grad, atol=1e-5, rtol=1e-3)
        hand_back(further)
    assert seen == list(reversed(range(zoo.BLOCKS)))
