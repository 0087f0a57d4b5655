"""One report against every rule: a pure step of each (rule, subject)'s state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Literal

from peel_agent.judge.kinds import KINDS, Testimony
from peel_agent.records import Notice, PeelReport, Rule, RuleState, Severity, Verdict

_SILENCE = Testimony("neither", "")


def judge(report: PeelReport, rules: Sequence[Rule], states: Sequence[RuleState]) -> Verdict:
    """The states after this report and the notices of what began or ended with it.

    `states` are those of the verdict before. The verdict holds one state for every rule and every block and part seen
    so far; states of rules that are no longer configured are dropped (`withdraw` tells them), and an alert of a block
    that the model has no longer is resolved. Judging one checkpoint twice counts it twice: the
    caller prevents it. A checkpoint without a step counts as step 0 against `after_step`.
    """
    earlier = {(state.rule, state.subject): state for state in states}
    kept: list[RuleState] = []
    notices: list[Notice] = []
    for rule in rules:
        testimonies = KINDS[rule.kind](report)
        warm = (report.checkpoint.step or 0) >= rule.after_step
        unseen = (state.subject for state in states if state.rule == rule.name and state.subject not in testimonies)
        for subject in (*testimonies, *unseen):
            testimony = testimonies.get(subject, _SILENCE)
            before = earlier.get((rule.name, subject)) or _inactive(rule.name, subject)
            if _is_gone(subject, report):
                if before.phase == "firing":
                    gone = f"{subject}: the model has no such block any more"
                    notices.append(_resolved(before, gone, rule.severity, report.checkpoint.step))
                continue
            after = _step(before, testimony if warm else _SILENCE, rule, report.checkpoint.step)
            kept.append(after)
            if (notice := _change(before, after, rule, report, testimony=testimony)) is not None:
                notices.append(notice)
    return Verdict(states=tuple(kept), notices=tuple(notices))


def withdraw(
    states: Sequence[RuleState], reasons: Mapping[str, str], severities: Mapping[str, Severity], step: int | None
) -> Verdict:
    """The states without those of the rules in `reasons`, and a notice for each of them that fired.

    `reasons` says for each rule why it is over, `severities` what it was configured with; `step` is the last one seen.
    """
    gone = [state for state in states if state.rule in reasons]
    notices = tuple(
        _resolved(state, f"{state.subject}: {reasons[state.rule]}", severities.get(state.rule, "warning"), step)
        for state in gone
        if state.phase == "firing"
    )
    return Verdict(tuple(state for state in states if state not in gone), notices)


def _is_gone(subject: str, report: PeelReport) -> bool:
    """Whether an alert is about a block that the model has not, which says nothing where no block was measured."""
    names = {layer.name for layer in report.layers}
    return bool(names) and subject.partition("/")[0] not in names


def _inactive(rule: str, subject: str) -> RuleState:
    return RuleState(rule, subject, phase="inactive", streak=0, since_step=None)


def _step(state: RuleState, testimony: Testimony, rule: Rule, step: int | None) -> RuleState:
    """`streak` counts what would end the phase: confirmations while pending, contrary checkpoints while firing."""
    speaks = testimony.speaks
    if speaks == "neither":
        return state
    if state.phase == "firing":
        streak = state.streak + 1 if speaks == "against" else 0
        return _inactive(rule.name, state.subject) if streak >= rule.cleared_after else replace(state, streak=streak)
    if speaks == "against":
        return _inactive(rule.name, state.subject)
    streak = state.streak + 1
    since = step if state.phase == "inactive" else state.since_step
    if streak >= rule.raised_after or (testimony.plain and rule.for_checkpoints is None):
        return RuleState(rule.name, state.subject, phase="firing", streak=0, since_step=since)
    return RuleState(rule.name, state.subject, phase="pending", streak=streak, since_step=since)


def _change(
    before: RuleState, after: RuleState, rule: Rule, report: PeelReport, *, testimony: Testimony
) -> Notice | None:
    """The notice of an alert that began or ended between two states, if one did."""
    state: Literal["firing", "resolved"]
    if before.phase != "firing" and after.phase == "firing":
        state, since = "firing", after.since_step
    elif before.phase == "firing" and after.phase != "firing":
        state, since = "resolved", before.since_step
    else:
        return None
    text = testimony.words + _duration(before.streak + 1, state, since)
    # Without a step two alerts of one subject would share their id, and the second would be taken for a repetition.
    began = since if since is not None else report.checkpoint.fingerprint
    return Notice(
        id=_id(rule.name, after.subject, state, began),
        rule=rule.name,
        severity=rule.severity,
        state=state,
        subject=after.subject,
        step=report.checkpoint.step,
        text=text,
        since_step=since,
        causes=testimony.causes if state == "firing" else (),
    )


def _resolved(state: RuleState, text: str, severity: Severity, step: int | None) -> Notice:
    """The end of an alert that no checkpoint brought."""
    since = state.since_step
    return Notice(
        id=_id(state.rule, state.subject, "resolved", since if since is not None else text),
        rule=state.rule,
        severity=severity,
        state="resolved",
        subject=state.subject,
        step=step,
        text=text + _duration(1, "resolved", since),
        since_step=since,
    )


def _id(rule: str, subject: str, state: str, began: int | str) -> str:
    return sha256(json.dumps([rule, subject, state, began]).encode()).hexdigest()[:16]


def _duration(checkpoints: int, state: Literal["firing", "resolved"], since: int | None) -> str:
    row = f", for {checkpoints} checkpoints in a row" if checkpoints > 1 else ""
    if since is None or (state == "firing" and checkpoints == 1):
        return row  # an event has its steps in its own words
    return row + (f" (since step {since})" if state == "firing" else f" (resolved; it had fired since step {since})")
