"""Rules that could never be raised, or never be told, are refused when the configuration is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from peel_agent.config.sections import DEFAULT_RULES, RunSettings, Settings
from peel_agent.errors import ConfigurationError
from peel_agent.records import METRICS, NEEDS, QUANTITIES, THRESHOLDS, PeelSettings, Rule, metric_form


def check_rules(settings: Settings) -> None:
    """Raises ConfigurationError for a rule that no effort, number or sink fits, and for a sink that gets nothing."""
    sinks = [sink.name for sink in settings.sinks]
    both: tuple[Settings | RunSettings, ...] = (settings, *settings.runs)
    for level in both:
        for rule in level.rules:
            _check_name(rule)
            _check_numbers(rule)
            _check_sinks(rule, sinks)
        if level.rules is not DEFAULT_RULES and (isinstance(level, RunSettings) or not settings.runs):
            for rule in level.rules:
                _check_effort(rule, level.peel)
    _check_each_sink_is_used(sinks, [level.rules for level in (settings.runs or (settings,))])


def _check_name(rule: Rule) -> None:
    if not re.fullmatch(r"[\w.-]{1,100}", rule.name):
        raise ConfigurationError(
            f"a rule is called `{rule.name}`", remedy="letters, digits, `_`, `-` and `.` make a rule's name"
        )


def _check_numbers(rule: Rule) -> None:
    meaning = THRESHOLDS[rule.kind]
    if rule.threshold is None and meaning.needed:
        raise ConfigurationError(
            f"the rule `{rule.name}` of kind {rule.kind} has no threshold", remedy=f"add it: {meaning.words}"
        )
    if rule.threshold is not None and not meaning.least <= rule.threshold <= meaning.most:
        least, most = meaning.least, meaning.most
        bounds = f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
        raise ConfigurationError(
            f"`rule.{rule.name}.threshold` is {rule.threshold:g}", remedy=f"it must be {bounds}: {meaning.words}"
        )
    if bool(rule.metric) != (rule.kind == "metric"):
        raise ConfigurationError(
            f"the rule `{rule.name}` of kind {rule.kind} {'names a' if rule.metric else 'does not say which'} metric",
            remedy='`metric` is a key in the tracker, such as "peel/loss", for a rule of kind `metric` only',
        )
    if rule.metric and metric_form(rule.metric) not in METRICS:
        near = difflib.get_close_matches(metric_form(rule.metric), METRICS, n=1, cutoff=0.4)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigurationError(
            f"the rule `{rule.name}` reads the metric `{rule.metric}`, which no checkpoint has",
            remedy=f"{guess}there are: {', '.join(METRICS)}",
        )
    for key, count in (
        ("for_checkpoints", rule.raised_after),
        ("clear_checkpoints", rule.cleared_after),
        ("repeat_checkpoints", 1 if rule.repeat_checkpoints is None else rule.repeat_checkpoints),
    ):
        if count < 1:
            raise ConfigurationError(f"`rule.{rule.name}.{key}` is {count}", remedy="it must be 1 or more")


def _check_sinks(rule: Rule, sinks: Sequence[str]) -> None:
    for name in rule.sinks or ():
        if name not in sinks:
            known = f"there are: {', '.join(sinks)}" if sinks else "there is none: add a [[sink]]"
            raise ConfigurationError(f"the rule `{rule.name}` is to be told to a sink `{name}`", remedy=known)


def _check_effort(rule: Rule, peel: PeelSettings) -> None:
    needed = METRICS[metric_form(rule.metric)] if rule.kind == "metric" else NEEDS.get(rule.kind, ())
    if not needed or set(needed) & set(peel.computed):
        return
    effort = next(name for name, computed in QUANTITIES.items() if set(needed) & set(computed))
    raise ConfigurationError(
        f"the rule `{rule.name}` of kind {rule.kind} reads {' or '.join(needed)}, and only "
        f"{', '.join(peel.computed)} is computed",
        remedy=f'set [peel] effort = "{effort}", or add {needed[0]} to [peel] quantities',
    )


def _check_each_sink_is_used(sinks: Sequence[str], rules_by_run: Sequence[Sequence[Rule]]) -> None:
    rules = [rule for rules in rules_by_run for rule in rules]
    for name in sinks:
        if rules and not any(rule.sinks is None or name in rule.sinks for rule in rules):
            raise ConfigurationError(
                f"no rule tells the sink `{name}` anything", remedy="name it in a rule's sinks, or take it out"
            )
