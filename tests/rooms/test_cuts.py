"""Margins on the first tokens of sequences: exact under causal attention, never a status that whole sequences deny, and
counted so that a budget holds on every machine.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.peel import peel
from peel_agent.peel.margins.heats import CUT_PASSES, CUT_SEQUENCES, HEAT_CONFIRM_SEQUENCES, LEAST_CUT, first_heat
from peel_agent.peel.margins.margin import Margin, statuses
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.sweep.heats import cut_is_exact
from peel_agent.records import Estimate, Findings, LayerReport, Plan, Probe
from tests import zoo
from tests.rooms.test_quick import model_of, text

heats_module = importlib.import_module("peel_agent.peel.margins.heats")
PLAN = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")
CUT = 5


@pytest.mark.parametrize("kind", zoo.CONFIGS)
def test_a_cut_is_the_beginning_of_the_whole(kind: str, tmp_path: Path) -> None:
    """In every family each block makes of the first tokens what it makes of them in the whole sequence."""
    trace = zoo.trace_of(zoo.save(zoo.build(kind, steps=2), tmp_path))
    whole, cut = trace.embed(trace.probe.confirm), trace.embed(trace.probe.confirm[:, :CUT])
    for block in trace.blocks():
        whole, cut = block.run(whole), block.run(cut)
        np.testing.assert_allclose(cut, whole[:, :CUT], rtol=1e-4, atol=1e-5)
    assert cut_is_exact(trace, CUT)


def test_what_sees_later_tokens_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a token's stream hangs on the tokens behind it, whole sequences are scored, whatever they cost."""
    trace = zoo.trace_of(zoo.save(zoo.build("llama", steps=0), tmp_path))
    meter = Meter(trace, next(iter(trace.blocks(stop=1))))
    for name, value in {"WHOLE_PASSES": 0.0, "LEAST_CUT": 4}.items():
        monkeypatch.setattr(heats_module, name, value)
    monkeypatch.setattr(heats_module, "CUT_PASSES", 0.3)
    assert first_heat(trace, meter, 7).length < 12
    block = type(next(iter(trace.blocks(stop=1))))
    run = block.run
    monkeypatch.setattr(block, "run", lambda self, h, **keywords: run(self, h, **keywords) + 0.01 * h.mean(1, True))
    assert not cut_is_exact(trace, CUT)
    assert first_heat(trace, meter, 7).length == 12


# ---------------------------------------------------------------- beside whole sequences


IDLE = {
    ("llama", "attention"): ["model.layers.1.self_attn.o_proj.weight"],
    ("llama", "block"): ["model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"],
    ("gpt2", "attention"): ["transformer.h.1.attn.c_proj.weight", "transformer.h.1.attn.c_proj.bias"],
    ("gpt2", "block"): [
        f"transformer.h.1.{part}.c_proj.{own}" for part in ("attn", "mlp") for own in ("weight", "bias")
    ],
}


