"""The rule kinds that are about the watching itself: they read the clock, and what waits."""

from __future__ import annotations

from collections.abc import Mapping

from peel_agent.judge.testimony import SILENCE, Kind, Testimony
from peel_agent.records import Rule, RuleKind, TickObservation, threshold_of

RUN, AGENT = "run", "agent"

PAUSES = 5.0
"""Without a threshold, a checkpoint is missed after so many times the longest pause between two of them so far."""

LEAST_PAUSE_SECONDS = 3600.0

_NO_CHECKPOINT = (
    "the training hangs or has ended: look at its own log",
    "it saves to another place now: the newest files are not under the watched path",
    "the watched file system shows nothing new: `peel-agent doctor` looks at that",
)
_LAG = (
    'peels take longer than the training takes from checkpoint to checkpoint: `[peel] effort = "quick"`, or a GPU',
    "the device is in use by another: `peel-agent status` says what it waits for",
)


def no_checkpoint(observed: TickObservation, rule: Rule) -> dict[str, Testimony]:
    """No checkpoint has come for too long, and the training is not known to have ended."""
    last, limit = observed.last_checkpoint_at, rule.threshold
    if limit is None and observed.longest_pause is not None:
        limit = max(LEAST_PAUSE_SECONDS, PAUSES * observed.longest_pause)
    if observed.ended is not None:
        return {RUN: Testimony("against", f"the training has ended: {observed.ended}")}
    if last is None or limit is None:
        return {RUN: SILENCE}
    silent = observed.now - last
    if silent <= limit:
        return {RUN: Testimony("against", "checkpoints come again")}
    words = f"no checkpoint has come for {duration(silent)}"
    words += f" (the last one is of step {observed.last_step})" if observed.last_step is not None else ""
    if rule.threshold is None and observed.longest_pause is not None:
        words += f"; the longest pause before was {duration(observed.longest_pause)}"
    return {RUN: Testimony("for", words, causes=_NO_CHECKPOINT)}


def agent_error(observed: TickObservation, rule: Rule) -> dict[str, Testimony]:
    """Something keeps the agent from its work: a trouble that lasts, a checkpoint it cannot use, a lost delivery."""
    faults = [words for words, since in observed.troubles if observed.now - since >= threshold_of(rule)]
    if observed.unusable is not None:
        faults.append(observed.unusable)
    if observed.given_up:
        faults.append(f"{observed.given_up} deliveries were given up: `peel-agent deliveries list` says why")
    if faults:
        return {AGENT: Testimony("for", "; ".join(faults))}
    # What began just now neither raises nor clears.
    return {AGENT: SILENCE if observed.troubles else Testimony("against", "all is well again")}


def lag(observed: TickObservation, rule: Rule) -> dict[str, Testimony]:
    """Too many checkpoints wait to be peeled; it ends when half as many wait."""
    limit, waiting = threshold_of(rule), observed.waiting
    if waiting is None:
        return {RUN: SILENCE}
    if waiting >= limit:
        return {RUN: Testimony("for", f"{waiting} checkpoints wait to be peeled", causes=_LAG)}
    return {RUN: Testimony("against", f"{waiting} checkpoints wait to be peeled") if 2 * waiting <= limit else SILENCE}


def duration(seconds: float) -> str:
    """A length of time, such as `3 h 20 min`."""
    minutes, hours, days = round(seconds / 60), seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if days < 2 else f"{days:.1f} days"


TIME_KINDS: Mapping[RuleKind, Kind] = {"no_checkpoint": no_checkpoint, "agent_error": agent_error, "lag": lag}
