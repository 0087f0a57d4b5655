"""Values of the right type that nothing could work with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from peel_agent.config.rules import check_rules
from peel_agent.config.sections import RunSettings, Settings
from peel_agent.errors import ConfigurationError


def check_ranges(settings: Settings) -> None:
    """Raises ConfigurationError for a value of the right type that nothing could work with."""
    if not 0 < settings.device.memory_fraction <= 1:
        raise ConfigurationError(
            f"`device.memory_fraction` is {settings.device.memory_fraction:g}", remedy="it must be above 0, at most 1"
        )
    all_sections: tuple[Settings | RunSettings, ...] = (settings, *settings.runs)
    for sections in all_sections:
        _check_least(sections)
        _check_names("rule", [rule.name for rule in sections.rules])
    check_rules(settings)
    _check_names("run", [run.name for run in settings.runs])
    _check_names("sink", [sink.name for sink in settings.sinks])


def _check_least(sections: Settings | RunSettings) -> None:
    probe, watch = sections.probe, sections.watch
    least: dict[str, tuple[float, float]] = {
        "watch.settle_seconds": (watch.settle_seconds, 0),
        "watch.poll_seconds": (watch.poll_seconds, 0),
        "probe.fit_tokens": (probe.fit_tokens, 1),
        "probe.select_tokens": (probe.select_tokens, 1),
        "probe.confirm_tokens": (probe.confirm_tokens, 1),
        "peel.budget_passes": (sections.peel.budget_passes, 0),
        "tracker.max_series": (sections.tracker.max_series, 10),
    }
    if probe.sequence_length is not None:
        least["probe.sequence_length"] = (probe.sequence_length, 2)
    if watch.keep_free_gb is not None:
        least["watch.keep_free_gb"] = (watch.keep_free_gb, 0)
    if sections.peel.time_budget_seconds is not None:
        least["peel.time_budget_seconds"] = (sections.peel.time_budget_seconds, 0)
    for dotted, (value, bound) in least.items():
        if not bound <= value < float("inf"):
            raise ConfigurationError(f"`{dotted}` is {value:g}", remedy=f"it must be {bound:g} or more")


def _check_names(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigurationError(f"two {what}s are called `{min(twice)}`", remedy=f"give each {what} a name of its own")
