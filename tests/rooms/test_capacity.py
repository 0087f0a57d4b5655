"""The capacity page: its law, its simulated week, and that it says what they say."""

from __future__ import annotations

import dataclasses

import pytest

from peel_agent.leases import PATIENCE
from tests.bench import capacity
from tests.bench.fleet import HOUR, Training, Week, simulate
from tests.bench.operations import TERMS, Counted, Size, fitted

SIZE = Size(width=64, blocks=4, inner=256, vocabulary=256, block=65_536, context=32, fit=256, select=32, confirm=64)
SIZES = [
    dataclasses.replace(
        SIZE, width=64 * wider, inner=256 * wider * more, block=65_536 * wider**2, blocks=blocks, fit=fit
    )
    for wider in (1, 2, 3)
    for more in (1, 2)
    for blocks in (2, 5, 9)
    for fit in (256, 700)
]


def test_the_law_finds_what_made_the_counts() -> None:
    """From counts that a known sum of terms made, the fitted law gives those of a much larger model within 1 %."""
    true = {"blocks on the whole probe": 2.0, "copies of the stream through all later blocks": 11.0}

    def counted(size: Size) -> Counted:
        return Counted(
            size, {"plan": sum(coefficient * TERMS[term](size, size.heat) for term, coefficient in true.items())}, {}
        )

    large = counted(dataclasses.replace(SIZE, width=1024, inner=4096, block=12 * 1024**2, blocks=48))
    assert fitted("plan", [counted(size) for size in SIZES], [large]).worst < 0.01


def test_the_page_says_what_the_counts_say() -> None:
    """The tables that need no simulation are those of the counts that lie beside their code."""
    page = capacity.PAGE.read_text()
    assert capacity.written(page, capacity.tables(None)) == page


def week(runs: int, peel: float) -> Week:
    """Ten runs in trouble among `runs`, four devices, a save an hour."""
    margins = [0.001 if run < 10 else 0.05 for run in range(runs)]
    trainings = [Training(str(run), "any", HOUR, peel, margin) for run, margin in enumerate(margins)]
    return simulate(trainings, 4, seconds=60 * HOUR)


def test_nothing_waits_while_devices_are_free() -> None:
    """At a third of what the devices can do every save is peeled, but those whose peel is not over at the end."""
    quiet = week(40, HOUR / 30)
    assert quiet.busy == pytest.approx(1 / 3, rel=0.1)
    assert all(len(record.waits) >= record.saves - 1 for record in quiet.records)


def test_in_a_crowd_the_worst_go_first_and_nobody_starves() -> None:
    """At three times what the devices can do, runs in trouble get nearly all of theirs; the others share the rest, each
    at least a third of an even share.
    """
    crowded = week(120, HOUR / 10)
    assert crowded.busy > 0.99
    even = crowded.decisions / len(crowded.records)
    for record in crowded.records:
        served = len(record.waits) + 1
        assert served >= even / (PATIENCE + 1)
        assert record.most_passed <= (PATIENCE + 1) * len(crowded.records)
        if capacity.is_troubled(record):
            assert record.share > 0.9
