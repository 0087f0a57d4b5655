"""Bounds: both solvers beside their oracles, the discipline of the three parts, and the running minimum."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peel_agent.errors import ConfigurationError
from peel_agent.peel import peel
from peel_agent.peel.bounds.bounds import remember, zone_of
from peel_agent.peel.bounds.chains import chain_ends, hidden_states_of
from peel_agent.peel.bounds.heads import fit_head
from peel_agent.peel.bounds.maps import PAPER_FOUR_BLOCKS
from peel_agent.peel.bounds.solvers import SOLVERS, solver_named
from peel_agent.peel.numerics.losses import sequence_losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import score_ids
from peel_agent.peel.sweep.forward import sweep
from peel_agent.peel.sweep.heats import nowhere
from peel_agent.records import BoundMemory, Estimate, Findings, Plan, Probe
from tests import zoo
from tests.bench.naive import naive_chain
from tests.oracles import bounds as bounds_oracle
from tests.oracles import descent as descent_oracle


def bounds_only(maps: Any, solver: str = "closed_form") -> Plan:
    return Plan(frozenset({"bounds"}), (), maps, solver)


def peeled(trace: Any, plan: Plan, earlier: BoundMemory | None = None) -> Findings:
    return peel(trace, plan, itertools.count().__next__, earlier=earlier)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A 4-block model and its Trace."""
    model = zoo.build(request.param)
    return model, zoo.trace_of(zoo.save(model, tmp_path_factory.mktemp(request.param)))


def test_closed_form_on_every_map_of_the_paper(pair: tuple[Any, Any]) -> None:
    """All of the paper's 4-block lists agree with the direct float64 implementation: no trie, no streaming."""
    model, trace = pair
    decoder, probe = zoo.decoder_of(model), trace.probe
    bound_by_map = {bound.map: bound for bound in peeled(trace, bounds_only("paper")).bounds if bound.label != "head"}
    assert set(bound_by_map) == set(PAPER_FOUR_BLOCKS)
    for target_map, bound in bound_by_map.items():
        expected = bounds_oracle.bound_of_map(decoder, probe.fit, probe.select, probe.confirm, target_map)["value"]
        ours = [bound.value.value, bound.value.low, bound.value.high]
        np.testing.assert_allclose(ours, expected, atol=3e-4, rtol=3e-4)


def test_descent_on_every_map_of_the_paper(pair: tuple[Any, Any]) -> None:
    """The same for the paper's own solver: six AdamW steps a block on all of fit, then the head.

    Adam divides by the size of a gradient, so float32 rounding in near-zero gradients moves parameters that hardly
    matter; the losses agree to a few thousandths of a nat.
    """
    model, trace = pair
    probe = trace.probe
    bound_by_map = {bound.map: bound for bound in peeled(trace, bounds_only("paper", "descent")).bounds}
    for target_map in PAPER_FOUR_BLOCKS:
        fit, score = descent_oracle.chain(model, probe.fit, [score_ids(probe)], target_map)
        ends = type(sweep_of(trace).hidden[0])(fit.float(), score.float(), len(probe.select))
        losses = sequence_losses(trace, ends.score, score_ids(probe), fit_head(trace, ends))
        assert bound_by_map[target_map].value.value == pytest.approx(losses[len(probe.select) :].mean(), abs=4e-3)
        assert bound_by_map[target_map].solver == "descent"


def sweep_of(trace: Any) -> Any:
    return sweep_keeping(trace, frozenset({0}))


def sweep_keeping(trace: Any, keep: frozenset[int]) -> Any:
    return sweep(trace, bounds_only("ends"), nowhere(trace), keep, Stopwatch(itertools.count().__next__))


def test_prefixes_are_solved_once(pair: tuple[Any, Any]) -> None:
    """Maps that share a prefix share its solves: as many as there are distinct prefixes that are not direct."""
    _, trace = pair
    maps = [(1, 2), (1, 4), (1, 4, 4), (4, 4), (1, 2, 3, 4)]
    solved: list[int] = []
    real = SOLVERS["closed_form"]

    def counting(block: Any, inputs: Any, targets: Any, chunk: Any) -> Any:
        solved.extend([block.index] * len(targets))
        return real.solve(block, inputs, targets, chunk)

    counted = type(real)(real.name, counting, real.warm, real.least_squares)
    keep = hidden_states_of(maps, counted)
    swept = sweep_keeping(trace, keep)
    chain_ends(trace, maps, swept.hidden, counted, Stopwatch(itertools.count().__next__))
    prefixes = {target_map[:n] for target_map in maps for n in range(1, len(target_map) + 1)}
    assert len(solved) == len([prefix for prefix in prefixes if prefix != tuple(range(1, len(prefix) + 1))]) == 4


