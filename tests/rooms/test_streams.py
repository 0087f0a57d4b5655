"""Streams run piece by piece, and what happens when memory runs out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from peel_agent.capture.block import ResidentBlock
from peel_agent.peel import peel
from peel_agent.peel.numerics.streams import rewrite, through
from peel_agent.records import Chunk, Plan
from tests import zoo


def exhausted_above(limit: int) -> Any:
    """A function that doubles its input, and runs out of memory on more than `limit` sequences."""

    def run(h: torch.Tensor) -> torch.Tensor:
        if len(h) > limit:
            raise torch.OutOfMemoryError("injected")
        return 2 * h

    return run


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_out_of_memory_halves_the_chunk_and_goes_on(limit: int) -> None:
    """Every sequence is run once in the end, the chunk stays small, and nothing is lost or doubled."""
    stream, chunk = torch.randn(17, 2, 3), Chunk(8)
    torch.testing.assert_close(through(exhausted_above(limit), stream, chunk), 2 * stream)
    assert chunk.sequences == {1: 1, 3: 2, 7: 4}[limit]
    copy = stream.clone()
    rewrite(exhausted_above(limit), copy, Chunk(8))
    torch.testing.assert_close(copy, 2 * stream)


def test_a_single_sequence_that_does_not_fit_is_an_error() -> None:
    """There is nothing left to halve: torch's own error tells."""
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        through(exhausted_above(0), torch.zeros(4, 1, 1), Chunk(2))


def test_other_errors_are_not_swallowed() -> None:
    """Only memory is a reason to try again."""

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    chunk = Chunk(4)
    with pytest.raises(RuntimeError, match="shapes"):
        through(broken, torch.zeros(4, 1, 1), chunk)
    assert chunk.sequences == 4


def test_a_whole_peel_survives_a_small_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks that take five sequences at most, margins and bounds are what they are with plenty of memory."""
    path = zoo.save(zoo.build("llama"), tmp_path)
    plan = Plan(frozenset({"margin", "bounds"}), ("skip", "affine", "previous"), ((1, 4), (4, 4)))
    plenty = peel(zoo.trace_of(path), plan, itertools.count().__next__)
    real = ResidentBlock._call

    def tight(self: ResidentBlock, h: torch.Tensor, parameters: Any) -> torch.Tensor:
        if len(h) > 5:
            raise torch.OutOfMemoryError("injected")
        return real(self, h, parameters)

    monkeypatch.setattr(ResidentBlock, "_call", tight)
    trace = zoo.trace_of(path)
    tight_findings = peel(trace, plan, itertools.count().__next__)
    assert 1 <= trace.chunk.sequences <= 5
    for one, other in zip(plenty.layers, tight_findings.layers, strict=True):
        assert one.margin.value == pytest.approx(other.margin.value, abs=2e-5)
    for one, other in zip(plenty.bounds, tight_findings.bounds, strict=True):
        assert one.value.value == pytest.approx(other.value.value, abs=2e-4)
