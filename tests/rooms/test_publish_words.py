"""The publish room's words: one line for the log, a table for a terminal."""

from __future__ import annotations

import dataclasses
from itertools import takewhile
from typing import get_args

import pytest

from peel_agent.publish import headline, plain_text, report_sheet
from peel_agent.records import (
    ACCUSING,
    BoundReport,
    Change,
    Estimate,
    Finding,
    FindingKind,
    LayerReport,
    PartReport,
    PeelReport,
    Zone,
)
from tests.rooms.test_publish_form import FULL

BLOCK = "model.layers.3"
HEADER = ("block", "status", "margin", "stand-in", "attention", "mlp", "share", "change", "progress", "finding")


def layer(index: int, finding: Finding | None = None, **fields: object) -> LayerReport:
    parts = {"attention": PartReport("above", None), "mlp": PartReport("not_measured", None)}
    margin = Estimate(0.05, 0.04, 0.06)
    one = LayerReport(index, f"model.layers.{index}", "above", margin, "previous", {}, parts, 0.25, finding=finding)
    return dataclasses.replace(one, **fields)


def report(*layers: LayerReport, finding: Finding | None = None) -> PeelReport:
    nothing = {"bounds": (), "bound": None, "gap": None, "redundancy": None, "skipped": (), "alerts": ()}
    return dataclasses.replace(FULL, layers=layers, finding=finding, **nothing)


def table(one: PeelReport) -> str:
    """What a pipe gets."""
    return plain_text(report_sheet(one))


def finding_of(kind: FindingKind, subject: str = BLOCK) -> Finding:
    return Finding(kind, subject, f"{subject} is {kind}", {}, ("a script wrote into it", "a bad restore"))


