"""Which alerts are told now: each that began, goes on for long or ended, unless something holds it back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Literal

from peel_agent.records import Moment, Notice, Rule, RuleKind, RuleState, Silence, Verdict

INHIBITED: Mapping[RuleKind, frozenset[RuleKind]] = {
    "agent_error": frozenset({"no_checkpoint", "lag"}),
    "false_convergence": frozenset({"run_below_bound"}),
}
"""While a rule of the first kind fires, those of the others are explained by it, and not told to who is told of it.

What a flooded stream or a young run explains is no finding of a layer in the first place (diagnose).
"""


def tell(
    states: Sequence[RuleState], rules: Sequence[Rule], silences: Sequence[Silence], moment: Moment, *, run: str
) -> Verdict:
    """The states with what is told of each written into them, and the notices.

    That an alert fires is told once it is neither silenced nor inhibited, and again after the rule's
    `repeat_checkpoints`; that it ended is told to whoever was told that it fired, silenced or not.
    """
    by_name = {rule.name: rule for rule in rules}
    firing = [by_name[state.rule] for state in states if state.phase == "firing" and state.rule in by_name]
    kept: list[RuleState] = []
    notices: list[Notice] = []
    for state in states:
        rule = by_name.get(state.rule)
        if state.phase == "firing" and rule is not None:
            counted = replace(state, untold=state.untold + moment.is_checkpoint) if state.told else state
            is_held = _is_explained(rule, firing) or silenced_by(silences, run, state, moment.now) is not None
            if _is_due(counted, rule) and not is_held:
                counted = replace(counted, told=state.told + 1, untold=0)
                notices.append(_notice(counted, "firing", moment))
            kept.append(counted)
        elif state.told:
            notices.append(_notice(state, "resolved", moment))
            ended = replace(state, phase="inactive", streak=0, since_step=None, told=0, untold=0, words="", causes=())
            kept += [ended] if rule is not None else []
        else:
            kept.append(state)
    return Verdict(tuple(kept), tuple(notices))


def silenced_by(silences: Sequence[Silence], run: str, state: RuleState, now: float) -> Silence | None:
    """The silence, in force at the time `now`, that holds back an alert; None when none does."""
    return next(
        (
            silence
            for silence in silences
            if now < silence.until
            and fnmatchcase(run, silence.run)
            and fnmatchcase(state.rule, silence.rule)
            and fnmatchcase(state.subject, silence.subject)
        ),
        None,
    )


def standing(states: Sequence[RuleState], moment: Moment) -> tuple[Notice, ...]:
    """All that was told firing and goes on, as it was told last."""
    return tuple(_notice(state, "firing", moment) for state in states if state.phase == "firing" and state.told)


def _is_explained(rule: Rule, firing: Sequence[Rule]) -> bool:
    """Whether another alert explains those of a rule, and is told to everybody who would be told of the rule's."""
    return any(rule.kind in INHIBITED.get(other.kind, ()) and _reaches(other, rule) for other in firing)


def _reaches(other: Rule, rule: Rule) -> bool:
    if other.sinks is None:
        return True
    return rule.sinks is not None and set(rule.sinks) <= set(other.sinks)


def _is_due(state: RuleState, rule: Rule) -> bool:
    if not state.told:
        return True
    return rule.repeat_checkpoints is not None and state.untold >= rule.repeat_checkpoints


def _notice(state: RuleState, what: Literal["firing", "resolved"], moment: Moment) -> Notice:
    is_firing = what == "firing"
    return Notice(
        id=_id(state, what),
        rule=state.rule,
        severity=state.severity,
        state=what,
        subject=state.subject,
        step=moment.step,
        text=state.words + _since(state, what, moment.step),
        since_step=state.since_step,
        causes=state.causes if is_firing else (),
        unchecked=moment.unchecked if is_firing else (),
        command=moment.command if is_firing else None,
    )


def _id(state: RuleState, what: str) -> str:
    """The same for one change of one alert, however often it is delivered."""
    facts = [state.rule, state.subject, what, state.began, state.told if what == "firing" else 0]
    return sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _since(state: RuleState, what: str, step: int | None) -> str:
    since = state.since_step
    if what == "resolved":
        if since is None:
            return " (resolved)"
        lasted = f", for {step - since:,} steps" if step is not None and step > since else ""
        return f" (resolved; it had fired since step {since}{lasted})"
    again = ", told again" if state.told > 1 else ""
    if since is None or (since == step and not again):
        return ""  # an event has its steps in its own words
    return f" (since step {since}{again})"


def in_text(notice: Notice, run: str) -> str:
    """A notice for people: what and how sure, then likely causes, what was not checked, and what shows more."""
    head = f"{run}: {notice.severity.upper()} {notice.state}: {notice.text}"
    lines = [head, *(f"  perhaps {cause}" for cause in notice.causes)]
    if notice.unchecked:
        lines.append(f"  not checked: {'; '.join(notice.unchecked)}")
    if notice.command is not None:
        lines.append(f"  more: {notice.command}")
    return "\n".join(lines)
