"""A layer against its own past beside the oracles: change, progress and sketches; what cannot be compared is said."""

from __future__ import annotations

import base64
import copy
import importlib
import itertools
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import peel_agent
from peel_agent import registry
from peel_agent.capture import PastBlocks, open_trace
from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.errors import CheckpointError, NotEarlier, OtherArchitecture, TornCheckpoint
from peel_agent.load import open_snapshot
from peel_agent.peel import Comparison, peel
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.past.sketch import SIZE, _signs, sketch
from peel_agent.pipeline import locate, measure
from peel_agent.precision import quantise
from peel_agent.records import (
    Before,
    Estimate,
    Findings,
    LayerReport,
    ModelSettings,
    Peeled,
    PeelReport,
    PeelSettings,
    Plan,
    Probe,
    ProbeSettings,
    Sketches,
    Snapshot,
    WeightSet,
    plain,
    restored,
)
from tests import zoo
from tests.oracles import past as oracle
from tests.oracles import sketch as sketch_oracle
from tests.oracles.intervals import Interval

heats_module = importlib.import_module("peel_agent.peel.margins.heats")
race_module = importlib.import_module("peel_agent.peel.margins.race")  # the package exports the function of that name
comparison_module = importlib.import_module("peel_agent.peel.past.comparison")

PLAN = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), ())
CHANGES_ONLY = Plan(frozenset(), (), ())
SMALL = zoo.probe(fit=160, select=4, confirm=10)
"""Small enough that everything is in the first heat, with enough to fit that progress of parts is affordable there."""
LARGE = zoo.probe(fit=80, select=40, confirm=160)
STEMS = {"llama": "model.layers", "gpt2": "transformer.h", "qwen3_moe": "model.layers"}
SETS = {("llama", "ternary"): "model.layers.*_proj.weight", ("gpt2", "sign"): "transformer.h.*c_*.weight"}

FROZEN, TRIPLED, LOUD = 1, 2, 3
PLANTED = {
    "llama": ("mlp.down_proj.weight", "post_attention_layernorm.weight"),
    "gpt2": ("mlp.c_proj.weight", "ln_2.weight"),
    "qwen3_moe": ("mlp.experts.gate_up_proj[2]", "post_attention_layernorm.weight"),
}
"""The matrix of block TRIPLED that is multiplied by 3, and the gain of block LOUD that is multiplied by 20."""


def trained_on(model: Any, steps: int = 6) -> Any:
    """The same model after a few more optimiser steps, on other sequences."""
    later = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(later.parameters(), lr=2e-3)
    ids = torch.from_numpy(zoo.token_ids(64, 9))
    for _ in range(steps):
        optimiser.zero_grad()
        later(ids, labels=ids).loss.backward()
        optimiser.step()
    return later.eval()


def blocks_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def freeze(now: Any, before: Any, index: int) -> None:
    """Puts back one block as it was: as if it had not been trained meanwhile."""
    blocks_of(now)[index].load_state_dict(blocks_of(before)[index].state_dict())


def multiply(model: Any, index: int, name: str, factor: float) -> None:
    """Multiplies one weight of a block, `name[e]` for one expert of it."""
    own, _, expert = name.partition("[")
    weight = dict(blocks_of(model)[index].named_parameters())[own].data
    (weight[int(expert.removesuffix("]"))] if expert else weight).mul_(factor)


def planted(kind: str, before: Any) -> Any:
    """The next checkpoint with three changes that no training makes, in three blocks."""
    now = trained_on(before)
    matrix, gain = PLANTED[kind]
    freeze(now, before, FROZEN)
    multiply(now, TRIPLED, matrix, 3.0)
    multiply(now, LOUD, gain, 20.0)
    return now


def opened(path: Path, sets: Mapping[str, WeightSet] | None = None) -> Snapshot:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_snapshot(ref, form, registry.family, sets=sets)


def comparison_of(
    trace: BlockwiseTrace, before: Path, sets: Mapping[str, WeightSet] | None = None, *, keep: bool = False
) -> Comparison:
    past = PastBlocks(opened(before, sets), 10, trace)
    return Comparison(past, None, dtype=dtype_of(trace), keep=keep)