def rows(text: str) -> dict[str, dict[str, str]]:
    """The table's cells by block and column, cut where the header's columns begin."""
    lines = text.splitlines()
    (header,) = [line for line in lines if line.startswith("block ")]
    starts = [header.index(name) for name in HEADER]
    ends = [*starts[1:], 200]
    cells = [
        [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        for line in takewhile(bool, lines[lines.index(header) + 1 :])
    ]
    return {row[0]: dict(zip(HEADER, row, strict=True)) for row in cells}


def test_the_table_has_a_column_for_everything_of_a_block() -> None:
    """Change, progress and finding stand beside margin and parts; what was not measured is a dash, no finding is blank.

    The widest numbers keep to their columns.
    """
    widest = layer(
        3,
        finding_of("never_trained", f"{BLOCK}/attention"),
        status="not_measured",
        margin=Estimate(-0.0176, -0.0754, -0.0427),
        change=Change(123.456),
        progress=Estimate(-0.0301, -0.05, -0.01),
    )
    bare = layer(4, margin=None, best_reference=None, parts={}, change=Change(0.0))
    shown = rows(table(report(widest, bare)))
    assert shown == {
        BLOCK: {
            "block": BLOCK,
            "status": "not_measured",
            "margin": "-0.0176 [-0.0754, -0.0427]",
            "stand-in": "previous",
            "attention": "above",
            "mlp": "not_measured",
            "share": "0.250",
            "change": "123.46",
            "progress": "-0.0301",
            "finding": "never trained (attention)",
        },
        "model.layers.4": {
            "block": "model.layers.4",
            "status": "above",
            "margin": "-",
            "stand-in": "-",
            "attention": "-",
            "mlp": "-",
            "share": "0.250",
            "change": "0.00",
            "progress": "-",
            "finding": "",
        },
    }


def test_findings_are_told_in_sentences_with_their_causes() -> None:
    """Under the blocks each finding is a sentence with its likely causes, what is said of the run first."""
    run = Finding("collapsed", "run", "all blocks are idle", {}, ("the run diverged",))
    lines = table(report(layer(2), layer(3, finding_of("changed", f"{BLOCK}/mlp")), finding=run)).splitlines()
    start = lines.index("run: all blocks are idle")
    assert lines[start : start + 6] == [
        "run: all blocks are idle",
        "  perhaps the run diverged",
        "",
        f"{BLOCK}/mlp is changed",
        "  perhaps a script wrote into it",
        "  perhaps a bad restore",
    ]
    assert "perhaps" not in table(report(layer(2), layer(3)))


@pytest.mark.parametrize("kind", get_args(FindingKind))
def test_the_headline_is_made_of_findings(kind: FindingKind) -> None:
    """It names every layer that something is wrong with; a victim, and one frozen on purpose, are not accused.

    What is frozen is told all the same, without a step since when: at the first checkpoint that shows it.
    """
    line = headline(report(layer(2), layer(3, finding_of(kind))))
    harmless = kind in ("victim", "frozen", "early", "collapsed", "diverged")
    assert (kind in ACCUSING) != harmless
    assert (f"{BLOCK} is {kind}" in line) == (
        not harmless or (kind == "frozen" and finding_of(kind).since_step is None)
    )
    assert ("nothing found in any layer" in line) == harmless


def test_the_headline_of_a_run_says_that_alone() -> None:
    """An early run is one statement: no layer is said to be in order, and none is accused."""
    run = Finding("early", "run", "3 of 4 blocks earn no more than a cheap stand-in: the run is early")
    assert headline(report(layer(2), finding=run)) == f"step 800; loss 1.6700; {run.words}"


def test_the_headline_counts_what_is_undecided() -> None:
    """Undecided blocks are counted apart from those not measured; without layers nothing is said of them."""
    statuses = ("undecided", "not_measured", "undecided", "above")
    line = headline(report(*(layer(index, status=status) for index, status in enumerate(statuses))))
    assert line == "step 800; loss 1.6700; nothing found in any layer; 2 undecided; 1 not measured"
    assert headline(report()) == "step 800; loss 1.6700"


WON = {"headroom": Estimate(0.05, 0.04, 0.06)}
MOVED = {"change": Change(1.0)}


@pytest.mark.parametrize(
    ("fields", "since_step", "expected"),
    [
        ({}, None, "margins not measured"),
        (WON, None, "margins not measured"),
        (WON | MOVED, 600, "nothing found in any layer; margins and progress not measured"),
        (MOVED | {"progress": Estimate(0.1, 0.0, 0.2)}, 600, "nothing found in any layer; margins not measured"),
        (WON | {"finding": finding_of("improvable")}, None, f"{BLOCK} is improvable; margins not measured"),
    ],
)
def test_the_headline_says_what_was_not_measured(
    fields: dict[str, object], since_step: int | None, expected: str
) -> None:
    """No margin at all is said in words, with the progress that goes with margins; nothing is called undecided."""
    layers = [layer(index, status="not_measured", margin=None, **fields) for index in (2, 3)]
    if "finding" in fields:
        layers[0] = dataclasses.replace(layers[0], finding=None)
    one = dataclasses.replace(report(*layers), since_step=since_step)
    assert headline(one) == f"step 800; loss 1.6700; {expected}"
    assert "undecided" not in table(one)


def test_a_hint_is_told_in_the_headline_and_under_the_table() -> None:
    """What would tell more of an undecided block stands beside the count of them, and below the blocks."""
    hint = f"{BLOCK} earns far less than the other blocks"
    one = report(layer(2), layer(3, status="undecided", hint=hint))
    assert headline(one) == f"step 800; loss 1.6700; nothing found in any layer; 1 undecided; {hint}"
    assert hint in table(one).splitlines()


@pytest.mark.parametrize(
    ("label", "zone", "words"),
    [
        ("head", "caution", "(caution: the head's, not the layers')"),
        ("1-4", "caution", "(caution)"),
        (None, "caution", "(caution)"),
        ("head", "effective", "(effective)"),
    ],
)
def test_a_gap_is_the_heads_when_the_head_is_the_winner(label: str | None, zone: Zone, words: str) -> None:
    """Whose the gap is goes by the winner's label: equal losses of other constructions say nothing of it."""
    head = BoundReport("head", (1, 2), "closed_form", Estimate(1.5, 1.4, 1.6), 1.5, within_class=True)
    one = dataclasses.replace(FULL, layers=(), finding=None, bounds=(head,), bound_label=label, zone=zone)
    assert words in headline(one)
    assert one.bound is not None
    assert one.bound.value == head.best


def test_the_table_names_the_winner() -> None:
    """Under the maps stands which of them the bound is the loss of, and the step that it was built at."""
    lines = table(dataclasses.replace(FULL, bound_label="1-4", bound_step=600)).splitlines()
    assert "  the bound is 1-4, built at step 600: it has the least loss on the select sequences" in lines
