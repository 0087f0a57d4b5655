"""The judge room: rules, states and notices, one letter a checkpoint (b below, a above, u undecided, - missing)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peel_agent.diagnose import diagnose
from peel_agent.judge import LAYER_GONE, RULE_GONE, judge, withdrawn
from peel_agent.notify import tell
from peel_agent.records import (
    CHECKPOINTS,
    Change,
    CheckpointInfo,
    Estimate,
    Finding,
    FindingKind,
    LayerReport,
    ModelInfo,
    Moment,
    Notice,
    PartReport,
    PeelReport,
    ProbeInfo,
    ReportObservation,
    Rule,
    RuleKind,
    RuleState,
    Timing,
    Verdict,
)

STATUS = {"b": "below", "a": "above", "u": "undecided"}
BLOCK = "model.layers.3"


def layer(index: int, letter: str, margin: float | None = 0.0) -> LayerReport:
    """A block whose report has a finding where its letter is b."""
    name = f"model.layers.{index}"
    words = f"{name} does hardly anything"
    return LayerReport(
        index=index,
        name=name,
        status=STATUS[letter],
        margin=None if margin is None else Estimate(margin, margin - 0.0002, margin + 0.0002),
        best_reference="skip",
        references={"skip": 0.0},
        parts={},
        stream_share=0.1,
        finding=Finding("below", name, words, {}, ("it does nothing yet",), 17) if letter == "b" else None,
    )


def report(step: int | None, *layers: LayerReport, fingerprint: str = "f") -> PeelReport:
    one = Estimate(1.0, 0.9, 1.1)
    return PeelReport(
        checkpoint=CheckpointInfo("ckpt", step, "transformers", fingerprint),
        model=ModelInfo("llama", len(layers), 1000, "full"),
        probe=ProbeInfo("p", 100, 10, 10, 10),
        loss=one,
        bound=None,
        gap=None,
        zone="undecided",
        bounds=(),
        layers=layers,
        skipped=(),
        timing=Timing(),
    )


def judged(seen: PeelReport, rules: Sequence[Rule], states: Sequence[RuleState]) -> Verdict:
    """One report judged, and told of at its step."""
    after = judge(ReportObservation(seen), rules, states)
    return tell(after, rules, (), Moment(0.0, seen.checkpoint.step, is_checkpoint=True), run="mine")


def core(state: RuleState) -> tuple[str, str, str, int, int | None]:
    """What counts of a state, without its words."""
    return (state.rule, state.subject, state.phase, state.streak, state.since_step)


def judge_history(
    history: str, rule: Rule, states: tuple[RuleState, ...] = (), first_step: int = 100
) -> tuple[list[Notice], tuple[RuleState, ...]]:
    """Block 3 through one checkpoint a letter, at steps 100, 200, ..., with the verdict's states handed on."""
    notices: list[Notice] = []
    for step, letter in enumerate(history):
        layers = () if letter == "-" else (layer(3, letter),)
        verdict = judged(report(first_step + 100 * step, *layers), [rule], states)
        states = verdict.states
        notices.extend(verdict.notices)
    return notices, states


def rule(for_checkpoints: int = 2, clear_checkpoints: int = 2, after_step: int = 0) -> Rule:
    return Rule("layer_below", "layer_below", for_checkpoints, clear_checkpoints, after_step, "critical")


