"""Every number of the peel room beside a slow float64 implementation of the same formula in numpy."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.peel import peel
from peel_agent.peel.bounds.heads import fit_head
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.least_squares import RIDGES, Gram
from peel_agent.peel.numerics.losses import sequence_losses
from peel_agent.peel.numerics.streams import Streams, embedded, score_ids
from peel_agent.peel.references import pick_affine, refit
from peel_agent.records import Findings, Plan
from tests import zoo
from tests.oracles import bounds, intervals, least_squares, margins, references
from tests.oracles.decoder import Decoder

MAPS = ((4,), (1, 4), (4, 4), (2, 3), (1, 2, 4), (1, 3, 3, 4), (1, 2, 3, 4))
PLAN = Plan(frozenset({"margin", "bounds"}), ("skip", "affine", "previous"), MAPS)


class Case:
    """One tiny trained model as the product sees it and as the oracle does."""

    def __init__(self, kind: str, folder: Path) -> None:
        model = zoo.build(kind)
        self.trace: BlockwiseTrace = zoo.trace_of(zoo.save(model, folder))
        self.decoder: Decoder = zoo.decoder_of(model)
        probe = self.trace.probe
        self.parts = (probe.fit, probe.select, probe.confirm)
        with pytest.MonkeyPatch.context() as patched:
            heats = importlib.import_module("peel_agent.peel.margins.heats")
            patched.setattr(heats, "HEAT_FRACTION", 1)  # one heat: everything
            patched.setattr(heats, "WHOLE_PASSES", 1000.0)
            self.findings: Findings = peel(self.trace, PLAN, itertools.count().__next__)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def close(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_block_margins(case: Case) -> None:
    """Margins, their intervals, every reference's loss, statuses, parts and stream shares are the oracle's.

    Statuses are those that the oracle gives to our own numbers: which side of a threshold a number is on that equals it
    but for rounding is no matter of correctness.
    """
    layers = case.findings.layers
    for ours, theirs in zip(layers, margins.block_margins(case.decoder, *case.parts), strict=True):
        selected = theirs["select_losses"]
        close(selected[ours.best_reference], min(selected.values()))
        assert ours.status == status_of([layer.margin for layer in layers], ours.index, bool(theirs["left_out"]))
        if ours.best_reference == theirs["best_reference"]:
            close([ours.margin.value, ours.margin.low, ours.margin.high], theirs["margin"])
        close(ours.margin.value, theirs["references"][ours.best_reference])
        assert set(ours.references) == set(theirs["references"])
        for name, value in theirs["references"].items():
            close(ours.references[name], value)
        close(ours.stream_share, theirs["stream_share"])
        for part in ("attention", "mlp"):
            close(
                [ours.parts[part].margin.value, ours.parts[part].margin.low, ours.parts[part].margin.high],
                theirs["parts"][part]["margin"],
            )
            of_parts = [layer.parts[part].margin for layer in layers]
            assert ours.parts[part].status == status_of(of_parts, ours.index, bool(theirs["parts"][part]["left_out"]))


def status_of(estimates: list[Any], index: int, left_out: bool) -> str:
    """The oracle's status of the margin at `index` among those of its like."""
    return margins.status(
        estimates[index], [other.value for other in estimates[:index] + estimates[index + 1 :]], left_out
    )


def test_bounds_of_every_map(case: Case) -> None:
    """Each map's value and interval is the oracle's chain, refitted head and all."""
    by_map = {bound.map: bound for bound in case.findings.bounds}
    assert set(MAPS) <= set(by_map)
    for target_map in MAPS:
        theirs = bounds.bound_of_map(case.decoder, *case.parts, target_map)
        ours = by_map[target_map].value
        close([ours.value, ours.low, ours.high], theirs["value"], 2e-4)


def test_gap_and_zone(case: Case) -> None:
    """The bound is the select-winner's value on confirm; gap and zone are paired against the trained model.

    Of winners that differ on select by rounding only, either may be ours.
    """
    suite = bounds.suite(case.decoder, *case.parts, MAPS)["bounds"]
    least = min(bound["select_losses"].mean() for bound in suite)
    winners = [bound for bound in suite if bound["select_losses"].mean() < least + 4e-4]
    trained = case.decoder.nll(case.decoder.streams(case.parts[2])[-1], case.parts[2])
    ours = case.findings
    assert ours.bound is not None
    assert ours.gap is not None
    gap = [ours.gap.value, ours.gap.low, ours.gap.high]
    theirs = [intervals.paired(trained - winner["confirm_losses"]) for winner in winners]
    assert any(np.allclose(gap, interval, rtol=2e-4, atol=2e-4) for interval in theirs), (gap, theirs)
    assert ours.zone == bounds.zone(intervals.Interval(*gap))


def test_loss(case: Case) -> None:
    """The published loss is the mean of the oracle's per-sequence losses on confirm, with its interval."""
    confirm = case.parts[2]
    theirs = intervals.paired(case.decoder.nll(case.decoder.streams(confirm)[-1], confirm))
    close([case.findings.loss.value, case.findings.loss.low, case.findings.loss.high], theirs)


