"""The diagnosis: what is said of which layer, from a report and those before it. Reports are made by hand."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest

from peel_agent.diagnose import diagnose, lineage
from peel_agent.diagnose.signs import drop
from peel_agent.publish import headline
from peel_agent.records import (
    Change,
    CheckpointInfo,
    Estimate,
    FirstMargin,
    LayerReport,
    ModelInfo,
    PartReport,
    PeelReport,
    ProbeInfo,
    Timing,
    WorstMatrix,
)
from tests.oracles.intervals import Interval
from tests.oracles.past import drop as drop_oracle

BLOCKS, FAULTY = 6, 3
NAME = f"model.layers.{FAULTY}"
VOCABULARY = 256
GUESS = log(VOCABULARY)
"""The loss of guessing every token alike, in nats."""


def estimate(value: float, half: float = 0.002) -> Estimate:
    return Estimate(value, value - half, value + half)


def change(ratio: float, worst: float | None = None) -> Change:
    return Change(ratio, WorstMatrix("mlp.up_proj.weight", ratio if worst is None else worst))


def part(**fields: Any) -> PartReport:
    usual = {"status": "above", "margin": estimate(0.03), "change": change(1.0, 1.2), "progress": estimate(0.01)}
    return PartReport(**{**usual, **fields})


def layer(index: int, *, attention: Any = None, mlp: Any = None, **fields: Any) -> LayerReport:
    """A healthy block, but for these fields of it and of its parts."""
    healthy = LayerReport(
        index=index,
        name=f"model.layers.{index}",
        status="above",
        margin=estimate(0.06),
        best_reference="affine",
        references={},
        parts={"attention": part(**(attention or {})), "mlp": part(**(mlp or {}))},
        stream_share=0.3,
        change=change(1.0, 1.2),
        progress=estimate(0.01),
    )
    return replace(healthy, **fields)


def report(step: int, *others: LayerReport, loss: float = 2.0, first: bool = False) -> PeelReport:
    """All blocks healthy but those that are given; the `first` of a run has nothing to be compared with."""
    given = {one.index: one for one in others}
    layers = [given.get(index) or layer(index) for index in range(BLOCKS)]
    if first:
        layers = [_uncompared(one) for one in layers]
    return PeelReport(
        checkpoint=CheckpointInfo("run", step, "transformers", f"f{step}"),
        model=ModelInfo("llama", BLOCKS, 1000, "float32", vocabulary=VOCABULARY),
        probe=ProbeInfo("p", 1, 1, 1, 8),
        loss=estimate(loss),
        bound=None,
        gap=None,
        zone="undecided",
        bounds=(),
        layers=tuple(layers),
        skipped=(),
        timing=Timing(),
        since_step=None if first else step - 100,
    )


def _uncompared(block: LayerReport) -> LayerReport:
    parts = {name: replace(one, change=None, progress=None) for name, one in block.parts.items()}
    return replace(block, parts=parts, change=None, progress=None)


def told(*reports: PeelReport) -> PeelReport:
    """The last of these reports, each diagnosed beside those before it."""
    done: list[PeelReport] = []
    for one in reports:
        done.append(diagnose(one, lineage(done, one.checkpoint.step)))
    return done[-1]


def findings(diagnosed: PeelReport) -> dict[str, str]:
    """Kind by subject, of every layer and the run."""
    every = [
        finding
        for finding in (diagnosed.finding, *(block.finding for block in diagnosed.layers))
        if finding is not None
    ]
    return {finding.subject: finding.kind for finding in every}


BEFORE = (report(100, first=True), report(200), report(300))
IDLE: dict[str, Any] = {"status": "below", "margin": estimate(0.0, 0.0001)}
STILL: dict[str, Any] = {"change": change(0.0), "progress": Estimate(0.0, 0.0, 0.0)}
NEVER: dict[str, Any] = {**IDLE, **STILL, "attention": {**IDLE, **STILL}, "mlp": {**IDLE, **STILL}}
WORSE = Estimate(-0.1, -0.12, -0.08)

CASES: dict[str, tuple[tuple[PeelReport, ...], dict[str, str]]] = {
    "healthy": ((*BEFORE, report(400)), {}),
    "never trained": (
        tuple(report(step, layer(3, **NEVER), first=step == 100) for step in (100, 200, 300)),
        {NAME: "never_trained"},
    ),
    "frozen on purpose, and earning": (
        tuple(report(step, layer(3, **STILL), first=step == 100) for step in (100, 200)),
        {NAME: "frozen"},
    ),
    "frozen in the middle": ((*BEFORE, report(400, layer(3, **STILL))), {NAME: "stalled"}),
    "a tiny learning rate from the middle": ((*BEFORE, report(400, layer(3, change=change(0.02)))), {NAME: "stalled"}),
    "restored wrongly: the whole block moved": (
        (*BEFORE, report(400, layer(3, change=change(2.2)))),
        {NAME: "changed"},
    ),
    "one matrix of one part moved": (
        (*BEFORE, report(400, layer(3, change=change(1.2, 5.0), mlp={"change": change(1.5, 5.0)}))),
        {f"{NAME}/mlp": "changed"},
    ),
    "a neighbour that adapts to it is not named": (
        (*BEFORE, report(400, layer(2, change=change(1.9)), layer(3, change=change(30.0, 700.0)))),
        {NAME: "changed"},
    ),
    "what another layer's fault explains in the others": (
        (
            *BEFORE,
            report(400, layer(1, progress=WORSE), layer(2, margin=estimate(0.01)), layer(3, change=change(30.0))),
        ),
        {NAME: "changed", "model.layers.1": "victim", "model.layers.2": "victim"},
    ),
    "they adapt for one checkpoint more": (
        (*BEFORE, report(400, layer(3, change=change(30.0))), report(500, layer(1, progress=WORSE))),
        {"model.layers.1": "victim"},
    ),
    "and then no longer": (
        (*BEFORE, report(400, layer(3, change=change(30.0))), report(500), report(600, layer(1, progress=WORSE))),
        {"model.layers.1": "regressed"},
    ),
    "two blocks that were swapped are both named": (
        (*BEFORE, report(400, layer(2, change=change(5.8)), layer(3, change=change(5.3)))),
        {"model.layers.2": "changed", NAME: "changed"},
    ),
    "a block that always moves twice as far is usual": (
        (report(100, first=True), *(report(step, layer(3, change=change(2.2))) for step in (200, 300, 400))),
        {},
    ),
    "the first comparison knows nothing of what is usual": (
        (report(100, first=True), report(200, layer(3, change=change(2.0, 3.0)))),
        {},
    ),
    "got worse": ((*BEFORE, report(400, layer(3, progress=WORSE))), {NAME: "regressed"}),
    "a part got worse": ((*BEFORE, report(400, layer(3, mlp={"progress": WORSE}))), {f"{NAME}/mlp": "regressed"}),
    "worse by less than two healthy checkpoints differ": (
        (*BEFORE, report(400, layer(3, progress=Estimate(-0.004, -0.006, -0.002)))),
        {},
    ),
    "worse, as other layers seem to be": (
        (*BEFORE, report(400, *(layer(index, progress=WORSE) for index in (1, 3)))),
        {},
    ),
    "worse, and not for certain": ((*BEFORE, report(400, layer(3, progress=Estimate(-0.1, -0.3, 0.1)))), {}),
    "a dead part": (
        (*BEFORE, report(400, layer(3, mlp={**IDLE, "dead": "`mlp.up_proj.weight` is all zero"}))),
        {f"{NAME}/mlp": "dead"},
    ),
    "a part is below": ((report(400, layer(3, attention=IDLE), first=True),), {f"{NAME}/attention": "below"}),
    "a part that never earned says nothing of the block": (
        tuple(report(step, layer(3, attention=IDLE), first=step == 100) for step in (100, 200)),
        {},
    ),
    "a part that earned before is below": (
        (
            report(100, layer(3, attention={"margin": estimate(0.001, 0.0005)}), first=True),
            report(200, layer(3, attention={"status": "below", "margin": estimate(0.001, 0.0005)})),
        ),
        {f"{NAME}/attention": "below"},
    ),
    "most blocks turn undecided": (
        (*BEFORE, report(400, *(layer(index, status="undecided") for index in range(1, BLOCKS)))),
        {"run": "early"},
    ),
    "a block is below": ((report(400, layer(3, **IDLE), first=True),), {NAME: "below"}),
    "a block that earned is below": ((*BEFORE, report(400, layer(3, **IDLE))), {NAME: "dropped"}),
    "a part that is idle in most blocks says nothing of one": (
        (*BEFORE, report(400, *(layer(index, attention=IDLE) for index in range(BLOCKS)))),
        {},
    ),
    "dropped": ((*BEFORE, report(400, layer(3, margin=estimate(0.012)))), {NAME: "dropped"}),
    "a margin fell, as those of all others did": (
        (*BEFORE, report(400, *(layer(index, margin=estimate(0.012)) for index in range(BLOCKS)))),
        {},
    ),
    "dropped two checkpoints ago and not come back": (
        (*BEFORE, *(report(step, layer(3, margin=estimate(0.012))) for step in (400, 500, 600, 700))),
        {NAME: "dropped"},
    ),
    "dropped and come back": (
        (*BEFORE, report(400, layer(3, margin=estimate(0.012))), report(500, layer(3, margin=estimate(0.05)))),
        {},
    ),
    "flooded": (
        (*BEFORE, report(400, layer(3, stream_share=0.97), layer(4, **IDLE), layer(5, **IDLE))),
        {NAME: "flooding", "model.layers.4": "victim", "model.layers.5": "victim"},
    ),
    "a flood of most of the run is no collapse": (
        (*BEFORE, report(400, layer(1, stream_share=0.97), *(layer(index, **IDLE) for index in range(2, BLOCKS)))),
        {"model.layers.1": "flooding", **{f"model.layers.{index}": "victim" for index in range(2, BLOCKS)}},
    ),
    "a large share whose later blocks earn is no flood": ((*BEFORE, report(400, layer(3, stream_share=0.97))), {}),
    "the first block's share is always large": (
        (report(400, layer(0, stream_share=0.99), *(layer(index, **IDLE) for index in (1, 2)), first=True),),
        {"model.layers.1": "below", "model.layers.2": "below"},
    ),
    "worse than guessing: another tokenizer's probe": (
        (report(100, layer(3, **IDLE), loss=7.2, first=True), report(200, layer(3, **IDLE), loss=7.3)),
        {"run": "early"},
    ),
    "worse than guessing, and it was better: the run's affair": (
        (*BEFORE, report(400, layer(3, **IDLE), loss=7.2)),
        {"run": "diverged"},
    ),
    "as good as guessing, as far as is known": (
        (report(100, layer(3, **IDLE), loss=GUESS + 0.001, first=True),),
        {NAME: "below"},
    ),
    "worse than guessing, with a flood": (
        (report(100, layer(3, stream_share=0.97), layer(4, **IDLE), layer(5, **IDLE), loss=7.2, first=True),),
        {"run": "early"},
    ),
    "worse than guessing, and one layer stands out": (
        (report(100, loss=7.2, first=True), report(200, layer(3, change=change(30.0)), loss=7.2)),
        {"run": "early", NAME: "changed"},
    ),
    "early": ((report(100, *(layer(index, **IDLE) for index in range(1, BLOCKS)), first=True),), {"run": "early"}),
    "early while most are open": (
        (report(100, *(layer(index, status="undecided") for index in range(2, BLOCKS)), first=True),),
        {"run": "early"},
    ),
    "collapsed": ((*BEFORE, report(400, *(layer(index, **IDLE) for index in range(1, BLOCKS)))), {"run": "collapsed"}),
    "diverged: the loss rose, and every layer moves oddly": (
        (*BEFORE, report(400, *(layer(index, change=change(1.0, 2.6)) for index in (0, 2)), loss=2.5)),
        {"run": "diverged"},
    ),
    "the loss rose, and one layer stands out": (
        (*BEFORE, report(400, layer(3, change=change(20.0)), loss=2.5)),
        {NAME: "changed"},
    ),
    "and at the next checkpoint its fault is healing": (
        (*BEFORE, report(400, layer(3, change=change(20.0)), loss=2.5), report(500, loss=2.3)),
        {},
    ),
    "a run that collapsed, and the layer that did it": (
        (
            *BEFORE,
            report(400, layer(3, change=change(30.0), **IDLE), *(layer(index, **IDLE) for index in (1, 2, 4, 5))),
        ),
        {"run": "collapsed", NAME: "changed"},
    ),
    "improvable while the loss is flat": (
        (*BEFORE, report(400, layer(3, headroom=estimate(0.03)))),
        {NAME: "improvable"},
    ),
    "headroom in a run that still learns": (
        (report(100, first=True, loss=3.0), report(200, loss=2.5), report(300, layer(3, headroom=estimate(0.03)))),
        {},
    ),
    "headroom far above the block's own before": (
        (
            report(100, layer(3, headroom=estimate(0.01)), first=True, loss=3.0),
            report(200, layer(3, headroom=estimate(0.05)), loss=2.5),
        ),
        {NAME: "improvable"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_said(case: tuple[tuple[PeelReport, ...], dict[str, str]]) -> None:
    """A run of these reports ends with exactly these findings."""
    reports, expected = case
    assert findings(told(*reports)) == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_findings_can_be_read_alone(case: tuple[tuple[PeelReport, ...], dict[str, str]]) -> None:
    """Each finding names its subject in words, has no number that is not one, and an accusing one has causes."""
    diagnosed = told(*case[0])
    for finding in (diagnosed.finding, *(one.finding for one in diagnosed.layers)):
        if finding is None:
            continue
        assert finding.subject == "run" or finding.subject.partition("/")[0] in finding.words
        assert all(number == number for number in finding.evidence.values())
        assert finding.causes or finding.kind == "victim"


def test_a_finding_says_since_when() -> None:
    """What happened between two checkpoints is dated by the first of the two; what lasts keeps its date."""
    dropped = [report(step, layer(3, margin=estimate(0.012))) for step in (400, 500, 600)]
    stalled = [report(step, layer(3, **STILL)) for step in (400, 500, 600)]
    for later in (dropped, stalled):
        finding = told(*BEFORE, *later).layers[3].finding
        assert finding is not None
        assert finding.since_step == 300


def test_what_is_frozen_on_purpose_is_told_once() -> None:
    """The headline says it at the first checkpoint that shows it; later ones keep it in the table, with that step."""
    reports = [report(step, layer(3, **STILL), first=step == 100) for step in (100, 200, 300)]
    first, second = told(*reports[:2]), told(*reports)
    assert "does not learn" in headline(first)
    assert "does not learn" not in headline(second)
    assert second.layers[3].finding is not None
    assert (second.layers[3].finding.kind, second.layers[3].finding.since_step) == ("frozen", 200)


def test_another_probe_or_model_is_no_past() -> None:
    """Margins of another probe, or of another model in the same folder, are not what a margin dropped from."""
    now = report(400, layer(3, margin=estimate(0.012)))
    other_probe = [replace(one, probe=replace(one.probe, fingerprint="other")) for one in BEFORE]
    other_model = [replace(one, model=replace(one.model, parameters=7)) for one in BEFORE]
    assert findings(told(*BEFORE, now)) == {NAME: "dropped"}
    assert findings(told(*other_probe, now)) == {}
    assert findings(told(*other_model, now)) == {}


def test_the_line_that_leads_to_a_step() -> None:
    """After a roll-back the abandoned steps are no past; a step is not its own past; one without a step is left out."""
    steps = [100, 200, 300, 400, 200, 300]
    reports = [report(step) for step in steps]
    exported = replace(reports[0], checkpoint=replace(reports[0].checkpoint, step=None))
    line = [one.checkpoint.step for one in lineage([*reports, exported], 400)]
    assert line == [100, 200, 300]
    assert lineage(reports, None) == ()


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ((0.011, 0.009, 0.013), [(0.054, 0.05, 0.058)]),
        ((0.011, 0.009, 0.013), [(0.06, 0.05, 0.07), (0.05, 0.045, 0.055), (0.055, 0.05, 0.06)]),
        ((0.06, 0.05, 0.07), [(0.054, 0.05, 0.058)]),
        ((0.0, -0.1, 0.1), [(-0.01, -0.02, 0.0)]),
        ((0.0, -0.1, 0.1), []),
    ],
)
def test_drop_is_the_oracles(now: tuple[float, ...], before: list[tuple[float, ...]]) -> None:
    """The certain fall of a margin as a fraction of what it was, to 1e-12; None where there is nothing to fall from."""
    ours = drop(Estimate(*now), [Estimate(*one) for one in before])
    theirs = drop_oracle(Interval(*now), [Interval(*one) for one in before])
    assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-12))


@pytest.mark.parametrize(
    ("tokens_before", "tokens_now", "margin_now", "dropped"),
    [
        pytest.param(None, 64, 0.01, False, id="cuts came only now"),
        pytest.param(64, None, 0.01, False, id="cuts came before"),
        pytest.param(64, 128, 0.01, False, id="longer cuts"),
        pytest.param(64, 64, 0.01, True, id="the same cuts"),
        pytest.param(64, 64, 0.06, False, id="the same cuts, and only whole sequences give less"),
    ],
)
def test_another_way_of_measuring_is_no_drop(
    tokens_before: int | None, tokens_now: int | None, margin_now: float, dropped: bool
) -> None:
    """A margin is held against earlier ones on the same tokens only, whatever is published beside it."""

    def reported(step: int, tokens: int | None, margin: float) -> PeelReport:
        first = None if tokens is None else FirstMargin(tokens, estimate(margin))
        margin_of_block = 0.06 if step < 300 else 0.01
        return report(step, layer(2, margin=estimate(margin_of_block), first=first), first=step == 100)

    before = [reported(step, tokens_before, 0.06) for step in (100, 200)]
    diagnosed = told(*before, reported(300, tokens_now, margin_now))
    assert ("dropped" in findings(diagnosed).values()) == dropped
