"""Reads the settings: peel.toml, then the environment (`PEEL__SECTION__KEY`), then flags; the last one wins.

An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli

from peel_agent.config.conversion import converted
from peel_agent.config.environment import variable_of
from peel_agent.config.ranges import check_ranges
from peel_agent.config.sections import (
    DEFAULT_RULES,
    EngineSettings,
    RunSettings,
    Settings,
    SinkSettings,
    TrackerSettings,
)
from peel_agent.errors import ConfigurationError, printable
from peel_agent.records import Rule

PREFIX = "PEEL__"

LISTS = {"rule", "sink", "run"}
"""Tables that may come several times: `[[rule]]`."""

OF_A_RUN = ("watch", "model", "probe", "peel", "tracker", "rule")
"""What a `[[run]]` may have of its own; what it leaves out is that of the top level."""

Kind = TypeVar("Kind")


def load_settings(file: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Settings from a file (or none), the environment, and `flags` by dotted key; None among the flags is not given.

    Raises ConfigurationError naming the key, the value and the remedy.
    """
    return settings_from_tables(_read(file) if file is not None else {}, flags)


def settings_from_tables(tables: Mapping[str, Any], flags: Mapping[str, Any]) -> Settings:
    """As `load_settings`, from what a file holds."""
    raw = copy.deepcopy(dict(tables))
    for name, text in sorted(os.environ.items()):
        if name.startswith(PREFIX):
            keys = name.removeprefix(PREFIX).lower().split("__")
            _known_variable(name, keys)
            _put(raw, keys, text if len(keys) > 2 else _from_environment(text))  # a tracker's own options are text
    for dotted, value in flags.items():
        if value is not None:
            _put(raw, dotted.split("."), value)
    settings = _settings(raw)
    check_ranges(settings)
    return settings


def _known_variable(name: str, keys: list[str]) -> None:
    """A variable that names no key is told as a variable: the file is not where to look for it."""
    section = _SECTIONS.get(keys[0])
    if section is None or len(keys) != 2:
        return
    known = {f.name for f in dataclasses.fields(section)} - {"options", "flags"}
    if keys[1] in known:
        return
    near = difflib.get_close_matches(keys[1], known, n=1, cutoff=0.4)
    guess = f"did you mean {PREFIX}{keys[0].upper()}__{near[0].upper()}? " if near else ""
    raise ConfigurationError(
        f"the environment variable {name} sets no key that there is",
        remedy=f"{guess}[{keys[0]}] has: {', '.join(sorted(known))}",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomli.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the configuration {file}: {error.strerror}", remedy="check the path given with -c"
        ) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{file} is not valid TOML: {error}", remedy="repair that line; text stands in quotes"
        ) from error


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


_SECTIONS: dict[str, type] = {
    f.name: type(f.default) for f in dataclasses.fields(Settings) if dataclasses.is_dataclass(f.default)
}


def _settings(raw: Mapping[str, Any]) -> Settings:
    _known("", raw, {*_SECTIONS, *LISTS})
    sections = _sections(raw, tuple(_SECTIONS))
    sinks = tuple(_sink(entry) for entry in _entries(raw, "sink"))
    return Settings(**sections, rules=_rules(raw), sinks=sinks, runs=_runs(raw))