def test_cold_start_is_the_architecture_s_own(pair: tuple[Any, Any]) -> None:
    """A cold start takes fresh parameters by a fixed seed, leaves the global random state alone, and is worse."""
    _, trace = pair
    block = next(iter(trace.blocks(stop=1)))
    state = torch.get_rng_state()
    first, again = block.initial_parameters(), block.initial_parameters()
    assert torch.equal(torch.get_rng_state(), state)
    assert set(first) == set(block.parameters)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], block.parameters[name]) for name in first)
    direct = ((1, 2, 3, 4),)
    warm, cold = (
        peeled(trace, bounds_only(direct, name)).bounds[1].value.value for name in ("descent", "descent_cold")
    )
    assert warm < cold


def test_direct_map_of_a_warm_solver_is_the_head_s(pair: tuple[Any, Any]) -> None:
    """Blocks aimed at their own outputs stay as they are, so `direct` and `head` are one value."""
    _, trace = pair
    findings = peeled(trace, bounds_only("direct"))
    head, direct = findings.bounds
    assert (head.label, direct.label) == ("head", "direct")
    assert head.value == direct.value
    assert (findings.bound_label, findings.bound) == ("head", head.value)


def test_unknown_solver() -> None:
    """The message lists the solvers."""
    with pytest.raises(ConfigurationError, match=r"(.|\n)*closed_form, descent, descent_cold"):
        solver_named("newton")


# ---------------------------------------------------------------- the discipline


LOSSES = arrays(np.float64, (5, 12), elements=st.floats(0.5, 4.0, width=32))
SELECTING = 4


def suite_of(losses: Any) -> dict[str, Any]:
    return {str(index): row for index, row in enumerate(losses)}


@given(LOSSES)
def test_the_bound_is_the_select_winner_s_value_on_confirm(losses: Any) -> None:
    """Not the least value on confirm: picking and publishing use different sequences."""
    memory = remember(suite_of(losses), SELECTING, "p", None)
    winner = losses[losses[:, :SELECTING].mean(axis=1).argmin()]
    assert memory.confirm == tuple(winner[SELECTING:])


@given(LOSSES, st.integers(1, 4))
def test_adding_a_map_never_raises_the_least_value_on_select(losses: Any, fewer: int) -> None:
    """A larger suite is at least as good on the sequences where it is picked."""
    small, large = (remember(suite_of(losses[:count]), SELECTING, "p", None) for count in (fewer, 5))
    assert large.select <= small.select


@given(st.lists(LOSSES, min_size=1, max_size=5))
def test_the_running_minimum_never_rises(checkpoints: list[Any]) -> None:
    """Over checkpoints, neither the best on select nor the best value of any map goes up."""
    memory = None
    for losses in checkpoints:
        before, memory = memory, remember(suite_of(losses), SELECTING, "p", memory)
        if before is not None:
            assert memory.select <= before.select
            assert all(memory.best[label] <= before.best[label] for label in before.best)
    assert memory is not None
    assert memory.select == min(losses[:, :SELECTING].mean(axis=1).min() for losses in checkpoints)


@given(st.lists(LOSSES, min_size=1, max_size=5))
def test_the_winner_keeps_its_label_and_step(checkpoints: list[Any]) -> None:
    """The memory names the map and the checkpoint whose losses it holds; of equal ones the earliest and the first."""
    memory = None
    for step, losses in enumerate(checkpoints):
        memory = remember(suite_of(losses), SELECTING, "p", memory, step=step)
    assert memory is not None
    means = [losses[:, :SELECTING].mean(axis=1) for losses in checkpoints]
    step = int(np.argmin([of_map.min() for of_map in means]))
    place = int(means[step].argmin())
    assert (memory.step, memory.label) == (step, str(place))
    assert memory.confirm == tuple(checkpoints[step][place, SELECTING:])


