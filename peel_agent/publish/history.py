"""A history from what was kept of it: each report and each notice is read with care, and what is unfit is named."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from peel_agent.errors import printable
from peel_agent.publish.form import notice_from_json, report_from_json
from peel_agent.records import Estimate, Gap, History, KeptRun, Notice, PeelReport

_UNFIT = (ValueError, TypeError, KeyError, AttributeError, RecursionError, StopIteration)
"""What a form raises that is no report: it may come from a tracker that others write to."""


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
    return History(kept.name, kept.place, tuple(reports), tuple(notices), gaps, kept.torn, unreadable)


def _report(text: str) -> PeelReport:
    form = json.loads(text, parse_constant=_no_number)
    _must_be(isinstance(form, dict), "it is no object")
    report = report_from_json(form)
    _must_be(report.checkpoint.step is None or _is_whole(report.checkpoint.step), "its step is no whole number")
    _must_be(isinstance(report.zone, str) and isinstance(report.checkpoint.path, str), "a name in it is no text")
    _must_be(report.loss is not None, "it has no loss")
    estimates = [report.loss, report.bound, report.gap, *(bound.value for bound in report.bounds)]
    for layer in report.layers:
        _must_be(_is_whole(layer.index), "the index of a layer is no whole number")
        texts = (layer.name, layer.status, layer.best_reference or "")
        _must_be(all(isinstance(one, str) for one in texts), "a name in it is no text")
        estimates += [layer.margin, layer.headroom, layer.progress, *(part.margin for part in layer.parts.values())]
        shares = (layer.quantization_share, layer.optimization_share)
        _must_be(all(one is None or _is_number(one) for one in shares), "a share is no number")
    for row in report.redundancy or ():
        _must_be(all(map(_is_number, row)), "redundancy holds what is no number")
    _must_be(all(map(_is_sound, estimates)), "an estimate is no number")
    return report


def _notice(line: str) -> Notice:
    form = json.loads(line, parse_constant=_no_number)
    _must_be(isinstance(form, dict), "it is no object")
    notice = notice_from_json(form)
    _must_be(all(one is None or _is_whole(one) for one in (notice.step, notice.since_step)), "a step is no number")
    texts = (notice.rule, notice.severity, notice.state, notice.subject, notice.text)
    _must_be(all(isinstance(one, str) for one in texts), "a name in it is no text")
    return notice


def _is_sound(estimate: Estimate | None) -> bool:
    return estimate is None or all(map(_is_number, (estimate.value, estimate.low, estimate.high)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _must_be(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}")
