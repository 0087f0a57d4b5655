"""Paired differences of two checkpoints against transformers' own forward pass and plain numpy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import peel_agent
from peel_agent.peel import paired_differences, peel
from peel_agent.probing import probe_for
from peel_agent.records import Estimate, Plan, Probe, ProbeSettings
from tests import zoo
from tests.oracles import pairs
from tests.oracles.intervals import Interval

TOLERANCE = 2e-4
"""Of float32 against float64, in nats per token."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One training at two moments."""
    folder = tmp_path_factory.mktemp("two")
    return zoo.save(zoo.build("llama", steps=20), folder, step=20), zoo.save(zoo.build("llama"), folder, step=80)


def close(measured: Estimate, oracle: Interval) -> None:
    assert [measured.value, measured.low, measured.high] == pytest.approx(list(oracle), abs=TOLERANCE)


def test_the_difference_of_losses(two: tuple[Path, Path], tmp_path: Path) -> None:
    """`compare` on the probe's own confirm sequences gives the oracle's mean and interval of b - a, and of a - b."""
    ids = np.concatenate([zoo.token_ids(60, seed) for seed in range(4)])
    np.save(tmp_path / "probe.npy", ids)
    there, back = (
        peel_agent.compare(*places, probe=tmp_path / "probe.npy", quantities=()) for places in (two, two[::-1])
    )
    confirm = confirm_of(two[0], tmp_path / "probe.npy")
    for comparison, places in ((there, two), (back, two[::-1])):
        assert comparison.pairing == "by sequence"
        assert comparison.loss.difference is not None
        assert comparison.loss.sequences == len(confirm)
        close(comparison.loss.difference, pairs.loss_difference(*places, confirm))
        assert abs(comparison.loss.difference.value) > 10 * TOLERANCE


def confirm_of(path: Path, probe: Path) -> np.ndarray:
    """The sequences that are measured, as `scan` chooses them."""
    return probe_for(zoo.snapshot_of(path), ProbeSettings(path=probe)).confirm


def test_the_difference_of_margins(two: tuple[Path, Path]) -> None:
    """With `skip` as the only stand-in the margin is the cost of skipping the block, paired over the same sequences."""
    tokens = zoo.probe(select=4, confirm=9)  # so few that each is measured on all of them
    plan = Plan(frozenset({"margin"}), ("skip",), "ends", parts=False)
    a, b = (peel(zoo.trace_of(place, tokens), plan, itertools.count().__next__).losses for place in two)
    assert a is not None
    assert b is not None
    paired = paired_differences(a, b)
    for index in range(zoo.BLOCKS):
        difference = paired.margins[str(index)]
        assert difference.sequences == len(tokens.confirm)
        close(difference.value, pairs.skip_margin_difference(*two, tokens.confirm, index))


def test_two_probes_are_never_paired(two: tuple[Path, Path]) -> None:
    """What was measured on other tokens has another fingerprint, and is refused."""
    plan = Plan(frozenset(), (), "ends")
    one = peel(zoo.trace_of(two[0]), plan, itertools.count().__next__).losses
    tokens = zoo.probe()
    other = Probe(tokens.fit, tokens.select, tokens.confirm[::-1].copy(), fingerprint="other")
    two_losses = peel(zoo.trace_of(two[0], other), plan, itertools.count().__next__).losses
    assert one is not None
    assert two_losses is not None
    with pytest.raises(ValueError, match="two probes cannot be paired: zoo and other"):
        paired_differences(one, two_losses)
    assert torch.tensor(one.loss).flip(0).allclose(torch.tensor(two_losses.loss))