def dtype_of(trace: BlockwiseTrace) -> str:
    return str(trace.stored_dtype).removeprefix("torch.")


def peeled(trace: BlockwiseTrace, comparison: Comparison | None, plan: Plan = PLAN) -> Findings:
    return peel(trace, plan, itertools.count().__next__, comparison=comparison)


def places(layer: LayerReport) -> dict[str, Any]:
    """The reports of a block and its parts, by place."""
    return {"block": layer, **layer.parts}


def tensors(model: Any, kind: str) -> list[dict[str, Any]]:
    """The tensors of each block by their names inside it, in float64."""
    found: list[dict[str, Any]] = [{} for _ in blocks_of(model)]
    for full, weight in model.state_dict().items():
        if full.startswith(STEMS[kind] + "."):
            index, _, name = full.removeprefix(STEMS[kind] + ".").partition(".")
            found[int(index)][name] = weight.double().numpy()
    return found


def in_parts(names: Mapping[str, Any]) -> dict[Any, list[str]]:
    mlp = [name for name in names if name.startswith(oracle.MLP_PREFIXES)]
    return {"attention": [name for name in names if name not in mlp], "mlp": mlp}


def expected_changes(kind: str, now: Any, before: Any) -> list[dict[str, oracle.PlaceChange | None]]:
    own = tensors(now, kind)
    reports = oracle.change(own, tensors(before, kind), [in_parts(block) for block in own])
    return [{"block": report.block, **report.parts} for report in reports]


def check_changes(layers: tuple[LayerReport, ...], theirs: list[dict[str, oracle.PlaceChange | None]]) -> int:
    """Every place has the oracle's ratio and worst matrix, or none where the oracle has none; how many have one."""
    compared = 0
    for layer, expected in zip(layers, theirs, strict=True):
        for place, report in places(layer).items():
            other = expected[place]
            if other is None or other.ratio is None:
                assert report.change is None
                continue
            compared += 1
            assert report.change.ratio == pytest.approx(other.ratio, rel=1e-6, abs=1e-12)
            assert (report.change.worst is None) == (other.worst is None)
            if other.worst is not None:
                assert report.change.worst.name == other.worst[0]
                assert report.change.worst.ratio == pytest.approx(other.worst[1], rel=1e-6, abs=1e-12)
    return compared


class Case:
    """Two checkpoints of one tiny model, as the product sees them and as the oracle does."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.before = zoo.build(kind, steps=60)
        self.now = planted(kind, self.before)
        self.paths = zoo.save(self.before, folder / "before"), zoo.save(self.now, folder / "now")
        self.trace = zoo.trace_of(self.paths[1], SMALL)
        self.findings = peeled(self.trace, comparison_of(self.trace, self.paths[0]))


@pytest.fixture(scope="module", params=list(PLANTED))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny Llama and the next checkpoint of it, in which block 2 was made much worse."""
    before = zoo.build("llama", steps=60)
    now = trained_on(before)
    freeze(now, before, FROZEN)
    multiply(now, TRIPLED, "mlp.down_proj.weight", 8.0)
    return now, before


# ---------------------------------------------------------------- change


def test_change(case: Case) -> None:
    """Ratio and worst matrix of every block and part are the oracle's, experts one by one; planted ones stand out."""
    theirs = expected_changes(case.kind, case.now, case.before)
    assert check_changes(case.findings.layers, theirs) == 3 * zoo.BLOCKS
    matrix, gain = PLANTED[case.kind]
    for index, name in ((TRIPLED, matrix), (LOUD, gain)):
        layer = case.findings.layers[index]
        for report in (layer, layer.parts["mlp"]):
            assert report.change is not None
            assert report.change.worst is not None
            assert report.change.worst.name == name
            assert report.change.worst.ratio > 10
    for report in places(case.findings.layers[FROZEN]).values():
        assert report.change.ratio == 0.0
        assert report.change.worst.ratio == 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_moved(kind: str, tmp_path: Path) -> None:
    """Two checkpoints of the same weights have no change at any place, and exactly no progress."""
    model = zoo.build(kind, steps=3)
    trace = zoo.trace_of(zoo.save(model, tmp_path / "now"), SMALL)
    for layer in peeled(trace, comparison_of(trace, zoo.save(model, tmp_path / "before"))).layers:
        for report in places(layer).values():
            assert report.change is None
            assert report.progress == Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize("narrow", ["now", "before"])
