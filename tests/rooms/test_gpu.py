"""On a GPU the numbers are those of the CPU, to the digits that matter."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from peel_agent import registry
from peel_agent.capture import open_trace
from peel_agent.load import open_snapshot
from peel_agent.peel import peel
from peel_agent.pipeline import locate
from peel_agent.records import Findings, Plan
from tests import zoo
from tests.oracles import bounds, intervals
from tests.rooms.test_peel_against_oracles import status_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PLAN = Plan(frozenset({"margin", "bounds"}), ("skip", "affine", "previous"), "paper")


def peeled(path: Path, device: str, plan: Plan = PLAN) -> Findings:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    trace = open_trace(open_snapshot(ref, form, registry.family), zoo.probe(80, 40, 160), device=device)
    return peel(trace, plan, itertools.count().__next__)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_margins_and_bounds_are_the_cpu_s(kind: str, tmp_path: Path) -> None:
    """Losses, margins, shares and closed-form bounds agree between the devices; statuses and zone follow from them."""
    path = zoo.save(zoo.build(kind), tmp_path)
    cpu, gpu = (peeled(path, device) for device in ("cpu", "cuda:0"))
    assert gpu.loss.value == pytest.approx(cpu.loss.value, abs=1e-5)
    for findings in (cpu, gpu):
        assert findings.gap is not None
        assert findings.zone == bounds.zone(intervals.Interval(findings.gap.value, findings.gap.low, findings.gap.high))
        of_blocks = [layer.margin for layer in findings.layers]
        for layer in findings.layers:
            assert layer.status == status_of(of_blocks, layer.index, left_out=False)
    for one, other in zip(cpu.layers, gpu.layers, strict=True):
        assert one.margin is not None
        assert other.margin is not None
        assert other.margin.value == pytest.approx(one.margin.value, abs=5e-4)
        assert other.stream_share == pytest.approx(one.stream_share, rel=1e-4)
    for mine, theirs in zip(cpu.bounds, gpu.bounds, strict=True):
        assert mine.label == theirs.label
        assert theirs.value.value == pytest.approx(mine.value.value, abs=2e-3)


def test_descent_is_the_cpu_s(tmp_path: Path) -> None:
    """The paper's solver too, as far as Adam on float32 gradients allows."""
    path = zoo.save(zoo.build("llama"), tmp_path)
    plan = dataclasses.replace(PLAN, quantities=frozenset({"bounds"}), solver="descent", maps=((1, 4), (4, 4)))
    cpu, gpu = (peeled(path, device, plan) for device in ("cpu", "cuda:0"))
    for mine, theirs in zip(cpu.bounds, gpu.bounds, strict=True):
        assert theirs.value.value == pytest.approx(mine.value.value, abs=1e-2)


def test_blocks_read_ahead_are_the_cpu_s(tmp_path: Path) -> None:
    """What was copied on a stream of its own is whole when it is computed with, however busy the GPU is."""
    path = zoo.save(zoo.build("llama").to(torch.bfloat16), tmp_path)
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    here, there = (open_trace(open_snapshot(ref, form, registry.family), zoo.probe(), device=device)
                   for device in ("cpu", "cuda:0"))  # fmt: skip
    busy = torch.ones(4096, 4096, device="cuda:0")
    for one, other in zip(here.blocks(), there.blocks(), strict=True):
        for _ in range(20):
            busy = busy @ busy * 0.0
        for name, weight in one.parameters.items():
            assert torch.equal(weight, other.parameters[name].cpu())
