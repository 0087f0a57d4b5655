"""What a value of the configuration must be, and how it is read from TOML, a flag or the environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peel_agent.errors import ConfigurationError
from peel_agent.records import CHECKPOINTS, ID_DTYPES, SETS, Precision, WeightSet

CHOICES = {
    "probe.dtype": ID_DTYPES,
    "peel.effort": ("quick", "standard", "full"),
    "peel.solver": ("closed_form", "descent", "descent_cold"),
    "peel.quantities": ("margin", "bounds", "headroom", "redundancy"),
    "rule.kind": tuple(CHECKPOINTS),
    "rule.severity": ("info", "warning", "critical"),
    "rule.op": ("<", "<=", ">", ">="),
    "log.format": ("text", "json"),
    "log.level": ("info", "warning", "error"),
}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    """Text; a number stands for itself, since an id may be all digits."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        raise TypeError
    return str(value)


def _path(value: Any) -> Path:
    return Path(value).expanduser()


def _device(value: Any) -> str:
    if not re.fullmatch(r"auto|cpu|cuda:\d+|(GPU|MIG)-[\w-]+", str(value)):
        raise ValueError
    return str(value)


def _backlog(value: Any) -> str:
    if not re.fullmatch(r"latest|all|every:[1-9]\d{0,8}", str(value)):
        raise ValueError
    return str(value)


def _factory(value: Any) -> str | None:
    if value == "auto":
        return None
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", str(value)):
        raise ValueError
    return str(value)


def _maps(value: Any) -> str | tuple[tuple[int, ...], ...]:
    if isinstance(value, str):
        return value
    return tuple(tuple(_whole(entry) for entry in target_map) for target_map in value)


def _precision(value: Any) -> Precision:
    if not isinstance(value, Mapping):
        raise TypeError
    return {glob: WeightSet.named(str(name)) for glob, name in value.items()}


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[str(value).lower()]


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        raise TypeError
    return tuple(_text(entry).strip() for entry in (value.split(",") if isinstance(value, str) else value))


CONVERTERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (_text, "text"),
    "str | None": (_text, "text"),
    "bool": (_truth, "true or false"),
    "int": (_whole, "a whole number"),
    "int | None": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "float | None": (_number, "a number"),
    "Path | None": (_path, "a path"),
    "tuple[str, ...]": (_texts, "a list of names"),
    "tuple[str, ...] | None": (_texts, "a list of names"),
    "str | tuple[tuple[int, ...], ...]": (_maps, "the name of a suite or a list of maps such as [[1, 4], [2, 4]]"),
    "Precision": (_precision, f'a table such as {{ "model.layers.*_proj.weight" = "ternary" }}, with sets like {SETS}'),
    "Backlog | None": (_backlog, "latest, all, or every:N with a whole number N"),
    "Factory | None": (_factory, "auto, or package.module:callable"),
    "Device": (_device, "auto, cpu, cuda:N, or a GPU's uuid as nvidia-smi -L prints it"),
    "RuleKind": (_text, "a rule kind"),
    "Severity": (_text, "a severity"),
    "Operator": (_text, "an operator"),
}


def converted(dotted: str, kind: str, value: Any) -> Any:
    convert, words = CONVERTERS[kind]
    try:
        converted = convert(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigurationError(f"`{dotted}` is {value!r}", remedy=f"it must be {words}") from error
    choices = CHOICES.get(dotted)
    wrong = [
        choice
        for choice in (converted if isinstance(converted, tuple) else (converted,))
        if choices and choice not in choices
    ]
    if choices and wrong:
        raise ConfigurationError(f"`{dotted}` is `{wrong[0]}`", remedy=f"it must be one of: {', '.join(choices)}")
    return converted