def test_two_dtypes_are_compared_in_the_narrower(narrow: str, tmp_path: Path) -> None:
    """Weights stored in float32 and, rounded, in bfloat16 did not change, which is said; a change still is one."""
    model = zoo.build("llama", steps=30)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    now, before = (rounded, model) if narrow == "now" else (model, rounded)
    path = zoo.save(before, tmp_path, step=10)
    report = measured(zoo.save(now, tmp_path, step=20), Before(10, locate(path))).report
    assert [layer.change for layer in report.layers] == [None] * zoo.BLOCKS
    assert [part.change for layer in report.layers for part in layer.parts.values()] == [None] * 2 * zoo.BLOCKS
    assert report.since_step == 10
    said = [(own.what, own.why.split()[-1]) for own in report.skipped]
    assert ("changes smaller than a rounding", "bfloat16") in said

    blocks_of(now)[0].mlp.up_proj.weight.data.mul_(1.5)
    blocks_of(now)[1].mlp.up_proj.weight.data.mul_(2.0)
    blocks_of(now)[2].mlp.up_proj.weight.data.mul_(1.5)
    layers = measured(zoo.save(now, tmp_path, step=30), Before(10, locate(path))).report.layers
    found = [layer.parts["mlp"].change and layer.parts["mlp"].change.worst for layer in layers]
    assert found[1] is not None
    assert (found[1].name, found[1].ratio) == ("mlp.up_proj.weight", pytest.approx(2.0, rel=1e-2))
    assert layers[3].change is not None
    assert layers[3].change.ratio == 0.0


@pytest.mark.parametrize(("kind", "name"), SETS)
def test_change_and_progress_of_low_bit_blocks(kind: str, name: str, tmp_path: Path) -> None:
    """Latents are what changed, but the earlier block runs with its own quantised weights."""
    before = zoo.build(kind, steps=40)
    now = trained_on(before)
    freeze(now, before, FROZEN)
    multiply(now, LOUD, PLANTED[kind][1], 20.0)
    sets = {SETS[kind, name]: WeightSet.named(name)}
    paths = zoo.save(before, tmp_path / "before"), zoo.save(now, tmp_path / "now")
    trace = open_trace(opened(paths[1], sets), SMALL)
    findings = peeled(trace, comparison_of(trace, paths[0], sets))
    assert check_changes(findings.layers, expected_changes(kind, now, before)) == 3 * zoo.BLOCKS

    own, earlier = (effective(model, kind, name) for model in (now, before))
    config = now.config.to_dict()
    theirs = oracle.progress(own, earlier, config, SMALL.confirm)
    check_progress(findings.layers, theirs)
    latents = {key: weight.double().numpy() for key, weight in before.state_dict().items()}
    otherwise = oracle.progress(own, latents, config, SMALL.confirm)
    apart = [abs(theirs[i]["block"].value - otherwise[i]["block"].value) for i in range(zoo.BLOCKS)]
    assert np.median(apart) > 1e-3  # with the latents themselves it would be told from the oracle


def effective(model: Any, kind: str, name: str) -> dict[str, Any]:
    """The weights of a forward pass in float64: the matrices of the blocks quantised."""
    found = {}
    for key, weight in model.state_dict().items():
        own = weight.double()
        if key.startswith(STEMS[kind] + ".") and own.dim() == 2:
            upright = (own if kind == "llama" else own.T).float()
            upright = quantise(upright, WeightSet.named(name)).double()
            own = upright if kind == "llama" else upright.T
        found[key] = own.numpy()
    return found


# ---------------------------------------------------------------- progress