CASES = [(kind, fault) for kind in ("llama", "gpt2") for fault in ("healthy", "attention", "block")]


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_a_status_is_that_of_whole_sequences_or_undecided(
    kind: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is cut, no block or part is above that everything measured in full calls otherwise, nor below; what is
    published of whole sequences is their number.
    """
    model = model_of(kind, 64, 60, idle=IDLE.get((kind, fault), ()))
    ids = text(160, 1000)
    trace = zoo.trace_of(zoo.save(model, tmp_path), Probe(ids[60:], ids[:20], ids[20:60], "cuts"))
    monkeypatch.setattr(heats_module, "WHOLE_PASSES", 1000.0)
    with monkeypatch.context() as patched:
        patched.setattr(heats_module, "HEAT_FRACTION", 1)
        full = peeled(trace)
    seen: list[tuple[bool, str]] = []
    monkeypatch.setattr(heats_module, "WHOLE_PASSES", 0.0)
    for passes in (0.3, 1.0):
        monkeypatch.setattr(heats_module, "CUT_PASSES", passes)
        for theirs, ours in zip(full.layers, peeled(trace).layers, strict=True):
            for whole, own in [(theirs, ours), *((theirs.parts[part], ours.parts[part]) for part in theirs.parts)]:
                assert own.status in (whole.status, "undecided")
                seen.append((own.cut is not None, own.status))
                assert own.first is not None
                if own.cut is not None:
                    assert own.status != "below"
                elif isinstance(own, LayerReport) and own.best_reference == whole.best_reference:
                    assert own.margin.value == pytest.approx(whole.margin.value, abs=1e-5)
    if fault != "block":  # one of three: what is left of the others says little of their median
        assert (True, "above") in seen  # some were cleared on cuts
    if fault != "healthy":
        assert (False, "below") in seen


def peeled(trace: BlockwiseTrace) -> Findings:
    return peel(trace, PLAN, itertools.count().__next__)


def of(low: float, high: float, cut: int | None = None, *, whole: bool = True) -> Margin:
    middle = (low + high) / 2
    seen = 1.0 if cut is None else 0.0  # so little of each sequence that what it says of the rest is all
    best: Mapping[str, float] = {"skip": middle}
    return Margin(Estimate(middle, low, high), "skip", best, low, high, complete=True, whole=whole, cut=cut, seen=seen)


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        pytest.param([of(0.09, 0.11)] * 3 + [of(0.011, 0.012)], "above", id="whole sequences: over a tenth of 0.10"),
        pytest.param([of(0.09, 0.11, 64)] * 3 + [of(0.011, 0.012)], "undecided", id="a tenth of what others may be"),
        pytest.param([of(0.09, 0.11, 64)] * 3 + [of(0.023, 0.03)], "above", id="a tenth of twice 0.11 is 0.022"),
        pytest.param([of(0.09, 0.11, 64)] * 3 + [of(0.006, 0.008)], "undecided", id="over a tenth of half of 0.09"),
        pytest.param([of(0.09, 0.11, 64)] * 3 + [of(0.001, 0.004)], "below", id="under a tenth of half of 0.09"),
        pytest.param([of(0.09, 0.11)] * 3 + [of(0.0, 0.001, 64, whole=False)], "undecided", id="a cut accuses nobody"),
        pytest.param([of(0.0, 0.2, whole=False)] * 3 + [of(0.015, 0.018)], "undecided", id="under what few may mean"),
        pytest.param([of(-0.02, 0.11, whole=False)] * 3 + [of(0.001, 0.004)], "undecided", id="under an open median"),
    ],
)
def test_what_others_may_be_is_allowed_for(margins: list[Margin], expected: str) -> None:
    """A threshold is exact where all are measured in full; with cuts or open margins it is as doubtful as they are."""
    assert statuses(margins)[-1] == expected


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_work_is_what_torch_counts(kind: str, tmp_path: Path) -> None:
    """One forward pass by the meter is the multiplications that torch counts, but for half of those of attention."""
    trace = zoo.trace_of(zoo.save(zoo.build(kind, steps=0), tmp_path))
    (block,) = trace.blocks(stop=1)
    meter = Meter(trace, block)
    h = trace.embed(trace.probe.fit)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        block.run(h)
    tokens, length = trace.probe.fit.size, trace.probe.sequence_length
    ours = meter.blocks(tokens, length) / meter.products(1, 1, 1)
    attention = tokens * length * trace.width
    assert ours <= counter.get_total_flops() / 2 <= ours + attention
    assert meter.head(tokens) == pytest.approx(meter.products(tokens, trace.width, zoo.VOCABULARY))
    probe = trace.probe
    everything = probe.fit.size + probe.select.size + probe.confirm.size
    assert meter.blocks(everything, length, zoo.BLOCKS) + meter.head(everything) == pytest.approx(1.0)


@pytest.mark.parametrize("depth", [12, 32, 80])
def test_the_first_heat_costs_no_more_than_it_may(depth: int, tmp_path: Path) -> None:
    """At any depth the first heat of sequences of 1,024 takes cuts of eight or more, for one forward pass."""
    trace = zoo.trace_of(zoo.save(zoo.build("llama", steps=0), tmp_path))
    ids = np.random.default_rng(0).integers(0, zoo.VOCABULARY, size=(88, 1024))
    long = dataclasses.replace(trace.probe, fit=ids[:64], select=ids[64:72], confirm=ids[72:])
    (block,) = trace.blocks(stop=1)
    trace.probe = long
    trace.block_names += tuple(f"deeper.{index}" for index in range(depth - zoo.BLOCKS))
    meter = Meter(trace, block)
    heat = first_heat(trace, meter, 7)
    assert HEAT_CONFIRM_SEQUENCES <= len(heat.rows) <= CUT_SEQUENCES
    assert LEAST_CUT / 2 <= heat.length < 1024
    assert (heat.rows >= 8).all()
    assert 7 * sum(meter.tail(block, heat.tokens, heat.length) for block in range(depth)) <= CUT_PASSES
