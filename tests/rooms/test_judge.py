"""The judge room: rules, states and notices, one letter a checkpoint (b below, a above, u undecided, - missing)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peel_agent.judge import judge
from peel_agent.records import (
    CheckpointInfo,
    Estimate,
    LayerReport,
    ModelInfo,
    Notice,
    PeelReport,
    ProbeInfo,
    Rule,
    RuleState,
    Timing,
    Verdict,
)

STATUS = {"b": "below", "a": "above", "u": "undecided"}
BLOCK = "model.layers.3"


def layer(index: int, letter: str, margin: float | None = 0.0) -> LayerReport:
    return LayerReport(
        index=index,
        name=f"model.layers.{index}",
        status=STATUS[letter],
        margin=None if margin is None else Estimate(margin, margin - 0.0002, margin + 0.0002),
        best_reference="skip",
        references={"skip": 0.0},
        parts={},
        stream_share=0.1,
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


def judge_history(
    history: str, rule: Rule, states: tuple[RuleState, ...] = (), first_step: int = 100
) -> tuple[list[Notice], tuple[RuleState, ...]]:
    """Block 3 through one checkpoint a letter, at steps 100, 200, ..., with the verdict's states handed on."""
    notices: list[Notice] = []
    for step, letter in enumerate(history):
        layers = () if letter == "-" else (layer(3, letter),)
        verdict = judge(report(first_step + 100 * step, *layers), [rule], states)
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
        assert states == (RuleState("layer_below", BLOCK, phase, streak, since),)


def test_a_checkpoint_before_after_step_does_not_clear() -> None:
    """A rewound training (step below after_step again) leaves a firing alert as it is."""
    _, firing = judge_history("bb", rule(after_step=300), first_step=300)
    notices, states = judge_history("aaa", rule(after_step=10_000), firing)
    assert notices == []
    assert states == firing


def test_layers_and_rules_are_judged_apart() -> None:
    """Each (rule, layer) has its own state: one layer's `above` never clears another's alert."""
    rules = [Rule("quick", "layer_below", 1), Rule("slow", "layer_below", 2)]
    first = judge(report(100, layer(2, "b"), layer(3, "a")), rules, ())
    second = judge(report(200, layer(2, "b"), layer(3, "b")), rules, first.states)
    assert [(notice.rule, notice.layer) for notice in first.notices] == [("quick", "model.layers.2")]
    assert [(notice.rule, notice.layer) for notice in second.notices] == [
        ("quick", "model.layers.3"),
        ("slow", "model.layers.2"),
    ]
    assert {(state.rule, state.layer, state.phase) for state in second.states} == {
        ("quick", "model.layers.2", "firing"),
        ("quick", "model.layers.3", "firing"),
        ("slow", "model.layers.2", "firing"),
        ("slow", "model.layers.3", "pending"),
    }
    assert len(second.firing) == 3


def test_states_of_a_rule_that_is_gone_are_dropped() -> None:
    """A rule taken out of the configuration leaves no state behind that would fire for ever."""
    _, states = judge_history("bb", rule())
    assert judge(report(300, layer(3, "b")), [], states) == Verdict((), ())


def test_the_text_says_what_was_measured_in_a_trainers_words() -> None:
    """The notice names the block, the stand-in, the margin with its interval, the neighbours, how long, since when."""
    at = [report(step, layer(1, "a", 0.06), layer(2, "a", 0.1024), layer(3, "b", 0.0)) for step in (400, 600)]
    first = judge(at[0], [rule()], ())
    (notice,) = judge(at[1], [rule()], first.states).notices
    assert notice.text == (
        "model.layers.3 earns hardly more than its cheap stand-in `skip`: margin 0.0000 [-0.0002, 0.0002] nats/token, "
        "the other blocks' median is 0.0812, for 2 checkpoints in a row (since step 400)"
    )
    assert (notice.rule, notice.layer, notice.step, notice.severity) == ("layer_below", BLOCK, 600, "critical")


@pytest.mark.parametrize(
    ("margin", "words"),
    [(-0.01, "earns less than its cheap stand-in `skip`: margin -0.0100"), (0.004, "earns hardly more than")],
)
def test_the_text_claims_no_more_than_the_interval(margin: float, words: str) -> None:
    """`less than` is said only when the whole interval is below 0 (method.md 9)."""
    (notice,) = judge(report(400, layer(3, "b", margin)), [rule(1)], ()).notices
    assert words in notice.text
    assert "median" not in notice.text  # there are no other blocks here


def test_the_text_of_a_resolved_alert_says_since_when_it_fired() -> None:
    """A resolved notice carries the margin that cleared it and the step at which its alert began."""
    *_, resolved = judge_history("bbaa", rule())[0]
    assert resolved.state == "resolved"
    assert resolved.text == (
        "model.layers.3 earns more than its cheap stand-in `skip`: margin 0.0000 [-0.0002, 0.0002] nats/token, "
        "for 2 checkpoints in a row (resolved; it had fired since step 100)"
    )


def test_a_layer_without_a_margin_still_gets_a_notice() -> None:
    """A status without numbers is reported without numbers."""
    (notice,) = judge(report(None, layer(3, "b", None)), [rule(1)], ()).notices
    assert notice.text == "model.layers.3 earns hardly more than its cheap stand-in `skip`"


def test_notice_ids_are_the_alerts_own() -> None:
    """An id depends on rule, layer, state and the step it began, not on when it was confirmed or what was measured."""
    (one,) = judge_history("bb", rule())[0]
    (same,) = judge_history("buub", rule())[0]
    (later,) = judge_history("bb", rule(), first_step=200)[0]
    resolved = judge_history("bbaa", rule())[0][1]
    (other_rule,) = judge_history("bb", Rule("other", "layer_below"))[0]
    assert one.id == same.id
    assert len({one.id, later.id, resolved.id, other_rule.id}) == 4
    assert one.id == "92285adc63e77043"  # across restarts and versions: sinks remember it


def test_without_steps_two_alerts_of_a_layer_have_two_ids() -> None:
    """Checkpoints that name no step are told apart by their fingerprints."""
    ids, states = [], ()
    for number, letter in enumerate("bab"):
        verdict = judge(report(None, layer(3, letter), fingerprint=f"f{number}"), [rule(1, 1)], states)
        states = verdict.states
        ids += [notice.id for notice in verdict.notices]
    assert len(set(ids)) == 3


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
    found = [f"{notice.state} {notice.step}" for notice in notices]
    assert found == slow_notices(history, for_checkpoints, clear_checkpoints)
    assert (len(found) % 2 == 1) == any(state.phase == "firing" for state in states)
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