def check_progress(layers: tuple[LayerReport, ...], theirs: list[dict[oracle.Place, Interval]]) -> None:
    for layer, expected in zip(layers, theirs, strict=True):
        for place, report in places(layer).items():
            own = report.progress
            np.testing.assert_allclose([own.value, own.low, own.high], expected[place], atol=1e-5)  # type: ignore[index]


def test_progress(case: Case) -> None:
    """Values and intervals of every block and part are the oracle's; exactly 0 where nothing changed, all of it."""
    if case.kind != "qwen3_moe":  # the oracle has no mixtures
        now, before = (
            {name: own.double().numpy() for name, own in model.state_dict().items()}
            for model in (case.now, case.before)
        )
        check_progress(case.findings.layers, oracle.progress(now, before, case.now.config.to_dict(), SMALL.confirm))
    for report in places(case.findings.layers[FROZEN]).values():
        assert report.progress == Estimate(0.0, 0.0, 0.0)
    others = [report.progress for layer in case.findings.layers for report in places(layer).values()]
    assert sum(own != Estimate(0.0, 0.0, 0.0) for own in others) == 3 * (zoo.BLOCKS - 1)


def test_a_block_made_worse_is_below_zero(case: Case) -> None:
    """The part whose norm gain was multiplied by 20, and its block, were surely better before."""
    trace = zoo.trace_of(case.paths[1], LARGE)
    layer = peeled(trace, comparison_of(trace, case.paths[0])).layers[LOUD]
    for report in (layer, layer.parts["mlp"]):
        assert report.progress is not None
        assert report.progress.high < 0.0


@dataclass(frozen=True)
class Race:
    """One race: progress by place, its losses minus the trained model's for every confirm sequence, NaN unmeasured."""

    progress: Mapping[Any, Estimate]
    differences: Mapping[Any, Any]


def raced(trace: BlockwiseTrace, before: Path) -> Race:
    found = race_module.race(
        trace,
        PLAN,
        frozenset(),
        Stopwatch(itertools.count().__next__),
        comparison=comparison_of(trace, before),
    )
    selecting = len(trace.probe.select)
    return Race(
        found.progress,
        {(v.block, v.target): own.losses[selecting:] for v, own in found.excesses.items() if v.reference == "earlier"},
    )