@given(LOSSES, LOSSES)
def test_another_probe_begins_anew(first: Any, second: Any) -> None:
    """A minimum over other sequences is no bound for these."""
    earlier = remember(suite_of(first), SELECTING, "p", None)
    assert remember(suite_of(second), SELECTING, "q", earlier) == remember(suite_of(second), SELECTING, "q", None)


def test_the_naive_way_that_the_bench_measures_against_solves_the_same_problem(tmp_path: Path) -> None:
    """Every hidden state anew and a pseudo-inverse: without a ridge and without choosing, it comes about as near."""
    trace = zoo.trace_of(zoo.save(zoo.build("llama"), tmp_path), zoo.probe(80, 40, 160))
    depth, solver = len(trace.block_names), SOLVERS["closed_form"]
    maps = [(depth,), (2, depth)]
    swept = sweep_keeping(trace, hidden_states_of(maps, solver) | {depth})
    shared = chain_ends(trace, maps, swept.hidden, solver, Stopwatch(itertools.count().__next__))
    target = swept.hidden[depth].fit

    def error(fit: torch.Tensor) -> float:
        return float((fit - target).square().mean())

    for target_map in maps:
        naive, _ = naive_chain(trace, target_map)
        untouched = swept.hidden[0].fit
        for block in trace.blocks(stop=len(target_map)):
            untouched = block.run(untouched)
        assert error(naive) == pytest.approx(error(shared[target_map].fit), rel=0.2)
        assert error(naive) < error(untouched)


@pytest.mark.parametrize(
    ("gap", "zone"),
    [((0.2, 0.1, 0.3), "caution"), ((-0.2, -0.3, -0.1), "effective"), ((0.0, -0.1, 0.1), "undecided")],
)
def test_zone(gap: tuple[float, float, float], zone: str) -> None:
    """An interval that holds 0 decides nothing."""
    assert zone_of(Estimate(*gap)) == zone


def test_an_earlier_better_bound_stands(pair: tuple[Any, Any]) -> None:
    """The gap is measured against the best construction so far, paired sequence by sequence."""
    _, trace = pair
    alone = peeled(trace, bounds_only("ends"))
    assert alone.memory is not None
    better = tuple(value - 0.5 for value in alone.memory.confirm)
    earlier = BoundMemory(trace.probe.fingerprint, alone.memory.select - 0.5, better, {"head": 0.125}, "1-4", 700)
    after = peeled(trace, bounds_only("ends"), earlier)
    assert after.bound is not None
    assert alone.bound is not None
    assert after.bound.value == pytest.approx(alone.bound.value - 0.5)
    assert after.gap is not None
    assert alone.gap is not None
    assert after.gap.value == pytest.approx(alone.gap.value + 0.5)
    assert (after.bound_label, after.bound_step) == ("1-4", 700)
    assert (alone.bound_label, alone.bound_step) == (alone.memory.label, None)
    assert alone.bound_label in {bound.label for bound in alone.bounds}
    assert after.bounds[0].best == 0.125
    assert after.bounds[0].value == alone.bounds[0].value
    assert after.memory is not None
    assert after.memory.confirm == better


def test_exchanging_parts_changes_numbers_within_their_intervals(tmp_path: Path) -> None:
    """Other sequences in fit, select and confirm give bounds whose intervals overlap: nothing hangs on the split."""
    path = zoo.save(zoo.build("llama"), tmp_path)
    ids = zoo.token_ids(200, 7)

    def bound(seed: int) -> Estimate:
        order = np.random.default_rng(seed).permutation(200)
        probe = Probe(ids[order[:100]], ids[order[100:130]], ids[order[130:]], f"split {seed}")
        value = peeled(zoo.trace_of(path, probe), bounds_only("ends")).bound
        assert value is not None
        return value

    one, other = bound(1), bound(2)
    assert max(one.low, other.low) < min(one.high, other.high)


def test_a_heads_fit_says_that_it_is_alive(pair: tuple[Any, Any]) -> None:
    """It is told apart from a stall: something is told after each step, not once a map."""
    told: list[tuple[str, int, int]] = []
    _, trace = pair
    peel(trace, bounds_only("ends"), itertools.count().__next__, progress=lambda *step: told.append(step))
    steps = [step for step in told if step[0] == "bounds, maps"]
    assert len(steps) > 3 * (steps[-1][2] + 1)
