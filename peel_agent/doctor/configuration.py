"""The configuration as far as it can be read: what is wrong is named, and the rest is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli

from peel_agent.config import Settings, load_settings, settings_from_tables
from peel_agent.errors import PeelError, printable
from peel_agent.records import Check
from peel_agent.sources import with_absolute_places

WHAT = "configuration"


def read_configuration(file: Path | None, flags: Mapping[str, Any]) -> tuple[Settings, tuple[Check, ...]]:
    """The settings, with every place absolute, and what is to be said of the configuration.

    Of one that is wrong, every table, key and flag is used that is right by itself.
    """
    try:
        settings = load_settings(file, flags)
    except PeelError as error:
        settings, faults = _salvaged(file, flags)
        return with_absolute_places(settings), faults or (failed(WHAT, error),)
    runs = f"{len(settings.runs)} runs" if len(settings.runs) != 1 else f"one run, {settings.runs[0].name}"
    words = f"{file or 'no file'} can be read: {runs}"
    if settings.runs:
        return with_absolute_places(settings), (Check(WHAT, True, words),)
    remedy = "give the directory: peel-agent doctor PATH, or [watch] path in peel.toml (`peel-agent init` writes one)"
    return settings, (Check(WHAT, False, f"{words}; there is no directory to watch", remedy),)


def failed(what: str, error: PeelError) -> Check:
    """The check of what raised this error."""
    return Check(what, False, error.what, error.remedy)


def _salvaged(file: Path | None, flags: Mapping[str, Any]) -> tuple[Settings, tuple[Check, ...]]:
    right: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    faults: list[Check] = []
    settings = Settings()
    pieces: list[tuple[tuple[str, ...] | str, Any]] = [((), None), *_pieces(_tables(file)), *flags.items()]
    for keys, value in pieces:
        tables, given = copy.deepcopy(right)  # apart: the environment is over the one, and under the other
        if isinstance(keys, str):
            given[keys] = value
        elif keys:
            _put(tables, keys, value)
        try:
            settings = settings_from_tables(tables, given)
        except PeelError as error:
            fault = failed(WHAT, error)
            faults += [] if fault in faults else [fault]
        else:
            right = tables, given
    if file is not None and not any(right):  # nothing of it could be used: it says why
        try:
            load_settings(file, {})
        except PeelError as error:
            faults.insert(0, failed(WHAT, error))
    return settings, tuple(dict.fromkeys(faults))


def _tables(file: Path | None) -> dict[str, Any]:
    try:
        return {} if file is None else tomli.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _pieces(tables: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each table key by key, each entry of a list of tables, and everything else as a whole."""
    for name, value in tables.items():
        if isinstance(value, Mapping) and value:
            yield from (((name, key), setting) for key, setting in value.items())
        elif isinstance(value, list):
            yield from (((name,), [entry]) for entry in value)
        else:
            yield (name,), value


def _put(tables: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        tables = tables.setdefault(key, {})
    before = tables.get(keys[-1])
    tables[keys[-1]] = [*before, *value] if isinstance(before, list) and isinstance(value, list) else value


def name_of(run: str, *, alone: bool) -> str:
    """What the checks of one run are called, before the thing itself; nothing when it is the only run."""
    return "" if alone else f"{printable(run)}: "