def _sections(raw: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    special = {"tracker": _tracker, "engine": _engine}
    return {
        name: special[name](_table(raw, name)) if name in special else section(_SECTIONS[name], name, _table(raw, name))
        for name in names
    }


def _table(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = raw.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigurationError(f"`{name}` is {table!r}, not a table", remedy=f"write it as [{name}]")
    return table


def _entries(raw: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    entries = raw.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigurationError(f"`{name}` is {entries!r}", remedy=f"write each {name} as [[{name}]]")
    return entries


def _rules(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    if "rule" not in raw:
        return DEFAULT_RULES
    return tuple(section(Rule, "rule", entry) for entry in _entries(raw, "rule"))


def _sink(entry: Mapping[str, Any]) -> SinkSettings:
    use = entry.get("use")
    if not isinstance(use, str):
        raise ConfigurationError("a [[sink]] does not say what it is", remedy='add a line such as use = "stderr"')
    options = {key: value for key, value in entry.items() if key not in ("use", "name")}
    return SinkSettings(use=use, name=converted("sink.name", "str", entry.get("name", use)), options=options)


def _runs(raw: Mapping[str, Any]) -> tuple[RunSettings, ...]:
    """A run for each `[[run]]`, its tables laid over those of the top level; else the one of the top level."""
    general = {name: raw[name] for name in OF_A_RUN if name in raw}
    if "run" not in raw:
        return (_run(general, None),) if _table(raw, "watch").get("path") is not None else ()
    runs = []
    for entry in _entries(raw, "run"):
        _known("run", entry, {"name", *OF_A_RUN})
        tables = {name: entry[name] for name in OF_A_RUN if name in entry}
        runs.append(_run(_over(general, tables), entry.get("name")))
    return tuple(runs)


def _run(raw: Mapping[str, Any], name: object) -> RunSettings:
    sections = _sections(raw, tuple(name for name in OF_A_RUN if name != "rule"))
    path = sections["watch"].path
    if path is None:
        raise ConfigurationError(
            f"[[run]] {name or ''} names no directory to watch", remedy="add it: [run.watch] path = ..."
        )
    derived = str(path).rstrip("/").rpartition("/")[2] or "run"
    return RunSettings(name=converted("run.name", "str", name or derived), rules=_rules(raw), **sections)


def _over(general: Mapping[str, Any], particular: Mapping[str, Any]) -> dict[str, Any]:
    """One raw configuration laid over another: a table key by key, anything else as a whole."""
    laid = dict(general)
    for key, value in particular.items():
        below = general.get(key)
        laid[key] = _over(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return laid


def _tracker(table: Mapping[str, Any]) -> TrackerSettings:
    flags = table.get("*", {})  # options of the command line
    common, options = _parted({name: value for name, value in table.items() if name != "*"})
    return dataclasses.replace(section(TrackerSettings, "tracker", common), options=options, flags=flags)


def _engine(table: Mapping[str, Any]) -> EngineSettings:
    common, options = _parted(table)
    return dataclasses.replace(section(EngineSettings, "engine", common), options=options)


def _parted(table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """The keys of a section, and the tables of plug-ins within it."""
    options = {name: value for name, value in table.items() if isinstance(value, Mapping)}
    return {key: value for key, value in table.items() if key not in options}, options


def section(kind: type[Kind], name: str, table: Mapping[str, Any]) -> Kind:
    """The record of a section from its table; ConfigurationError names a key that it has not, and what is wrong."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _known(name, table, set(fields) - {"options", "flags"})
    values = {key: converted(f"{name}.{key}", fields[key], value) for key, value in table.items()}
    lacks = [f"`{f.name}`" for f in dataclasses.fields(kind) if _is_needed(f) and f.name not in values]  # type: ignore[arg-type]
    if lacks:
        raise ConfigurationError(
            f"[[{name}]] is not complete: it lacks {', '.join(lacks)}",
            remedy=f"add {'them' if len(lacks) > 1 else 'it'}; deploy/examples/peel.toml shows each key",
        )
    return kind(**values)


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def plugin_settings(
    kind: type[Kind], name: str, table: Mapping[str, Any], *, from_environment: Mapping[str, str]
) -> Kind:
    """A plug-in's own settings from its table `name`; secrets are fetched, and what it leaves out is looked up.

    `from_environment` maps fields to the environment variables that they are taken from. White space around a text is
    no part of it: ids and addresses come out of files and other programs. A message about what was fetched shows the
    name that the table has for it: it may be a secret, at this key or meant for another.
    """
    variables = {key: variable_of(variable) for key, variable in from_environment.items()}
    looked_up = {key: text for key, text in variables.items() if text is not None}
    bare = {key: value.strip() if isinstance(value, str) else value for key, value in table.items()}
    revealed = {key: _revealed_in(f"{name}.{key}", value) for key, value in bare.items()}
    try:
        return section(kind, name, {**looked_up, **revealed})
    except ConfigurationError as error:
        names = dict(pair for key in bare for pair in _fetched(bare[key], revealed[key]))
        if not names:
            raise
        raise ConfigurationError(_by_name(error.what, names), remedy=_by_name(error.remedy, names)) from None


def _fetched(written: Any, revealed: Any) -> Iterator[tuple[str, str]]:
    """Each text that was fetched, with the name that stands for it in the table."""
    pairs = zip(written, revealed, strict=True) if isinstance(written, list) else [(written, revealed)]
    for name, text in pairs:
        if text != name and text:
            yield text, name


def _by_name(message: str, names: Mapping[str, str]) -> str:
    """The message with the name of each fetched text in place of the text, in whatever form a message has it."""
    for text, name in names.items():
        for form in (repr(text)[1:-1], printable(text), text):
            message = message.replace(form, name)
    return message


def _revealed_in(dotted: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_revealed_in(dotted, entry) for entry in value]
    return _revealed(dotted, value) if isinstance(value, str) else value


def _known(section: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key in known:
            continue
        dotted = f"{section}.{key}" if section else key
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        guess = f"did you mean `{near[0]}`? " if near else ""
        listed = f"known here: {', '.join(sorted(known))}" if known else "there are no keys here"
        raise ConfigurationError(f"unknown key `{dotted}` in the configuration", remedy=f"{guess}{listed}")


def _revealed(dotted: str, text: str) -> str:
    """A secret named by `${ENV}` or `file:PATH` is fetched; it is never printed, logged or stored."""
    if match := re.fullmatch(r"\$\{(\w+)\}", text):
        if match[1] not in os.environ:
            raise ConfigurationError(
                f"`{dotted}` names the environment variable {match[1]}, which is not set", remedy=f"set {match[1]}"
            )
        return os.environ[match[1]].strip()
    if text.startswith("file:"):
        try:
            return Path(text.removeprefix("file:")).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigurationError(
                f"`{dotted}` names a file that cannot be read: {error.strerror}", remedy="check the path after file:"
            ) from error
        except UnicodeDecodeError:
            raise ConfigurationError(
                f"`{dotted}` names a file that is not text",
                remedy="write the secret into it as UTF-8, and nothing else",
            ) from None
    return text
