"""The budget in forward passes: where it does not bind nothing is lost, and what seems below is always measured."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from peel_agent.peel import peel
from peel_agent.peel.margins.margin import Margin, Place
from peel_agent.records import Findings, LayerReport, PeelSettings, Plan, Probe, Status
from tests import zoo

meter_module = importlib.import_module("peel_agent.peel.numerics.meter")
race_module = importlib.import_module("peel_agent.peel.margins.race")  # the package exports the function of that name
PLAN = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")
BLOCKS = 6
PARTS: Mapping[str, str] = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
NEVER_TRAINED = [(3, part) for part in PARTS]
FAULTS: Mapping[str, Sequence[tuple[int, str]]] = {
    "a block that was never trained": NEVER_TRAINED,
    "a dead part": [(4, "attention")],
    "three bad blocks": [(index, part) for index in (1, 3, 4) for part in PARTS],
    "all blocks bad": [(index, part) for index in range(BLOCKS) for part in PARTS],
}
PROBES = {
    "most of it is scored": zoo.probe(fit=40, select=20, confirm=80),
    "most of it is fitted to": zoo.probe(fit=240, select=30, confirm=60),
}


@pytest.fixture(scope="module", params=FAULTS)
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A trained model of some blocks in which some parts add nothing."""
    idle = [f"model.layers.{index}.{PARTS[part]}.weight" for index, part in FAULTS[request.param]]
    config = copy.deepcopy(zoo.CONFIGS["llama"])
    config.num_hidden_layers = BLOCKS
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(zoo.CONFIGS, "llama", config)
        model = zoo.build("llama", 60, idle)
    return request.param, zoo.save(model, tmp_path_factory.mktemp("faulty"))


def statuses(findings: Findings) -> dict[str, Status]:
    return dict(_statuses(findings))


def _statuses(findings: Findings) -> Iterator[tuple[str, Status]]:
    for layer in findings.layers:
        yield layer.name, layer.status
        yield from ((f"{layer.name}/{name}", part.status) for name, part in layer.parts.items())


def found(path: Path, probe: Probe, passes: float | None) -> Findings:
    return peel(zoo.trace_of(path, probe), dataclasses.replace(PLAN, passes=passes), itertools.count().__next__)


def left_open(findings: Findings) -> set[str]:
    told = [skipped.what for skipped in findings.skipped if "budget" in skipped.why]
    return {name for what in told for name in what.partition(": ")[2].split(", ")}


@pytest.mark.parametrize("probe", PROBES)
def test_a_small_probe_has_all_of_its_answers_by_default(faulty: tuple[str, Path], probe: str) -> None:
    """The default says of every block and part what no limit says, whatever the share of the probe that is scored."""
    fault, path = faulty
    whole, limited = (found(path, PROBES[probe], passes) for passes in (None, PeelSettings().budget_passes))
    ours = statuses(limited)
    assert ours == statuses(whole)
    assert not left_open(limited)
    assert "below" in ours.values() or fault in ("three bad blocks", "all blocks bad")  # in these nothing stands out


def test_what_seems_below_is_measured_whatever_the_budget(
    faulty: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no budget, what seems below has the numbers of the full measurement; what stays open is named."""
    monkeypatch.setattr(meter_module, "USUAL_TOKENS", 0)
    seen: list[set[Place]] = []
    real = race_module.seeming_below

    def watched(margins: Mapping[Place, Margin]) -> tuple[Place, ...]:
        seen.append(set(real(margins)))
        return tuple(real(margins))

    monkeypatch.setattr(race_module, "seeming_below", watched)
    fault, path = faulty
    limited = found(path, PROBES["most of it is scored"], 0.5)
    (suspects,) = seen
    whole = found(path, PROBES["most of it is scored"], None)
    assert limited.passes < whole.passes
    assert len(suspects) <= race_module.MOST_BELOW
    assert suspects or fault in ("three bad blocks", "all blocks bad")  # in these nothing stands out
    named = left_open(limited)
    assert named
    for theirs, ours in zip(whole.layers, limited.layers, strict=True):
        for target, full, own in [("block", theirs, ours), *((p, theirs.parts[p], ours.parts[p]) for p in PARTS)]:
            if (ours.index, target) in suspects:
                assert own.margin == full.margin
                assert _name(ours, target) not in named


def _name(layer: LayerReport, target: str) -> str:
    return layer.name if target == "block" else f"{layer.name}/{target}"