CASES = {
    "two in a row fire": ("bb", rule(), ["firing 200"], "firing", 0, 100),
    "one alone is pending": ("b", rule(), [], "pending", 1, 100),
    "one contrary checkpoint ends pending": ("bab", rule(), [], "pending", 1, 300),
    "for_checkpoints=1 fires at once": ("b", rule(1), ["firing 100"], "firing", 0, 100),
    "three in a row when three are asked for": ("bbabbb", rule(3), ["firing 600"], "firing", 0, 400),
    "an alert fires once however long it lasts": ("bbbbb", rule(), ["firing 200"], "firing", 0, 100),
    "undecided neither raises nor breaks the streak": ("buub", rule(), ["firing 400"], "firing", 0, 100),
    "a missing layer neither raises nor breaks": ("b--b", rule(), ["firing 400"], "firing", 0, 100),
    "undecided alone never raises": ("uuuu", rule(1), [], "inactive", 0, None),
    "above never raises": ("aaa", rule(1), [], "inactive", 0, None),
    "two above in a row clear": ("bbaa", rule(), ["firing 200", "resolved 400"], "inactive", 0, None),
    "one above does not clear": ("bba", rule(), ["firing 200"], "firing", 1, 100),
    "below between two above starts the clearing again": (
        "bbabaa",
        rule(),
        ["firing 200", "resolved 600"],
        "inactive",
        0,
        None,
    ),
    "undecided and missing do not clear": ("bbu-u-", rule(), ["firing 200"], "firing", 0, 100),
    "undecided does not break the clearing": ("bbaua", rule(), ["firing 200", "resolved 500"], "inactive", 0, None),
    "clear_checkpoints=1 clears at once": ("bba", rule(2, 1), ["firing 200", "resolved 300"], "inactive", 0, None),
    "an alert may come back": ("bbaabb", rule(), ["firing 200", "resolved 400", "firing 600"], "firing", 0, 500),
    "before after_step nothing is raised": ("bbbb", rule(after_step=300), ["firing 400"], "firing", 0, 300),
    "after_step itself counts": ("bb", rule(after_step=100), ["firing 200"], "firing", 0, 100),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_history_yields_notices_and_state(case: tuple) -> None:
    """A history of one block under one rule yields these notices at these steps, and leaves this state."""
    history, given_rule, expected, phase, streak, since = case
    notices, states = judge_history(history, given_rule)
    assert [f"{notice.state} {notice.step}" for notice in notices] == expected
    if set(history) != {"-"}:
        assert [core(state) for state in states] == [("layer_below", BLOCK, phase, streak, since)]


def test_a_checkpoint_before_after_step_does_not_clear() -> None:
    """A rewound training (step below after_step again) leaves a firing alert as it is."""
    _, firing = judge_history("bb", rule(after_step=300), first_step=300)
    notices, states = judge_history("aaa", rule(after_step=10_000), firing)
    assert notices == []
    assert [core(state) for state in states] == [core(state) for state in firing]


def test_layers_and_rules_are_judged_apart() -> None:
    """Each (rule, subject) has its own state: one layer's `above` never clears another's alert."""
    rules = [Rule("quick", "layer_below", 1), Rule("slow", "layer_below", 2)]
    first = judged(report(100, layer(2, "b"), layer(3, "a")), rules, ())
    second = judged(report(200, layer(2, "b"), layer(3, "b")), rules, first.states)
    assert [(notice.rule, notice.subject) for notice in first.notices] == [("quick", "model.layers.2")]
    assert [(notice.rule, notice.subject) for notice in second.notices] == [
        ("quick", "model.layers.3"),
        ("slow", "model.layers.2"),
    ]
    assert {(state.rule, state.subject, state.phase) for state in second.states} == {
        ("quick", "model.layers.2", "firing"),
        ("quick", "model.layers.3", "firing"),
        ("slow", "model.layers.2", "firing"),
        ("slow", "model.layers.3", "pending"),
    }
    assert len(second.firing) == 3


def test_states_of_a_rule_that_is_gone_are_dropped() -> None:
    """A rule taken out of the configuration leaves no state behind that would fire for ever."""
    _, states = judge_history("bb", rule())
    assert judged(report(300, layer(3, "b")), [], states).states == ()


def test_the_notice_says_what_was_found_how_long_and_since_when() -> None:
    """A firing notice has the finding's words and causes, the checkpoints in a row, and the step at which it began."""
    at = [report(step, layer(1, "a", 0.06), layer(2, "a", 0.1024), layer(3, "b", 0.0)) for step in (400, 600)]
    first = judged(at[0], [rule()], ())
    (notice,) = judged(at[1], [rule()], first.states).notices
    assert notice.text == ("model.layers.3 does hardly anything, for 2 checkpoints in a row (since step 400)")
    assert (notice.rule, notice.subject, notice.step, notice.severity) == ("layer_below", BLOCK, 600, "critical")
    assert (notice.since_step, notice.causes) == (400, ("it does nothing yet",))


def test_the_text_says_what_was_measured_in_a_trainers_words() -> None:
    """The notice of a diagnosed report names the block, and what it and its neighbours are worth in loss."""
    at = [report(step, layer(1, "a", 0.06), layer(2, "a", 0.1024), layer(3, "b", 0.0)) for step in (400, 600)]
    states: tuple[RuleState, ...] = ()
    for one in at:
        verdict = judged(diagnose(one, ()), [rule()], states)
        states = verdict.states
    (notice,) = verdict.notices
    assert notice.text.startswith("model.layers.3 does hardly anything")
    assert "0.0000 [-0.0002, 0.0002] nats/token" in notice.text
    assert "for the other blocks by 0.0812" in notice.text
    assert notice.text.endswith(", for 2 checkpoints in a row (since step 400)")
    (alone,) = judged(diagnose(report(400, layer(2, "a"), layer(3, "b")), ()), [rule(1)], ()).notices
    assert alone.text.endswith("blocks by 0.0000")  # one checkpoint is no row, and its step is the notice's own


def test_the_text_of_a_resolved_alert_says_since_when_it_fired() -> None:
    """A resolved notice says how long nothing was seen, and the step at which its alert began; it needs no causes."""
    *_, resolved = judge_history("bbaa", rule())[0]
    assert resolved.state == "resolved"
    assert resolved.text == (
        "model.layers.3 certainly does more than a cheap stand-in would, for 2 checkpoints in a row "
        "(resolved; it had fired since step 100, for 300 steps)"
    )
    assert (resolved.since_step, resolved.causes) == (100, ())


def test_without_a_step_a_notice_says_none() -> None:
    """A checkpoint that names no step gives a notice whose words claim none."""
    (notice,) = judged(report(None, layer(3, "b", None)), [rule(1)], ()).notices
    assert notice.text == "model.layers.3 does hardly anything"
    assert (notice.step, notice.since_step) == (None, None)


def test_notice_ids_are_the_alerts_own() -> None:
    """An id depends on rule, subject, state and the step it began, not on when it was confirmed or what was found."""
    (one,) = judge_history("bb", rule())[0]
    (same,) = judge_history("buub", rule())[0]
    (later,) = judge_history("bb", rule(), first_step=200)[0]
    resolved = judge_history("bbaa", rule())[0][1]
    (other_rule,) = judge_history("bb", Rule("other", "layer_below"))[0]
    assert one.id == same.id
    assert len({one.id, later.id, resolved.id, other_rule.id}) == 4
    assert one.id == "3bf36640923f78e4"  # across restarts and versions: sinks remember it


def test_without_steps_two_alerts_of_a_layer_have_two_ids() -> None:
    """Checkpoints that name no step are told apart by their fingerprints."""
    ids, states = [], ()
    for number, letter in enumerate("bab"):
        verdict = judged(report(None, layer(3, letter), fingerprint=f"f{number}"), [rule(1, 1)], states)
        states = verdict.states
        ids += [notice.id for notice in verdict.notices]
    assert len(set(ids)) == 3


ONE = Estimate(0.2, 0.1, 0.3)
SUBJECTS = (BLOCK, f"{BLOCK}/attention", f"{BLOCK}/mlp")
READ_BY: dict[RuleKind, tuple[FindingKind, ...]] = {
    "layer_below": ("below", "never_trained", "dead"),
    "layer_changed": ("changed",),
    "layer_regressed": ("regressed",),
    "layer_dropped": ("dropped",),
    "layer_stalled": ("stalled",),
    "layer_flooding": ("flooding",),
    "layer_improvable": ("improvable",),
}
MEASURED = {
    "layer_below": "status",
    "layer_changed": "change",
    "layer_regressed": "progress",
    "layer_dropped": "margin",
    "layer_stalled": "change",
    "layer_flooding": "margin",
    "layer_improvable": "headroom",
}
"""What a place without a finding must have been measured for, that it speaks against an alert of each kind."""


def measured(finding: Finding | None = None, status: str = "above") -> LayerReport:
    """Block 3 with everything measured of it and of its parts."""
    part = PartReport(status, ONE, ONE, Change(1.0), ONE)
    parts = {"attention": part, "mlp": part}
    return LayerReport(3, BLOCK, status, ONE, "skip", {}, parts, 0.1, ONE, None, None, Change(1.0), ONE, finding)


def finding_of(kind: FindingKind, subject: str) -> Finding:
    return Finding(kind, subject, f"{subject} is {kind}", {}, (f"why {kind}",), 300)


def spoken(kind: RuleKind, block: LayerReport) -> dict[str, str]:
    """What this block's report says about the block and each part of it, by what it does to an alert of this kind."""
    at_once = Rule("r", kind, 1, 1)
    calm, firing = (
        tuple(RuleState("r", subject, phase, 0, 100, told=phase == "firing") for subject in SUBJECTS)
        for phase in ("inactive", "firing")
    )
    raised = {notice.subject for notice in judged(report(400, block), [at_once], calm).notices}
    cleared = {notice.subject for notice in judged(report(400, block), [at_once], firing).notices}
    assert not raised & cleared
    return {
        subject: "for" if subject in raised else "against" if subject in cleared else "neither" for subject in SUBJECTS
    }


def test_the_table_knows_every_kind() -> None:
    """A new rule kind has a place in the tables here, and a number of checkpoints of its own."""
    assert set(CHECKPOINTS) == set(get_args(RuleKind))
    assert set(READ_BY) == set(MEASURED) == {kind for kind in CHECKPOINTS if kind.startswith("layer_")}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize(("kind", "finding"), [(kind, one) for kind, kinds in READ_BY.items() for one in kinds])
def test_a_finding_speaks_for_its_own_subject(kind: RuleKind, finding: FindingKind, subject: str) -> None:
    """A finding speaks for an alert of the kind that reads it, about the block or the part that it names alone."""
    status = "below" if kind == "layer_below" else "above"
    heard = spoken(kind, measured(finding_of(finding, subject), status))
    others = "neither" if kind == "layer_below" else "against"  # a block that is below is no proof that its parts earn
    assert heard == dict.fromkeys(SUBJECTS, others) | {subject: "for"}


@pytest.mark.parametrize("kind", READ_BY)
def test_no_finding_where_it_was_looked_for_speaks_against(kind: RuleKind) -> None:
    """With everything measured and nothing found, block and parts speak against an alert of any kind."""
    assert spoken(kind, measured()) == dict.fromkeys(SUBJECTS, "against")


@pytest.mark.parametrize("place", ["block", "mlp"])
@pytest.mark.parametrize(
    ("kind", "what", "value"),
    [
        *((kind, what, None) for kind, what in MEASURED.items() if what != "status"),
        *(("layer_below", "status", status) for status in ("below", "undecided", "not_measured")),
    ],
)
def test_what_was_not_measured_speaks_neither(kind: RuleKind, what: str, value: str | None, place: str) -> None:
    """A block, or a part, without the number that a kind goes by says nothing, however much else was measured.

    So does one that is below and has no finding: the run is early.
    """
    block = measured()
    if place == "block":
        block, silent = dataclasses.replace(block, **{what: value}), BLOCK
    else:
        parts = {**block.parts, "mlp": dataclasses.replace(block.parts["mlp"], **{what: value})}
        block, silent = dataclasses.replace(block, parts=parts), f"{BLOCK}/mlp"
    assert spoken(kind, block) == dict.fromkeys(SUBJECTS, "against") | {silent: "neither"}


@pytest.mark.parametrize("kind", READ_BY)
@pytest.mark.parametrize("status", ["above", "below"])
def test_a_victim_speaks_neither(kind: RuleKind, status: str) -> None:
    """What a flooded stream explains neither raises nor clears an alert of any kind, of the block or of a part."""
    heard = spoken(kind, measured(finding_of("victim", BLOCK), status))
    assert heard == dict.fromkeys(SUBJECTS, "neither")


@pytest.mark.parametrize(
    ("kind", "finding"),
    [(kind, one) for kind, kinds in READ_BY.items() for one in get_args(FindingKind) if one not in kinds],
)
def test_no_kind_speaks_for_what_it_does_not_read(kind: RuleKind, finding: FindingKind) -> None:
    """A finding raises alerts of its own kind only, at the block and at a part."""
    for subject in SUBJECTS:
        assert "for" not in spoken(kind, measured(finding_of(finding, subject), "below")).values()


@pytest.mark.parametrize(
    ("kind", "checkpoints"),
    [
        ("layer_changed", 1),
        ("layer_regressed", 1),
        ("layer_flooding", 1),
        ("layer_below", 2),
        ("layer_dropped", 2),
        ("layer_stalled", 1),
        ("layer_improvable", 2),
    ],
)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_events_fire_after_one_checkpoint_and_states_after_two(kind: RuleKind, checkpoints: int, subject: str) -> None:
    """A rule that gives no numbers raises, and clears, an event at one checkpoint and a state at two in a row."""
    shown, gone = measured(finding_of(READ_BY[kind][0], subject)), measured()
    states: tuple[RuleState, ...] = ()
    told = []
    for step, block in enumerate([shown, shown, shown, gone, gone, gone], start=1):
        verdict = judged(report(100 * step, block), [Rule("mine", kind)], states)
        states = verdict.states
        told += [(notice.step, notice.state, notice.subject, notice.since_step) for notice in verdict.notices]
    raised, cleared = 100 * checkpoints, 300 + 100 * checkpoints
    assert told == [(raised, "firing", subject, 100), (cleared, "resolved", subject, 100)]


def test_numbers_that_a_rule_gives_win_over_its_kinds() -> None:
    """`for_checkpoints` and `clear_checkpoints` of a rule are what counts, each by itself."""
    shown, gone = measured(finding_of("changed", BLOCK)), measured()
    for given_rule, expected in (
        (Rule("mine", "layer_changed", for_checkpoints=3), ["firing 300", "resolved 400"]),
        (Rule("mine", "layer_changed", clear_checkpoints=2), ["firing 100", "resolved 500"]),
    ):
        states: tuple[RuleState, ...] = ()
        told = []
        for step, block in enumerate([shown, shown, shown, gone, gone], start=1):
            verdict = judged(report(100 * step, block), [given_rule], states)
            states = verdict.states
            told += [f"{notice.state} {notice.step}" for notice in verdict.notices]
        assert told == expected


HISTORIES = st.text("baua-", max_size=40)
COUNTS = st.integers(1, 4)


def slow_notices(history: str, for_checkpoints: int, clear_checkpoints: int) -> list[str]:
    """The same from whole windows of the history instead of counters."""
    decided = [(100 + 100 * index, letter) for index, letter in enumerate(history) if letter in "ab"]
    letters = "".join(letter for _, letter in decided)
    notices, changed = [], 0
    for end, (step, _) in enumerate(decided, start=1):
        firing = len(notices) % 2 == 1
        wanted = "a" * clear_checkpoints if firing else "b" * for_checkpoints
        if letters[changed:end].endswith(wanted):
            notices.append(f"{'resolved' if firing else 'firing'} {step}")
            changed = end
    return notices


@given(HISTORIES, COUNTS, COUNTS)
def test_counters_agree_with_whole_windows(history: str, for_checkpoints: int, clear_checkpoints: int) -> None:
    """Firing and resolved alternate, exactly where a search through the whole history puts them."""
    notices, states = judge_history(history, rule(for_checkpoints, clear_checkpoints))
    sent = [f"{notice.state} {notice.step}" for notice in notices]
    assert sent == slow_notices(history, for_checkpoints, clear_checkpoints)
    assert (len(sent) % 2 == 1) == any(state.phase == "firing" for state in states)
    assert len({notice.id for notice in notices}) == len(notices)


@given(HISTORIES, st.data(), COUNTS, COUNTS)
def test_undecided_anywhere_changes_no_notice(history: str, data: st.DataObject, raise_at: int, clear_at: int) -> None:
    """An undecided or missing checkpoint put in anywhere leaves the notices the same, at the same checkpoints."""
    where = data.draw(st.integers(0, len(history)))
    silent = data.draw(st.sampled_from("u-"))
    plain = judge_history(history, rule(raise_at, clear_at))[0]
    padded = judge_history(history[:where] + silent + history[where:], rule(raise_at, clear_at))[0]
    shifted = [(notice.state, notice.step + 100 * (notice.step >= 100 + 100 * where)) for notice in plain]
    assert [(notice.state, notice.step) for notice in padded] == shifted


@pytest.mark.parametrize("kind", ["never_trained", "dead"])
def test_what_is_exactly_nothing_needs_no_second_checkpoint(kind: FindingKind) -> None:
    """A block that never moved, or a part that computes nothing, is told at once, unless the rule asks for more."""
    shown = report(100, measured(finding_of(kind, BLOCK), "below"))
    for given_rule, expected in ((Rule("mine", "layer_below"), ["firing"]), (Rule("mine", "layer_below", 2), [])):
        assert [notice.state for notice in judged(shown, [given_rule], ()).notices] == expected


@pytest.mark.parametrize("kind", [kind for kind in READ_BY if kind != "layer_below"])
def test_a_run_in_trouble_clears_nothing(kind: RuleKind) -> None:
    """While the run as a whole has a finding no layer has one: that does not mean that it is well again."""
    shown = [report(step, measured(finding_of(READ_BY[kind][0], BLOCK))) for step in (100, 200)]
    run = Finding("diverged", "run", "the loss rose")
    later = [replace(report(step, measured()), finding=run) for step in (300, 400, 500)]
    states: tuple[RuleState, ...] = ()
    told = []
    for one in (*shown, *later):
        verdict = judged(one, [Rule("mine", kind)], states)
        states = verdict.states
        told += [notice.state for notice in verdict.notices]
    assert told == ["firing"]


@pytest.mark.parametrize(
    ("kind", "surer"),
    [
        ("layer_regressed", "changed"),
        ("layer_dropped", "changed"),
        ("layer_dropped", "regressed"),
        ("layer_stalled", "dropped"),
        ("layer_improvable", "below"),
    ],
)
def test_a_surer_finding_hides_and_clears_nothing(kind: RuleKind, surer: FindingKind) -> None:
    """A layer has one finding: another one that is told instead says nothing of what it hides."""
    assert set(spoken(kind, measured(finding_of(surer, BLOCK))).values()) == {"neither"}


# ---------------------------------------------------------------- alerts that no checkpoint ends

FIRING = RuleState("layer_below", BLOCK, "firing", 1, 100, "100/f", "it is below", severity="critical", told=1)
PART = RuleState("layer_below", f"{BLOCK}/mlp", "firing", 0, 200, "200/f", "it is below", severity="critical", told=1)
PENDING = RuleState("layer_below", "model.layers.2", "pending", 1, 300)
OTHER = RuleState("other", BLOCK, "firing", 0, None, "none", "it is below", told=1)


def test_a_rule_that_is_gone_is_over() -> None:
    """Every alert of it that was told is resolved with the reason; its states go, those of other rules stay."""
    verdict = judged(report(500, layer(3, "u")), [Rule("other", "layer_below")], (FIRING, PENDING, OTHER, PART))
    assert [(state.rule, state.subject) for state in verdict.states] == [("other", BLOCK)]
    assert [(one.rule, one.subject, one.state, one.severity, one.step, one.since_step) for one in verdict.notices] == [
        ("layer_below", BLOCK, "resolved", "critical", 500, 100),
        ("layer_below", f"{BLOCK}/mlp", "resolved", "critical", 500, 200),
    ]
    assert verdict.notices[0].text == f"{BLOCK}: {RULE_GONE} (resolved; it had fired since step 100, for 400 steps)"
    assert verdict.notices[0].causes == ()


def test_alerts_are_withdrawn_for_a_reason() -> None:
    """What was told firing is resolved with it, under the id that clearing it has: sinks know an alert by that."""
    verdict = tell(withdrawn((FIRING, PENDING, OTHER), "why"), (), (), Moment(0.0, 500), run="mine")
    assert verdict.states == ()
    assert [(one.text.split(" (")[0], one.severity) for one in verdict.notices] == [
        (f"{BLOCK}: why", "critical"),
        (f"{BLOCK}: why", "warning"),
    ]
    *_, cleared = judge_history("bbaa", rule())[0]
    assert cleared.id == verdict.notices[0].id


@pytest.mark.parametrize("subject", [BLOCK, f"{BLOCK}/mlp"])
def test_a_block_that_is_gone_resolves_its_alert(subject: str) -> None:
    """A model that was cut shorter has no block that could clear it: the alert is resolved once, with that reason."""
    fired = replace(FIRING, subject=subject)
    verdict = judged(report(300, layer(1, "a"), layer(2, "u")), [rule()], (fired, PENDING))
    (notice,) = verdict.notices
    assert (notice.subject, notice.state, notice.severity, notice.step) == (subject, "resolved", "critical", 300)
    assert notice.text == f"{subject}: {LAYER_GONE} (resolved; it had fired since step 100, for 200 steps)"
    later = judged(report(400, layer(1, "a"), layer(2, "a")), [rule()], verdict.states)
    assert later.notices == ()
    assert {state.subject for state in later.states} == {"model.layers.1", "model.layers.2"}


def test_a_block_that_is_gone_unseen_is_forgotten() -> None:
    """What was pending or inactive of it is dropped without a word."""
    inactive = RuleState("layer_below", BLOCK, "inactive", 0, None)
    verdict = judged(report(300, layer(1, "a")), [rule()], (PENDING, inactive))
    assert verdict.notices == ()
    assert [state.subject for state in verdict.states] == ["model.layers.1"]


@pytest.mark.parametrize("subject", [BLOCK, f"{BLOCK}/mlp"])
def test_a_report_without_blocks_says_nothing_of_them(subject: str) -> None:
    """Where no block was measured none is gone, and a part that was not measured is not gone with its block there."""
    fired = replace(FIRING, subject=subject)
    for seen in (report(300), report(300, layer(3, "u"))):
        verdict = judged(seen, [rule()], (fired,))
        assert verdict.notices == ()
        assert core(fired) in [core(state) for state in verdict.states]
