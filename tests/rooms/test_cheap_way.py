"""Margins cost a few forward passes by default. What they say is what measuring everything says, or `undecided`."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.peel import peel
from peel_agent.peel.margins.margin import DROPPED, Margin, may_be_better, over
from peel_agent.peel.numerics.intervals import doubt_of_excess
from peel_agent.peel.numerics.losses import Excess
from peel_agent.records import Estimate, Findings, PeelSettings, Plan, Probe, Status
from tests import zoo

heats_module = importlib.import_module("peel_agent.peel.margins.heats")
PLAN = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")
FULL: Mapping[str, float] = {"HEAT_FRACTION": 1, "WHOLE_PASSES": 1000.0}
WAYS: Mapping[str, Mapping[str, float]] = {
    "fewer sequences": {},
    "cuts": {"WHOLE_PASSES": 0.0, "CUT_PASSES": 0.5, "LEAST_CUT": 8},
    "tiny cuts": {"WHOLE_PASSES": 0.0, "CUT_PASSES": 0.15, "LEAST_CUT": 4},
}
"""What makes a probe of a few thousand tokens be measured as one of a deep model is."""

BY_CHANCE = [(6, "fewer sequences"), (13, "fewer sequences"), (17, "fewer sequences"), (18, "fewer sequences")]
BY_CHANCE += [(24, "fewer sequences"), (27, "cuts"), (37, "cuts"), (53, "fewer sequences")]
"""Seeds whose few sequences look, by their 95 % intervals alone, like what all of them deny."""

SELECT, CONFIRM, FIT, LENGTH = 20, 64, 80, 24


def case(seed: int, folder: Path) -> BlockwiseTrace:
    """A random model of four blocks, and a probe that it does not know, or that it made, with a fault or without."""
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    kind, how = ("llama", "gpt2")[seed % 2], ("untrained", "sampled", "planted")[seed // 2 % 3]
    torch.manual_seed(seed)
    config = copy.deepcopy(zoo.CONFIGS[kind])
    config.initializer_range = (0.15, 0.3)[seed // 6 % 2]
    model = AutoModelForCausalLM.from_config(config).eval()
    if how == "planted":
        layer = (model.model.layers if kind == "llama" else model.transformer.h)[int(rng.integers(zoo.BLOCKS))]
        outputs = ("self_attn.o_proj", "mlp.down_proj") if kind == "llama" else ("attn.c_proj", "mlp.c_proj")
        for name in outputs[: 1 + int(rng.random() < 0.5)]:
            layer.get_submodule(name).weight.data *= 0.02
    count = SELECT + CONFIRM + FIT
    if how == "untrained":
        ids = rng.integers(0, zoo.VOCABULARY, size=(count, LENGTH))
    else:
        ids = made_by(model, count, torch_rng)
    probe = Probe(ids[SELECT + CONFIRM :], ids[:SELECT], ids[SELECT : SELECT + CONFIRM], "cheap")
    return zoo.trace_of(zoo.save(model, folder), probe)


def made_by(model: Any, count: int, generator: torch.Generator) -> Any:
    """int64 [count, LENGTH] drawn from the model."""
    ids = torch.randint(zoo.VOCABULARY, (count, 1), generator=generator)
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            chances = torch.softmax(model(ids).logits[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ids.numpy()


def peeled(trace: BlockwiseTrace, passes: float | None, values: Mapping[str, float]) -> dict[str, Status]:
    """The status of every block and part, by name."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in values.items():
            patched.setattr(heats_module, name, value)
        findings = peel(trace, dataclasses.replace(PLAN, passes=passes), itertools.count().__next__)
    return dict(_statuses(findings))


def _statuses(findings: Findings) -> Iterator[tuple[str, Status]]:
    for layer in findings.layers:
        yield layer.name, layer.status
        yield from ((f"{layer.name}/{name}", part.status) for name, part in layer.parts.items())


def denied(trace: BlockwiseTrace, ways: Iterable[str]) -> list[tuple[str, str, Status, Status]]:
    """What the default says in each way, and everything measured denies."""
    full = peeled(trace, None, FULL)
    cheap = {way: peeled(trace, PeelSettings().budget_passes, WAYS[way]) for way in ways}
    return [
        (way, name, status, full[name])
        for way, ours in cheap.items()
        for name, status in ours.items()
        if status not in (full[name], "undecided")
    ]


@pytest.mark.parametrize(("seed", "way"), BY_CHANCE)
def test_a_status_of_few_sequences_is_that_of_all_or_undecided(seed: int, way: str, tmp_path: Path) -> None:
    """Models that say nothing for certain, of which a few sequences say something by chance."""
    assert denied(case(seed, tmp_path), [way]) == []


@pytest.mark.long
@pytest.mark.parametrize("seed", range(60))
def test_a_status_of_any_cheap_way_is_that_of_the_full_way(seed: int, tmp_path: Path) -> None:
    """Untrained, sampled and planted models; fewer sequences, cuts, and cuts of a few tokens."""
    assert denied(case(seed, tmp_path), WAYS) == []


# ---------------------------------------------------------------- many looks


def of_losses(losses: Any, *, whole: bool) -> Margin:
    value, error = float(losses.mean()), float(losses.std()) / len(losses) ** 0.5
    interval = Estimate(value, value - 2 * error, value + 2 * error)
    best: Mapping[str, float] = {"skip": value}
    return Margin(interval, "skip", best, interval.low, interval.high, complete=True, whole=whole, contending=(losses,))


NOISE = np.random.default_rng(0).normal(size=(12, 8))
NOISE = (NOISE - NOISE.mean(axis=1, keepdims=True)) / NOISE.std(axis=1, ddof=1, keepdims=True)
"""Twelve blocks on eight sequences, mean 0 and deviation 1 each."""


@pytest.mark.parametrize(
    ("means", "cleared"),
    [
        pytest.param([0.0] * 11 + [1.1], 0, id="one of many stands out by chance"),
        pytest.param([0.0] * 11 + [4.0], 1, id="one of many stands out"),
        pytest.param([1.1] * 12, 12, id="all stand out as much as one by chance"),
    ],
)
def test_one_of_many_must_stand_out_more(means: list[float], cleared: int) -> None:
    """On few sequences a block is cleared beside the others: alone among many it needs more than its interval."""
    margins = [of_losses(mean + noise, whole=False) for mean, noise in zip(means, NOISE, strict=True)]
    assert sum(over(margins)) == cleared
    assert all(over([dataclasses.replace(margin, whole=True) for margin in margins[-1:]]))


def test_a_reference_is_dropped_only_where_it_is_certainly_worse() -> None:
    """A rival that is worse by its interval may still be the best; one that is worse by far may not."""
    best = Excess(NOISE[0])
    near, far = (Excess(NOISE[0] + worse + 0.5 * NOISE[1]) for worse in (0.6, 3.0))
    assert doubt_of_excess(near.losses - best.losses) < 0.025
    assert not may_be_better(near, best)
    assert may_be_better(near, best, DROPPED)
    assert not may_be_better(far, best, DROPPED)
