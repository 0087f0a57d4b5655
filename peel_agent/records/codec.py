"""One way from a record to plain JSON values and back, told by the record's own type annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

Record = TypeVar("Record")


def plain(value: object) -> Any:
    """A record as JSON values: objects, lists, texts and numbers; paths become texts, sets sorted lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    if isinstance(value, frozenset):
        return sorted(plain(entry) for entry in value)
    return str(value) if isinstance(value, Path) else value


def restored(kind: type[Record], form: Mapping[str, Any]) -> Record:
    """The record of this dataclass whose `plain` form has been through JSON.

    Keys that an older version did not write get the field's default; keys that the dataclass does not have are passed
    over. TypeError for a key that is missing and has no default.
    """
    hints = _hints(cast("type", kind))
    return kind(**{name: decoded(hints[name], form[name]) for name in hints if name in form})


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def decoded(hint: Any, value: Any) -> Any:
    """The value of this type annotation whose `plain` form has been through JSON."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return decoded(_fitting([argument for argument in arguments if argument is not type(None)], value), value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return restored(hint, cast("Mapping[str, Any]", value))
    if isinstance(origin, type):
        return _collection(origin, arguments, value)
    return Path(value) if hint is Path else value


def _collection(origin: type, arguments: tuple[Any, ...], value: Any) -> Any:
    if origin is tuple:
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(decoded(hint, entry) for hint, entry in zip(inner, value, strict=True))
    if origin is frozenset:
        return frozenset(decoded(arguments[0], entry) for entry in value)
    return {key: decoded(arguments[1], entry) for key, entry in value.items()} if issubclass(origin, Mapping) else value


def _fitting(kinds: list[Any], value: Any) -> Any:
    """Which member of a union a plain value is: the dataclass that has most of its keys, a tuple for a list."""
    if isinstance(value, Mapping):
        records = [cast("type", kind) for kind in kinds if dataclasses.is_dataclass(kind)]
        return max(records, key=lambda kind: len(set(value) & set(_hints(kind))), default=kinds[0])
    if isinstance(value, list):
        return next(kind for kind in kinds if typing.get_origin(kind) is tuple)
    return next((kind for kind in kinds if kind is Path or not dataclasses.is_dataclass(kind)), kinds[0])
