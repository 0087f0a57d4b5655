"""Progress: a bar on a terminal, sparse lines elsewhere, and an estimate that is one."""

from __future__ import annotations

import itertools
from pathlib import Path

from peel_agent.peel import peel
from peel_agent.publish import Meter
from peel_agent.records import Plan
from tests import zoo


def test_lines_are_sparse_and_estimate_what_is_left() -> None:
    """Away from a terminal a line comes at most every 30 s; half way after 40 s means 40 s left."""
    clock, written = [0.0], list[str]()
    meter = Meter(written.append, lambda: clock[0], terminal=False)
    for done in range(9):
        clock[0] = 10.0 * done
        meter("blocks", done, 8)
    meter.close()
    assert written == ["blocks: 3 of 8, about 50 s left\n", "blocks: 6 of 8, about 20 s left\n"]


def test_a_bar_is_redrawn_and_cleared() -> None:
    """On a terminal each step redraws the same line, and nothing of it stays."""
    written = list[str]()
    meter = Meter(written.append, itertools.count().__next__, terminal=True)
    meter("blocks", 1, 2)
    meter("blocks", 2, 2)
    meter.close()
    assert all(text.startswith("\r") and "\n" not in text for text in written)
    assert written[0].count("#") == written[0].count(".") == 12
    assert written[-1] == "\r\x1b[K"


def test_a_peel_tells_every_stage_to_its_end(tmp_path: Path) -> None:
    """Each stage begins at 0 and ends complete; between them it may be told again that it goes on."""
    told: dict[str, list[int]] = {}
    totals: dict[str, int] = {}

    def listen(stage: str, done: int, total: int) -> None:
        told.setdefault(stage, []).append(done)
        totals[stage] = total

    plan = Plan(frozenset({"margin", "bounds"}), ("skip", "affine"), "ends")
    trace = zoo.trace_of(zoo.save(zoo.build("llama", steps=5), tmp_path), zoo.probe(select=10, confirm=40))
    peel(trace, plan, itertools.count().__next__, progress=listen)
    assert {"blocks", "bounds, maps"} <= set(told)
    for stage, done in told.items():
        assert [number for number, _ in itertools.groupby(done)] == list(range(totals[stage] + 1)), stage
