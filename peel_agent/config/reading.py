"""Reads the settings: peel.toml, then the environment (`PEEL__SECTION__KEY`), then flags; the last one wins.

An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import tomli

from peel_agent.config.conversion import converted
from peel_agent.config.sections import Settings, TrackerSettings
from peel_agent.errors import ConfigurationError
from peel_agent.records import Rule

PREFIX = "PEEL__"

RESERVED = {
    "health": {"listen"},
    "engine": {"use"},
    "sink": set[str](),
}
"""Keys of the contract that this version does not act on: refused by name rather than silently ignored."""


def load_settings(file: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Settings from a file (or none), the environment, and `flags` by dotted key; None among the flags is not given.

    Raises ConfigurationError naming the key, the value and the remedy.
    """
    raw = _read(file) if file is not None else {}
    for name, text in sorted(os.environ.items()):
        if name.startswith(PREFIX):
            keys = name.removeprefix(PREFIX).lower().split("__")
            _put(raw, keys, text if len(keys) > 2 else _from_environment(text))  # a tracker's own options are text
    for dotted, value in flags.items():
        if value is not None:
            _put(raw, dotted.split("."), value)
    settings = _settings(raw)
    _check_ranges(settings)
    return _with_run_of_environment(settings)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomli.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the configuration {file}: {error.strerror}", remedy="check the path given with -c"
        ) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} is not valid TOML: {error}", remedy="repair that line") from error


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigurationError(
                f"`{key}` is not a table, so `{'.'.join(keys)}` cannot be set", remedy=f"make it a table: [{key}]"
            )
    raw[keys[-1]] = value


def _from_environment(text: str) -> Any:
    """Numbers, booleans and lists as TOML writes them; anything else is text."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def _settings(raw: Mapping[str, Any]) -> Settings:
    tables: dict[str, Any] = {
        name: cast(type, kind.default.__class__)
        for name, kind in ((f.name, f) for f in dataclasses.fields(Settings))
        if name != "rules"
    }
    _known("", raw, {*tables, "rule"})
    built: dict[str, Any] = {}
    for name, kind in tables.items():
        table = raw.get(name, {})
        if not isinstance(table, Mapping):
            raise ConfigurationError(f"`{name}` is {table!r}, not a table", remedy=f"write it as [{name}]")
        built[name] = _tracker(table) if name == "tracker" else _section(kind, name, table)
    if "rule" in raw:
        if not isinstance(raw["rule"], list):
            raise ConfigurationError(f"`rule` is {raw['rule']!r}", remedy="write each rule as [[rule]]")
        built["rules"] = tuple(_section(Rule, "rule", entry) for entry in raw["rule"])
    return Settings(**built)


def _check_ranges(settings: Settings) -> None:
    """Values of the right type that nothing could work with."""
    probe, watch = settings.probe, settings.watch
    least: dict[str, tuple[float, float]] = {
        "watch.settle_seconds": (watch.settle_seconds, 0),
        "watch.poll_seconds": (watch.poll_seconds, 0),
        "probe.fit_tokens": (probe.fit_tokens, 1),
        "probe.select_tokens": (probe.select_tokens, 1),
        "probe.confirm_tokens": (probe.confirm_tokens, 1),
        "tracker.max_series": (settings.tracker.max_series, 10),
    }
    for rule in settings.rules:
        least[f"rule.{rule.name}.for_checkpoints"] = (rule.raised_after, 1)
        least[f"rule.{rule.name}.clear_checkpoints"] = (rule.cleared_after, 1)
        if not re.fullmatch(r"[\w.-]{1,100}", rule.name):
            raise ConfigurationError(
                f"a rule is called `{rule.name}`", remedy="letters, digits, `_`, `-` and `.` make a rule's name"
            )
    if not 0 < settings.device.memory_fraction <= 1:
        raise ConfigurationError(
            f"`device.memory_fraction` is {settings.device.memory_fraction:g}", remedy="it must be above 0, at most 1"
        )
    if settings.peel.time_budget_seconds is not None:
        least["peel.time_budget_seconds"] = (settings.peel.time_budget_seconds, 0)
    for dotted, (value, bound) in least.items():
        if not bound <= value < float("inf"):
            raise ConfigurationError(f"`{dotted}` is {value:g}", remedy=f"it must be {bound:g} or more")
    names = [rule.name for rule in settings.rules]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigurationError(f"two rules are called `{min(twice)}`", remedy="give each rule a name of its own")


def _with_run_of_environment(settings: Settings) -> Settings:
    """MLFLOW_RUN_ID, which trainings set, names the run unless the configuration names one."""
    tracking, run_id = settings.tracker, os.environ.get("MLFLOW_RUN_ID")
    if run_id is None or "mlflow" not in tracking.use:
        return settings
    mlflow = {"run_id": run_id, **tracking.options.get("mlflow", {})}
    options = {**tracking.options, "mlflow": mlflow}
    return dataclasses.replace(settings, tracker=dataclasses.replace(tracking, options=options))


def _tracker(table: Mapping[str, Any]) -> TrackerSettings:
    options = {
        name: {key: _revealed(f"tracker.{name}.{key}", str(value)) for key, value in own.items()}
        for name, own in table.items()
        if isinstance(own, Mapping)
    }
    own = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    settings: TrackerSettings = _section(TrackerSettings, "tracker", own)
    return dataclasses.replace(settings, options=options)


def _section(kind: type, name: str, table: Mapping[str, Any]) -> Any:
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    _known(name, table, set(fields) - {"options"})
    values = {key: converted(f"{name}.{key}", fields[key], value) for key, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigurationError(f"[[{name}]] is not complete: {error}", remedy="add the keys named") from error


def _known(section: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key in known:
            continue
        dotted = f"{section}.{key}" if section else key
        if key in (RESERVED.get(section, set()) if section else RESERVED):
            raise ConfigurationError(
                f"`{dotted}` is not available in this version of peel-agent", remedy="take it out of the configuration"
            )
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigurationError(
            f"unknown key `{dotted}` in the configuration", remedy=f"{guess}known here: {', '.join(sorted(known))}"
        )


def _revealed(dotted: str, text: str) -> str:
    """A secret named by `${ENV}` or `file:PATH` is fetched; it is never printed, logged or stored."""
    if match := re.fullmatch(r"\$\{(\w+)\}", text):
        if match[1] not in os.environ:
            raise ConfigurationError(
                f"`{dotted}` names the environment variable {match[1]}, which is not set", remedy=f"set {match[1]}"
            )
        return os.environ[match[1]]
    if text.startswith("file:"):
        try:
            return Path(text.removeprefix("file:")).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigurationError(
                f"`{dotted}` names a file that cannot be read: {error.strerror}", remedy="check the path after file:"
            ) from error
    return text