@pytest.mark.parametrize(
    ("probe", "rows", "others_open"),
    [
        (LARGE, 18, True),  # fewer than the first heat of the margins, which has 20 of confirm
        (LARGE, 18, False),
        (zoo.probe(fit=20, select=4, confirm=9), 8, True),  # the first heat is everything, but progress has 8 of 9
    ],
    ids=["beside open margins", "alone", "fewer than the heat"],
)
def test_what_seems_worse_is_measured_in_full(
    pair: tuple[Any, Any], probe: Probe, rows: int, others_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places that seem worse on a few confirm sequences, the lowest first, are measured on all of confirm and nothing
    else; their numbers are those of the full measurement, and the others keep those of the few.
    """
    now, before = pair
    path = zoo.save(before, tmp_path / "before")
    trace = zoo.trace_of(zoo.save(now, tmp_path / "now"), probe)
    if not others_open:
        monkeypatch.setattr(race_module, "still_open", lambda *_: ())
    found = raced(trace, path)
    monkeypatch.setattr(heats_module, "HEAT_FRACTION", 1)
    monkeypatch.setattr(heats_module, "WHOLE_PASSES", 1000.0)
    monkeypatch.setattr(comparison_module, "BUDGET_PASSES", 1000.0)
    full = raced(trace, path).differences
    few = {place: estimate(full[place][:rows]) for place in found.progress}
    low = sorted((place for place in few if few[place].value < 0.0), key=lambda place: few[place].value)
    certain = [place for place in low if few[place].high < 0.0]
    expected = low[: min(8, max(3, len(certain)))]
    assert (TRIPLED, "block") in expected
    assert len(expected) < len(found.progress)
    for place, own in found.progress.items():
        measured_on = np.isfinite(found.differences[place])
        if place in expected:
            assert measured_on.all()
            wanted = estimate(full[place])
        else:
            assert measured_on.nonzero()[0].tolist() == list(range(rows))
            wanted = few[place]
        np.testing.assert_allclose(
            [own.value, own.low, own.high], [wanted.value, wanted.low, wanted.high], rtol=0, atol=2e-6
        )
    assert found.progress[TRIPLED, "block"].high < 0.0


def test_the_earlier_checkpoint_is_in_memory_one_block_at_a_time(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight of an earlier block is alive when the next is read; each is read once, and once more to look closer."""
    now, before = pair
    path = zoo.save(before, tmp_path / "before")
    trace = zoo.trace_of(zoo.save(now, tmp_path / "now"), LARGE)
    alive: list[weakref.ref[Any]] = []
    read: list[int] = []
    seen: list[int] = []
    real = PastBlocks._read

    def living() -> int:
        return sum(own() is not None for own in alive)

    def watched(self: PastBlocks, index: int, then: int | None) -> Any:
        read.append(index)
        seen.append(living())
        block = real(self, index, then)
        alive.extend(weakref.ref(own) for own in (block, *block.stored.values(), *block.effective.values()))
        return block

    monkeypatch.setattr(PastBlocks, "_read", watched)
    held: list[int] = []
    comparison = comparison_of(trace, path, keep=True)
    found = peel(
        trace, PLAN, itertools.count().__next__, comparison=comparison, progress=lambda *_: held.append(living())
    )
    assert seen == [0] * len(read)
    of_one_block = 1 + 2 * len(trace.stored_names[0])
    assert set(held) == {0, of_one_block}
    assert read[: zoo.BLOCKS] == list(range(zoo.BLOCKS))
    assert TRIPLED in read[zoo.BLOCKS :]
    assert read[zoo.BLOCKS :] == sorted(set(read[zoo.BLOCKS :]))
    assert found.layers[TRIPLED].progress is not None


# ---------------------------------------------------------------- sketches


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3_moe"])
def wide(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Two checkpoints of a model whose matrices are larger than a sketch, one block frozen and one matrix tripled."""
    kind = request.param
    config = copy.deepcopy(zoo.CONFIGS[kind])
    sizes = {"n_embd": 64, "n_inner": 96} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    for key, value in (sizes | ({"moe_intermediate_size": 40} if kind == "qwen3_moe" else {})).items():
        setattr(config, key, value)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(zoo.CONFIGS, kind, config)
        before = zoo.build(kind, steps=4)
    now = trained_on(before, steps=4)
    freeze(now, before, FROZEN)
    multiply(now, TRIPLED, PLANTED[kind][0], 3.0)
    return kind, now, before


def kept(sketches: Sketches | None) -> Sketches:
    """The sketches as the ledger gives them back, in another process."""
    assert sketches is not None
    _signs.cache_clear()
    return restored(Sketches, json.loads(json.dumps(plain(sketches))))


def sketches_of(model: Any, folder: Path) -> Sketches:
    trace = zoo.trace_of(zoo.save(model, folder))
    findings = peeled(trace, Comparison(None, None, dtype=dtype_of(trace), keep=True), CHANGES_ONLY)
    return kept(findings.sketches)


def test_change_from_sketches_alone(wide: tuple[str, Any, Any], tmp_path: Path) -> None:
    """Without the files the change of each block is the exact one to 25 %, that of a frozen one exactly 0."""
    kind, now, before = wide
    sketches = sketches_of(before, tmp_path / "before")
    trace = zoo.trace_of(zoo.save(now, tmp_path / "now"))
    findings = peeled(trace, Comparison(None, sketches, dtype="float32", keep=False))
    estimated = 0
    for layer, expected in zip(findings.layers, expected_changes(kind, now, before), strict=True):
        assert layer.progress is None
        for place, report in places(layer).items():
            exact = expected[place]
            assert exact is not None
            assert exact.ratio is not None
            assert report.change.ratio == pytest.approx(exact.ratio, rel=0.25)
            estimated += report.change.ratio != pytest.approx(exact.ratio, rel=1e-5)
    assert estimated >= zoo.BLOCKS  # it was not the exact change that was compared
    for report in places(findings.layers[FROZEN]).values():
        assert report.change.ratio == 0.0
    worst = findings.layers[TRIPLED].change
    assert worst is not None
    assert worst.worst is not None
    assert worst.worst.name == PLANTED[kind][0]


def test_sketches_are_small(wide: tuple[str, Any, Any], tmp_path: Path) -> None:
    """There is a sketch of every matrix, of at most 32 x 32 numbers; a smaller weight is kept as it is."""
    kind, _, before = wide
    sketches = sketches_of(before, tmp_path)
    expected = {
        f"{STEMS[kind]}.{index}.{name}": matrix.now
        for index, block in enumerate(tensors(before, kind))
        for name, matrix in oracle.matrices(block, block).items()
    }
    assert set(sketches.values) == set(sketches.shapes) == set(expected)
    assert sketches.dtype == "float32"
    reduced = 0
    for name, weight in expected.items():
        values = np.frombuffer(base64.b64decode(sketches.values[name]), dtype=np.float32)
        assert sketches.shapes[name] == weight.shape
        assert len(values) == min(weight.size, 32 * 32)
        if weight.size <= 32 * 32:
            np.testing.assert_array_equal(values, weight.ravel().astype(np.float32))
        else:
            reduced += 1
    assert reduced >= zoo.BLOCKS


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [((64, 96), 1024), ((33, 4000), 1024), ((20, 4000), 640), ((4000, 3), 96), ((5000,), 32), ((32, 32), 1024)],
)
def test_a_sketch_is_the_oracles(shape: tuple[int, ...], numbers: int) -> None:
    """A weight is projected from each side that is longer than 32, by signs of +-1/sqrt(32); vectors are one row."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = sketch(weight)
    assert found.numel() == numbers
    if weight.numel() <= SIZE**2:
        assert torch.equal(found, weight)
        return
    W = np.atleast_2d(weight.double().numpy())
    S, R = (_signs(side).double().numpy() if side > SIZE else np.eye(side) for side in W.shape)
    for side, own in zip(W.shape, (S, R), strict=True):
        assert side <= SIZE or set(np.unique(np.abs(own)).round(6)) == {round(SIZE**-0.5, 6)}
    np.testing.assert_allclose(found.numpy(), sketch_oracle.sketch(W, S.T, R), atol=1e-4)


@pytest.mark.parametrize(
    ("earlier", "why"),
    [
        ("wider", "model.layers.0 had other weights"),
        ("deeper", "weights of it are missing here"),
        ("shallower", "model.layers.2 had other weights"),
        ("bfloat16", "was stored in bfloat16, this one in float32"),
    ],
)
def test_sketches_of_another_model_are_refused(earlier: str, why: str, tmp_path: Path) -> None:
    """Sketches of another width, depth or dtype are compared with nothing; the reason is told, margins go on."""
    sketches = sketches_of(other(earlier), tmp_path / "before")
    now = zoo.save(zoo.build("llama", steps=0), tmp_path, step=20)
    peeled_now = measured(now, Before(10, None, sketches))
    assert_left_out(peeled_now, why)
    assert peeled_now.sketches is not None


# ---------------------------------------------------------------- what cannot be compared


def other(how: str) -> Any:
    """An untrained Llama that is not like the zoo's in one way."""
    config = copy.deepcopy(zoo.CONFIGS["llama"])
    changes = {"wider": {"hidden_size": 24}, "deeper": {"num_hidden_layers": 6}, "shallower": {"num_hidden_layers": 2}}
    for key, value in changes.get(how, {}).items():
        setattr(config, key, value)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(zoo.CONFIGS, "llama", config)
        model = zoo.build("llama", steps=0)
    return model.to(torch.bfloat16) if how == "bfloat16" else model


def probe_file(folder: Path) -> Path:
    path = folder / "probe.npy"
    np.save(path, zoo.token_ids(280, 7))
    return path


SIZES = {"fit_tokens": 12 * 80, "select_tokens": 12 * 40, "confirm_tokens": 12 * 160}


def measured(
    now: Path, before: Before | None, *, progress: Callable[[str, int, int], None] | None = None, required: bool = False
) -> Peeled:
    return measure(
        locate(now),
        probe=ProbeSettings(path=probe_file(now.parent), **SIZES),
        peeling=PeelSettings(quantities=("margin",)),
        model=ModelSettings(),
        device="cpu",
        clock=time.perf_counter,
        before=before,
        keep_sketches=True,
        require_before=required,
        progress=progress,
    )


def assert_left_out(peeled_now: Peeled, *words: str) -> PeelReport:
    """Change and progress are nowhere in the report, which says why; margins are."""
    report = peeled_now.report
    for layer in report.layers:
        for place in places(layer).values():
            assert place.change is None
            assert place.progress is None
            assert place.margin is not None
    assert report.since_step is None
    reasons = [own.why for own in report.skipped if own.what == "change and progress"]
    assert any(all(word in why for word in words) for why in reasons), reasons
    return report


@dataclass(frozen=True)
class Refusal:
    """An earlier checkpoint that cannot be compared with one of step 20, and what is said of it."""

    label: str
    step: int
    error: type[CheckpointError]
    words: tuple[str, ...]


OTHERS = (
    Refusal("wider", 10, OtherArchitecture, ("has another architecture", "[16, 24]", "[16, 16]")),
    Refusal("deeper", 10, OtherArchitecture, ("has 6 blocks, not 4",)),
    Refusal("shallower", 10, OtherArchitecture, ("model.layers.2.", "not in it")),
    Refusal("gone", 10, CheckpointError, ()),
)


@pytest.mark.parametrize("case_", OTHERS, ids=lambda own: own.label)
def test_another_architecture(case_: Refusal, tmp_path: Path) -> None:
    """Asked for, a checkpoint of another model is a named error with both values; in passing it is a line."""
    now = zoo.save(zoo.build("llama", steps=0), tmp_path, step=20)
    before = zoo.save(other(case_.label), tmp_path, step=case_.step)
    ref = locate(before)
    if case_.label == "gone":
        shutil.rmtree(before)
    with pytest.raises(CheckpointError) as caught:
        peel_agent.scan(now, probe=probe_file(tmp_path), since=before, **SIZES)
    assert type(caught.value) is case_.error
    assert all(word in caught.value.what for word in (str(before), *case_.words))
    report = assert_left_out(measured(now, Before(case_.step, ref)), str(before), *case_.words)
    assert {layer.status for layer in report.layers} != {"not_measured"}


@pytest.mark.parametrize(
    ("since", "words"),
    [
        ("checkpoint-30", ("checkpoint-30 is of step 30", "not before step 20 of", "checkpoint-20")),
        ("again/checkpoint-20", ("again/checkpoint-20 is of step 20", "not before step 20 of", "checkpoint-20")),
        ("checkpoint-20", ("checkpoint-20 is the checkpoint itself",)),
    ],
)
def test_what_is_not_earlier(since: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """A checkpoint of a later or the same step, and the checkpoint itself, are refused with both names and steps."""
    model = zoo.build("llama", steps=0)
    now = zoo.save(model, tmp_path, step=20)
    zoo.save(model, tmp_path, step=30)
    zoo.save(model, tmp_path / "again", step=20)
    with pytest.raises(NotEarlier) as caught:
        peel_agent.scan(now, probe=probe_file(tmp_path), since=tmp_path / since, **SIZES)
    assert all(word in caught.value.what for word in words)


def test_what_is_earlier_is_compared(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """`since` an earlier checkpoint gives change and progress of every block, and says of which step that was."""
    now, before = pair
    paths = zoo.save(now, tmp_path, step=20), zoo.save(before, tmp_path, step=10)
    report = peel_agent.scan(paths[0], probe=probe_file(tmp_path), since=paths[1], quantities=("margin",), **SIZES)
    assert report.since_step == 10
    assert check_changes(report.layers, expected_changes("llama", now, before)) == 3 * zoo.BLOCKS
    assert all(place.progress is not None for layer in report.layers for place in places(layer).values())
    assert report.skipped == ()


def test_a_reason_is_passed_on(tmp_path: Path) -> None:
    """Why there is no checkpoint before is a line of the report; sketches for the next one are made all the same."""
    now = zoo.save(zoo.build("llama", steps=0), tmp_path, step=20)
    found = measured(now, Before(why_not="it is the first checkpoint of this run"))
    assert_left_out(found, "it is the first checkpoint of this run")
    assert found.sketches is not None


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """An earlier checkpoint that holds NaN is not compared with: it has no size to which a change is relative."""
    now, before = zoo.build("llama", steps=0), zoo.build("llama", steps=1)
    blocks_of(before)[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    paths = zoo.save(now, tmp_path, step=20), zoo.save(before, tmp_path, step=10)
    assert_left_out(measured(paths[0], Before(10, locate(paths[1]))), "a weight of model.layers.2 is NaN or infinite")


def test_a_fully_connected_network_has_no_past(tmp_path: Path) -> None:
    """`since` for a network that has no blocks is not passed over in silence."""
    rng = np.random.default_rng(1)
    data = {"inputs": rng.normal(size=(300, 5)), "targets": rng.normal(size=(300, 2))}
    save_file({name: own.astype(np.float32) for name, own in data.items()}, tmp_path / "probe.safetensors")
    paths = [tmp_path / f"step-{step}" for step in (10, 20)]
    for path in paths:
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "mlp"}))
        shapes = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (2, 6), "2.bias": (2,)}
        weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        save_file(weights, path / "model.safetensors")
    report = peel_agent.scan(paths[1], probe=tmp_path / "probe.safetensors", since=paths[0])
    assert ("change and progress", "a fully connected network has no blocks") in [
        (own.what, own.why) for own in report.skipped
    ]
    assert report.since_step is None


def at(stage: str, done: int, fault: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A progress callback that makes the fault when the work is so far, once."""
    waiting = [fault]

    def progress(told: str, so_far: int, _total: int) -> None:
        if (told, so_far) == (stage, done) and waiting:
            waiting.pop()()

    return progress


MOMENTS = [("blocks", 0), ("blocks", 2), ("blocks", 4), ("open margins, blocks", 0), ("open margins, blocks", 4)]


@pytest.mark.parametrize(("stage", "done"), MOMENTS)
def test_rewritten_while_it_is_read(pair: tuple[Any, Any], stage: str, done: int, tmp_path: Path) -> None:
    """An earlier checkpoint that is rewritten at any moment costs change and progress, said so, and no margin."""
    now, before = pair
    paths = zoo.save(now, tmp_path, step=20), zoo.save(before, tmp_path, step=10)
    happened = []

    def touch() -> None:
        happened.append((stage, done))
        os.utime(paths[1] / "model.safetensors")

    found = measured(paths[0], Before(10, locate(paths[1])), progress=at(stage, done, touch), required=True)
    assert happened
    report = assert_left_out(found, "changed while")
    alone = measured(paths[0], None).report
    assert [layer.margin for layer in report.layers] == [layer.margin for layer in alone.layers]
    assert [layer.status for layer in report.layers] == [layer.status for layer in alone.layers]


def test_removed_while_it_is_read(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """An earlier checkpoint that is rotated away was held open: it is compared with to the end."""
    now, before = pair
    paths = zoo.save(now, tmp_path, step=20), zoo.save(before, tmp_path, step=10)
    ref = locate(paths[1])
    found = measured(paths[0], Before(10, ref), progress=at("blocks", 2, lambda: shutil.rmtree(paths[1])))
    assert not paths[1].exists()
    assert found.report.skipped == ()
    assert found.report.since_step == 10
    progress = found.report.layers[TRIPLED].progress
    assert progress is not None
    assert progress.high < 0.0


def test_the_checkpoint_itself_rewritten_is_torn_as_ever(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """What is forgiven of the earlier checkpoint is not of the one that is peeled."""
    now, before = pair
    paths = zoo.save(now, tmp_path, step=20), zoo.save(before, tmp_path, step=10)
    touch = at("blocks", 2, lambda: os.utime(paths[0] / "model.safetensors"))
    with pytest.raises(TornCheckpoint):
        measured(paths[0], Before(10, locate(paths[1])), progress=touch)
