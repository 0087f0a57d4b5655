"""One observation against every rule: a pure step of each (rule, subject)'s state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peel_agent.judge.kinds import KINDS
from peel_agent.judge.testimony import SILENCE, Testimony
from peel_agent.records import OF_TIME, PeelReport, ReportObservation, Rule, RuleState, TickObservation

RULE_GONE = "its rule was renamed or removed"
KIND_CHANGED = "its rule is of another kind now"
LAYER_GONE = "the model has no such block any more"


def judge(
    observed: ReportObservation | TickObservation, rules: Sequence[Rule], states: Sequence[RuleState]
) -> tuple[RuleState, ...]:
    """The states after this observation; `states` are those before it.

    There is one for every rule and every subject seen so far. Rules that do not read this kind of observation keep
    theirs; an alert of a rule that is not configured any more, or is of another kind now, or of a block that the model
    has no longer, is over, and its words say so. Judging one checkpoint twice counts it twice: the caller prevents it.
    A checkpoint without a step counts as step 0 against `after_step`.
    """
    kept: list[RuleState] = []
    for rule in rules:
        of_name = [state for state in states if state.rule == rule.name]
        of_rule = {state.subject: state for state in of_name if _is_of_kind(state, rule)}
        over = withdrawn([state for state in of_name if not _is_of_kind(state, rule)], KIND_CHANGED)
        kept += over
        if (rule.kind in OF_TIME) != isinstance(observed, TickObservation):
            kept += of_rule.values()
            continue
        testimonies = KINDS[rule.kind](observed, rule)
        is_ending = {state.subject for state in over}  # it is told first, and then the subject may begin anew
        for subject in (subject for subject in dict.fromkeys((*testimonies, *of_rule)) if subject not in is_ending):
            before = of_rule.get(subject) or RuleState(rule.name, subject, "inactive", 0, None)
            after = _after(observed, rule, before, testimonies.get(subject, SILENCE))
            kept += [] if after is None else [after]
    names = {rule.name for rule in rules}
    return (*kept, *withdrawn([state for state in states if state.rule not in names], RULE_GONE))


def withdrawn(states: Sequence[RuleState], reason: str) -> tuple[RuleState, ...]:
    """The states of alerts that are over for this reason; those that nobody was told of are dropped."""
    return tuple(_ended(state, f"{state.subject}: {reason}") for state in states if state.told)


def _is_of_kind(state: RuleState, rule: Rule) -> bool:
    """Whether a state of this name comes of a rule of the same kind, or of one whose kind was not kept yet."""
    return state.kind in (rule.kind, "")


def _after(
    observed: ReportObservation | TickObservation, rule: Rule, before: RuleState, testimony: Testimony
) -> RuleState | None:
    """The state that follows; None when there is nothing to keep of it."""
    if isinstance(observed, TickObservation):
        return _step(before, testimony, rule, observed.last_step, str(round(observed.now)))
    report = observed.report
    if _is_gone(before.subject, report):
        return _ended(before, f"{before.subject}: {LAYER_GONE}") if before.told else None
    is_warm = (report.checkpoint.step or 0) >= rule.after_step
    began = f"{report.checkpoint.step}/{report.checkpoint.fingerprint}"
    return _step(before, testimony if is_warm else SILENCE, rule, report.checkpoint.step, began)


def _is_gone(subject: str, report: PeelReport) -> bool:
    """Whether an alert is about a block that the model has not, which says nothing where no block was measured."""
    names = {layer.name for layer in report.layers}
    return subject != "run" and bool(names) and subject.partition("/")[0] not in names


def _ended(state: RuleState, words: str) -> RuleState:
    return replace(state, phase="inactive", streak=0, words=words, causes=())


def _step(state: RuleState, testimony: Testimony, rule: Rule, step: int | None, now: str) -> RuleState:
    """`streak` counts what would end the phase: confirmations while pending, contrary checkpoints while firing.

    `now` tells this observation from every other one.
    """
    state = replace(state, severity=rule.severity, kind=rule.kind)
    if testimony.speaks == "neither":
        return state
    streak = state.streak + 1
    if state.phase == "firing":
        if testimony.speaks == "for":
            return replace(state, streak=0, words=testimony.words, causes=testimony.causes)
        if streak < rule.cleared_after:
            return replace(state, streak=streak)
        return _ended(state, testimony.words + _in_a_row(streak))
    if testimony.speaks == "against":
        return replace(state, phase="inactive", streak=0, since_step=None, words=testimony.words, causes=())
    since = step if state.phase == "inactive" else state.since_step
    began = now if state.phase == "inactive" else state.began
    fires = streak >= rule.raised_after or testimony.counted or (testimony.plain and rule.for_checkpoints is None)
    return replace(
        state,
        phase="firing" if fires else "pending",
        streak=0 if fires else streak,
        since_step=since,
        began=began,
        words=testimony.words + (_in_a_row(streak) if fires else ""),
        causes=testimony.causes,
        untold=0,
    )


def _in_a_row(checkpoints: int) -> str:
    return f", for {checkpoints} checkpoints in a row" if checkpoints > 1 else ""
