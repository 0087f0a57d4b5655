"""The notify room: what is told of alerts, to whom, and what holds it back; and that no alert is told wrongly."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from peel_agent.judge import judge, withdrawn
from peel_agent.notify import group, in_text, tell, to_sinks
from peel_agent.records import (
    Estimate,
    LayerReport,
    Moment,
    Notice,
    ReportObservation,
    Rule,
    RuleState,
    Silence,
    TickObservation,
    Verdict,
    plain,
    restored,
)
from tests.rooms.test_judge import layer, report

BLOCK = "model.layers.3"
RULE = Rule("layer_below", "layer_below")
FIRING = RuleState("layer_below", BLOCK, "firing", 0, 100, "100/f", "it is below", ("why",))
ALWAYS = Silence(1, "*", "*", "*", 1000.0, "a break")


def told(
    states: tuple[RuleState, ...],
    *silences: Silence,
    rules: tuple[Rule, ...] = (RULE,),
    now: float = 0.0,
    is_checkpoint: bool = True,
) -> Verdict:
    return tell(states, rules, silences, Moment(now, 200, is_checkpoint=is_checkpoint), run="mine")


def test_an_alert_is_told_once() -> None:
    """However long it fires; that it ended is told once too, and then nothing is left of it to tell."""
    first = told((FIRING,))
    assert [notice.state for notice in first.notices] == ["firing"]
    second = told(first.states)
    assert second.notices == ()
    ended = told((replace(second.states[0], phase="inactive", words="it earns again"),))
    assert [notice.state for notice in ended.notices] == ["resolved"]
    assert told(ended.states).notices == ()


@pytest.mark.parametrize(
    ("silence", "holds"),
    [
        (ALWAYS, True),
        (replace(ALWAYS, run="mi*", rule="layer_*", subject="model.layers.?"), True),
        (replace(ALWAYS, run="other"), False),
        (replace(ALWAYS, rule="lag"), False),
        (replace(ALWAYS, subject="run"), False),
        (replace(ALWAYS, until=0.0), False),
    ],
)
def test_a_silence_holds_back_what_fits_it(silence: Silence, holds: bool) -> None:
    """By run, rule and subject, until its end."""
    assert bool(told((FIRING,), silence).notices) is not holds


def test_what_still_fires_at_the_end_of_a_silence_is_told_then() -> None:
    """With the tick that follows it, not only with the next checkpoint; and what ended meanwhile is never told."""
    held = told((FIRING,), ALWAYS)
    assert held.notices == ()
    later = told(held.states, ALWAYS, now=1000.0, is_checkpoint=False)
    assert [notice.state for notice in later.notices] == ["firing"]
    ended = told((replace(held.states[0], phase="inactive"),), ALWAYS)
    assert ended.notices == ()


def test_the_end_of_what_was_told_is_told_in_a_silence_too() -> None:
    """Nobody is left with an alert that is over."""
    first = told((FIRING,))
    ended = told((replace(first.states[0], phase="inactive"),), ALWAYS)
    assert [notice.state for notice in ended.notices] == ["resolved"]


def test_an_alert_is_told_again_as_often_as_the_rule_says() -> None:
    """Every `repeat_checkpoints` checkpoints, under an id of its own; ticks do not count."""
    often = (replace(RULE, repeat_checkpoints=3),)
    states, told_at, ids = (FIRING,), [], set()
    for number in range(10):
        verdict = told(states, rules=often)
        verdict = told(verdict.states, rules=often, is_checkpoint=False) if not verdict.notices else verdict
        states = verdict.states
        told_at += [number] * len(verdict.notices)
        ids |= {notice.id for notice in verdict.notices}
        if number == 3:
            assert verdict.notices[0].text == "it is below (since step 100, told again)"
    assert told_at == [0, 3, 6, 9]
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("cause", "explained"),
    [("agent_error", "no_checkpoint"), ("agent_error", "lag"), ("false_convergence", "run_below_bound")],
)
def test_what_another_alert_explains_is_not_told(cause: str, explained: str) -> None:
    """While the cause fires; when it is over and the other still fires, that is told."""
    rules = (Rule("cause", cause), Rule("explained", explained))
    states = tuple(RuleState(one.name, "run", "firing", 0, 100, "b", "w") for one in rules)
    first = told(states, rules=rules)
    assert [notice.rule for notice in first.notices] == ["cause"]
    over = tuple(replace(one, phase="inactive") if one.rule == "cause" else one for one in first.states)
    assert [(one.rule, one.state) for one in told(over, rules=rules).notices] == [
        ("cause", "resolved"),
        ("explained", "firing"),
    ]


@pytest.mark.parametrize(
    ("of_cause", "of_explained", "is_told"),
    [
        (None, None, False),
        (None, ("mail",), False),
        (("mail", "chat"), ("mail",), False),
        (("mail",), ("mail", "chat"), True),
        (("mail",), None, True),
        ((), ("mail",), True),
    ],
)
def test_who_is_not_told_of_the_cause_is_told_of_what_it_explains(
    of_cause: tuple[str, ...] | None, of_explained: tuple[str, ...] | None, is_told: bool
) -> None:
    """A sink that hears of neither would take silence for health."""
    rules = (Rule("cause", "agent_error", sinks=of_cause), Rule("explained", "no_checkpoint", sinks=of_explained))
    states = tuple(RuleState(one.name, "run", "firing", 0, 100, "b", "w") for one in rules)
    assert ("explained" in [one.rule for one in told(states, rules=rules).notices]) is is_told


def notice(rule_name: str) -> Notice:
    return Notice("id-" + rule_name, rule_name, "warning", "firing", BLOCK, 200, "it is below", 100, ("why",))


def test_each_sink_gets_its_own_group() -> None:
    """Of the rules that name it, and of those that name none; one that gets nothing is owed nothing."""
    rules = (Rule("a", "layer_below", sinks=("mail",)), Rule("b", "layer_below"), Rule("c", "lag", sinks=()))
    debts = to_sinks([notice("a"), notice("b"), notice("c")], ["mail", "chat", "none"], rules, run="mine", at=1.0)
    assert {debt.destination: [one["rule"] for one in debt.body["notices"]] for debt in debts} == {
        "mail": ["a", "b"],
        "chat": ["b"],
        "none": ["b"],
    }
    assert to_sinks([notice("c")], ["mail"], rules, run="mine", at=1.0) == ()


def test_a_group_is_known_by_its_notices() -> None:
    """The same notices have the same id at any time; other notices, or another run, have another."""
    one = group([notice("a"), notice("b")], run="mine", at=1.0)
    assert one.id == group([notice("a"), notice("b")], run="mine", at=9.0).id
    others = {group([notice("a")], run="mine", at=1.0).id, group([notice("a"), notice("b")], run="other", at=1.0).id}
    assert one.id not in others
    assert len(others) == 2


def test_a_notice_for_people_says_what_to_do_next() -> None:
    """What, how grave, since when; likely causes; what was not checked; and the command that shows more."""
    moment = Moment(0.0, 300, is_checkpoint=True, unchecked=("headroom (no time)",), command="peel-agent scan X")
    (one,) = tell((FIRING,), (RULE,), (), moment, run="mine").notices
    assert in_text(one, "mine").splitlines() == [
        "mine: WARNING firing: it is below (since step 100)",
        "  perhaps why",
        "  not checked: headroom (no time)",
        "  more: peel-agent scan X",
    ]


# ---------------------------------------------------------------- what may never happen

HALF = 0.01
LIMIT = 0.02


def wavering(noise: float) -> LayerReport:
    """A margin at the limit, measured with an error within its interval."""
    value = LIMIT + noise * HALF
    low, high = value - HALF, value + HALF
    letter = "b" if high < LIMIT else "a" if low > LIMIT else "u"
    return replace(layer(3, letter), margin=Estimate(value, low, high))


@given(st.lists(st.floats(-1, 1), max_size=60))
def test_a_margin_that_wavers_by_its_own_noise_is_never_told(noises: list[float]) -> None:
    """No series at the threshold, measured within its own interval, raises even one notice."""
    states: tuple[RuleState, ...] = ()
    for step, noise in enumerate(noises):
        verdict = told(judge(ReportObservation(report(step, wavering(noise))), [RULE], states))
        states = verdict.states
        assert verdict.notices == ()


@given(st.lists(st.sampled_from("bau-"), max_size=60), st.integers(1, 3))
def test_notices_of_one_alert_alternate(letters: list[str], count: int) -> None:
    """Whatever the series, firing and resolved alternate, beginning with firing, and no id comes twice."""
    alert_rule, states = Rule("r", "layer_below", count, count), ()
    notices: list[Notice] = []
    for step, letter in enumerate(letters):
        seen = report(step, *([] if letter == "-" else [layer(3, letter)]))
        verdict = told(judge(ReportObservation(seen), [alert_rule], states), rules=(alert_rule,))
        states = verdict.states
        notices += verdict.notices
    assert [one.state for one in notices] == ["firing", "resolved"] * (len(notices) // 2) + ["firing"] * (
        len(notices) % 2
    )
    assert len({one.id for one in notices}) == len(notices)


class Alerts(RuleBasedStateMachine):
    """Reports, ticks, restarts, reloads, renames, silences and the end of the run, in any order.

    What a sink has heard is kept beside it: whom it was told firing, and not yet resolved.
    """

    @initialize()
    def begin(self) -> None:
        self.rules: tuple[Rule, ...] = (Rule("below", "layer_below", 1, 1), Rule("late", "lag", threshold=2))
        self.states: tuple[RuleState, ...] = ()
        self.silences: tuple[Silence, ...] = ()
        self.step = 0
        self.now = 0.0
        self.open: set[tuple[str, str]] = set()
        self.ids: set[str] = set()

    def hear(self, verdict: Verdict) -> None:
        self.states = verdict.states
        for one in verdict.notices:
            key = (one.rule, one.subject)
            assert one.id not in self.ids, "an id came twice"
            self.ids.add(one.id)
            assert (key in self.open) == (one.state == "resolved"), f"{one.state} was told twice, or of nothing"
            (self.open.discard if one.state == "resolved" else self.open.add)(key)

    def moment(self, *, is_checkpoint: bool) -> Moment:
        self.now += 1.0
        return Moment(self.now, self.step, is_checkpoint=is_checkpoint)

    @rule(letters=st.text("bau", min_size=1, max_size=4), rolled_back=st.booleans())
    def checkpoint(self, letters: str, rolled_back: bool) -> None:
        self.step = max(0, self.step + (-1 if rolled_back else 1))
        layers = [layer(index, letter) for index, letter in enumerate(letters)]
        seen = ReportObservation(report(self.step, *layers, fingerprint=f"f{self.now}"))
        moment = self.moment(is_checkpoint=True)
        self.hear(tell(judge(seen, self.rules, self.states), self.rules, self.silences, moment, run="mine"))

    @rule(waiting=st.integers(0, 4))
    def tick(self, waiting: int) -> None:
        moment = self.moment(is_checkpoint=False)
        after = judge(TickObservation(moment.now, waiting=waiting), self.rules, self.states)
        self.hear(tell(after, self.rules, self.silences, moment, run="mine"))

    @rule(subject=st.sampled_from(["*", "model.layers.1", "run"]), seconds=st.integers(1, 5))
    def silence(self, subject: str, seconds: int) -> None:
        self.silences = (*self.silences, Silence(1, "*", "*", subject, self.now + seconds, ""))

    @rule(names=st.sets(st.sampled_from(["below", "renamed", "late"])))
    def reload(self, names: set[str]) -> None:
        kinds = {"below": "layer_below", "renamed": "layer_below", "late": "lag"}
        self.rules = tuple(Rule(name, kinds[name], 1, 1, threshold=2 if name == "late" else None) for name in names)

    @rule()
    def restart(self) -> None:
        """States survive as the ledger keeps them."""
        self.states = tuple(restored(RuleState, plain(state)) for state in self.states)

    @rule()
    def end_of_the_run(self) -> None:
        moment = self.moment(is_checkpoint=False)
        self.hear(tell(withdrawn(self.states, "the run ended"), (), (), moment, run="mine"))
        assert not self.open, "an alert was told firing, and its end was not"

    @invariant()
    def what_was_told_is_kept(self) -> None:
        if not hasattr(self, "open"):
            return
        kept = {(state.rule, state.subject) for state in self.states if state.told}
        assert kept == self.open, "what sinks were told and what is kept of it differ"


Alerts.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestAlerts = Alerts.TestCase
