"""A history from what was kept of it: each report and each notice is read with care, and what is unfit is named."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, NoReturn, cast

from peel_agent.errors import printable
from peel_agent.publish.form import notice_from_json, report_from_json
from peel_agent.records import Gap, History, KeptRun, Notice, PeelReport

_UNFIT = (ValueError, TypeError, KeyError, AttributeError, RecursionError, StopIteration)
"""What a form raises that is no report: it may come from a tracker that others write to."""

MOST_LAYERS = 4096
LARGEST = 1e300
"""Of a report that can be drawn; an infinity is larger."""


def history_of(kept: KeptRun) -> History:
    """The reports and notices; a report that cannot be read becomes a gap that says why."""
    reports: list[PeelReport] = []
    lost: list[Gap] = []
    for name, text in kept.reports:
        try:
            reports.append(_report(text))
        except _UNFIT as error:
            why = printable(f"it is no report that this version reads: {error}")
            lost.append(Gap(None, printable(name), "unreadable report", why))
    notices: list[Notice] = []
    unreadable = 0
    for line in kept.alerts:
        try:
            notices.append(_notice(line))
        except _UNFIT:
            unreadable += 1
    gaps = None if kept.gaps is None and not lost else (*(kept.gaps or ()), *lost)
    return History(kept.name, kept.place, tuple(reports), tuple(notices), gaps, kept.torn, unreadable, kept.left_out)


def _report(text: str) -> PeelReport:
    form = json.loads(text, parse_constant=_no_number)
    _must_be(isinstance(form, dict), "it is no object")
    report = report_from_json(form)
    _must_fit(PeelReport, report, "it")
    _must_be(report.checkpoint.step is None or _is_place(report.checkpoint.step), "its step is no step")
    _must_be(all(0 <= layer.index < MOST_LAYERS for layer in report.layers), "a layer has no usable index")
    _must_be(len(report.redundancy or ()) <= MOST_LAYERS, "its redundancy is of too many layers")
    return report


def _notice(line: str) -> Notice:
    form = json.loads(line, parse_constant=_no_number)
    _must_be(isinstance(form, dict), "it is no object")
    notice = notice_from_json(form)
    _must_fit(Notice, notice, "it")
    _must_be(all(step is None or _is_place(step) for step in (notice.step, notice.since_step)), "a step is no step")
    return notice


def _must_fit(hint: Any, value: Any, what: str) -> None:
    """ValueError unless a decoded value is of this annotation: JSON may have anything in any place."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is not None or type(None) not in arguments:
            _must_fit(next(option for option in arguments if option is not type(None)), value, what)
    elif dataclasses.is_dataclass(hint):
        _must_be(isinstance(value, cast("type", hint)), f"{what} is missing or of another kind")
        for name, annotation in _hints(cast("type", hint)).items():
            _must_fit(annotation, getattr(value, name), name)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        _must_be(isinstance(value, Mapping), f"{what} is no object")
        for key, entry in value.items():
            _must_fit(arguments[0], key, what)
            _must_fit(arguments[1], entry, f"{what}[{key}]")
    elif origin is tuple:
        _must_be(isinstance(value, tuple), f"{what} is no list")
        for entry in value:
            _must_fit(arguments[0], entry, f"an entry of {what}")
    else:
        _must_be_plain(hint, value, what)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _must_be_plain(hint: Any, value: Any, what: str) -> None:
    """The same of a number, a truth or a text."""
    is_bool = isinstance(value, bool)
    if hint is bool:
        _must_be(is_bool, f"{what} is neither true nor false")
    elif hint in (int, float):
        is_number = isinstance(value, int if hint is int else (int, float)) and not is_bool
        _must_be(is_number and abs(value) < LARGEST, f"{what} is no {'whole number' if hint is int else 'number'}")
    else:  # text, or one of some texts: a later version may have more of them
        _must_be(isinstance(value, str), f"{what} is no text")


def _is_place(step: int) -> bool:
    """Whether a step can be drawn: a browser's numbers are whole up to here."""
    return 0 <= step < 2**53


def _must_be(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}")
