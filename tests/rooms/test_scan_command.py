"""The conditions of `scan --fail-on`, on reports alone."""

from __future__ import annotations

import dataclasses

import pytest

from peel_agent.cli.scan import meets
from peel_agent.records import Estimate, Finding, LayerReport, PeelReport, Status
from tests.rooms.test_publish_form import FULL


def report(*statuses: Status, run: Finding | None = None) -> PeelReport:
    layers = tuple(
        LayerReport(index, f"model.layers.{index}", status, Estimate(0.0, -0.1, 0.1), "skip", {}, {}, 0.1)
        for index, status in enumerate(statuses)
    )
    return dataclasses.replace(FULL, layers=layers, finding=run)


EARLY = Finding("early", "run", "only 1 of 3 blocks certainly do more than a cheap stand-in would")
COLLAPSED = Finding("collapsed", "run", "only 1 of 3 blocks certainly do more than a cheap stand-in would")


@pytest.mark.parametrize(
    ("scanned", "met"),
    [
        (report("above", "undecided", "undecided", run=EARLY), False),
        (report("not_measured", "undecided", "undecided", run=EARLY), False),
        (report("not_measured", "not_measured", "not_measured"), False),
        (report("above", "below", "undecided", run=EARLY), True),
        (report("above", "below", "below", run=COLLAPSED), True),
    ],
)
def test_fail_on_below_needs_a_block_that_is_below(scanned: PeelReport, met: bool) -> None:
    """A run that is early because most blocks are undecided does not fail; one with a block certainly below does."""
    assert meets(scanned, "below") == met