def test_sequence_losses_and_streams(case: Case) -> None:
    """Running block by block gives the oracle's hidden states and per-sequence losses."""
    h = embedded(case.trace)
    ids = score_ids(case.trace.probe)
    expected = case.decoder.streams(ids)
    close(h.score, expected[0])
    for block, theirs in zip(case.trace.blocks(), expected[1:], strict=True):
        h = h.through(block.run, case.trace.chunk)
        close(h.score, theirs)
    close(sequence_losses(case.trace, h.score, ids), case.decoder.nll(expected[-1], ids))


@pytest.mark.parametrize("target", [1, 3])
def test_refit(case: Case, target: int) -> None:
    """The refitted projections map as the oracle's do (projections themselves may differ where features are tied)."""
    fit, select, confirm = (case.decoder.streams(ids) for ids in case.parts)
    theirs = references.refit(case.decoder, 0, fit[0], fit[target], select[0], select[target])

    def streams(index: int) -> Streams:
        score = np.concatenate([select[index], confirm[index]])
        return Streams(torch.from_numpy(fit[index]).float(), torch.from_numpy(score).float(), len(select[0]))

    block = next(iter(case.trace.blocks(stop=1)))
    *_, ours = refit(block, streams(0), [streams(2), streams(target)], case.trace.chunk)
    close(ours.run(streams(0).confirm), case.decoder.block(0, confirm[0], *theirs), 1e-4)


def test_affine(case: Case) -> None:
    """The affine reference is the oracle's, its ridge picked on select."""
    fit, select = case.decoder.streams(case.parts[0]), case.decoder.streams(case.parts[1])
    theirs, _ = least_squares.affine(fit[1], fit[2], select[1], select[2])
    gram = Gram(zoo.WIDTH, zoo.WIDTH, intercept=True, device=torch.device("cpu"))
    gram.update(torch.from_numpy(fit[1]), torch.from_numpy(fit[2] - fit[1]))
    ours = pick_affine(
        gram.solve(), slice(0, zoo.WIDTH), torch.from_numpy(select[1]), torch.from_numpy(select[2] - select[1])
    )
    close(ours.weight, theirs[:-1], 1e-6)
    close(ours.bias, theirs[-1], 1e-6)


def test_head(case: Case) -> None:
    """The refitted head is the oracle's AdamW, batch order and early stop included."""
    streams = [case.decoder.streams(ids) for ids in case.parts]
    score = torch.from_numpy(np.concatenate([streams[1][-1], streams[2][-1]])).float()
    ends = Streams(torch.from_numpy(streams[0][-1]).float(), score, len(case.parts[1]))
    theirs = bounds.bound_of_map(case.decoder, *case.parts, (1, 2, 3, 4))["head"]
    close(fit_head(case.trace, ends).weight, theirs, 1e-3)


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("kind", ["tall", "ill_conditioned", "wide", "dead_column", "dependent"])
def test_ridge(kind: str, ridge: float) -> None:
    """Normal equations in float64 give the augmented system's solution; rank and status are told."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20, 40) if kind == "wide" else (200, 12))
    if kind == "ill_conditioned":
        x = x * np.logspace(0, -3, 12)
    if kind == "dead_column":
        x[:, 3] = 0.0
    if kind == "dependent":
        x[:, 3] = x[:, 2]
    y = rng.normal(size=(len(x), 3))
    gram, other = (Gram(x.shape[1], 3, intercept=False, device=torch.device("cpu")) for _ in range(2))
    gram.update(torch.from_numpy(x[:7]), torch.from_numpy(y[:7]))
    other.update(torch.from_numpy(x[7:]), torch.from_numpy(y[7:]))
    gram.merge(other)
    (solution,) = gram.solve((ridge,))
    expected = least_squares.ridge(x, y, ridge)
    np.testing.assert_allclose(x @ solution.weight.numpy(), x @ expected, atol=1e-6 * np.abs(y).max() * 1e2)
    assert solution.rank == x.shape[1] - (kind == "dead_column")
    assert solution.condition >= 1.0


def test_singular_without_ridge() -> None:
    """A Gram that Cholesky cannot factorise is solved in its eigenbasis, with the rank it really has."""
    x = np.random.default_rng(6).normal(size=(50, 4))
    x = np.concatenate([x, x[:, :1]], axis=1)
    y = x @ np.ones((5, 1))
    gram = Gram(5, 1, intercept=False, device=torch.device("cpu"))
    gram.update(torch.from_numpy(x), torch.from_numpy(y))
    (solution,) = gram.solve((0.0,))
    np.testing.assert_allclose(x @ solution.weight.numpy(), y, atol=1e-6)
    if solution.status == "eigen":
        assert solution.rank == 4
    assert solution.condition > 1e12 or solution.rank == 4


@pytest.mark.parametrize("count", [8, 33])
def test_interval(count: int) -> None:
    """The interval is the oracle's, resample for resample."""
    values = np.random.default_rng(count).normal(size=count)
    ours, theirs = estimate(values), intervals.paired(values)
    close([ours.value, ours.low, ours.high], theirs, 1e-12)
