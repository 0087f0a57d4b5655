"""Progress: a bar on a terminal, sparse lines elsewhere, and an estimate that is one."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_bar_is_redrawn_and_cleared(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal each step redraws the same line, which is shorter than the terminal, and nothing of it stays.

    Half of the bar stands for half of the work. The cursor is never hidden, which a killed process would leave so.
    """
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    written = list[str]()
    meter = Meter(written.append, itertools.count().__next__, terminal=True)
    for done in range(3):
        meter("blocks", done, 2)
    meter.close()
    assert all(text.startswith("\r") and text.endswith("\x1b[K") and "\n" not in text for text in written)
    shown = [text.removeprefix("\r").removesuffix("\x1b[K") for text in written]
    assert all(len(text) < width and "\x1b" not in text for text in shown)
    assert shown[-1] == ""
    if width >= 40:
        empty, half, full = (text.count("━") + text.count("╸") / 2 for text in shown[:3])
        assert empty == 0
        assert half == pytest.approx(full / 2, abs=0.5)
        assert "blocks: 1 of 2" in shown[1]
        assert "1 s left" in shown[1]


def test_a_bar_is_not_redrawn_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of a thousand pieces in a second is drawn some ten times, its beginning and its end among them."""
    monkeypatch.setenv("COLUMNS", "80")
    clock, written = [0.0], list[str]()
    meter = Meter(written.append, lambda: clock[0], terminal=True)
    for done in range(1001):
        clock[0] = done / 1000
        meter("weights", done, 1000)
    assert 5 < len(written) < 15
    assert "0 of 1000" in written[0]
    assert "1000 of 1000" in written[-1]


@pytest.mark.parametrize(
    ("is_terminal", "term", "bars"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_bars_are_for_terminals_alone(
    is_terminal: bool, term: str, bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe, and a terminal that cannot write over a line, get lines without codes."""
    monkeypatch.setenv("TERM", term)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    meter = Meter.on(stream, itertools.count(0, 40).__next__)
    meter("blocks", 1, 2)
    meter.close()
    assert ("\r" in stream.getvalue()) == bars
    assert ("\n" in stream.getvalue()) != bars


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
