"""The report and its notices as JSON: the contract's `peel-agent/report/1`, there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from peel_agent.records import SCHEMA, Notice, PeelReport, plain, restored


def report_line(report: PeelReport) -> str:
    """The report as one line of JSON, without the newline. ValueError for a NaN or an infinity."""
    return json.dumps({"schema": report.schema, **plain(report)}, allow_nan=False)


def report_json(report: PeelReport) -> dict[str, Any]:
    """The report as plain JSON values: objects, lists, strings and numbers. ValueError for a NaN or an infinity."""
    return cast("dict[str, Any]", json.loads(report_line(report)))


def alert_line(notice: Notice) -> str:
    """A notice as one line of `alerts.jsonl`, without the newline."""
    return json.dumps(plain(notice), allow_nan=False)


def report_from_json(form: Mapping[str, Any]) -> PeelReport:
    """The report whose `report_json` this is, of this version or an older one. ValueError for another schema."""
    if form["schema"] != SCHEMA:
        raise ValueError(f"a report of schema {form['schema']!r}; this version reads {SCHEMA!r}")
    return restored(PeelReport, {**form, "alerts": [_with_subject(alert) for alert in form.get("alerts", ())]})


def notice_from_json(form: Mapping[str, Any]) -> Notice:
    """The notice of one line of `alerts.jsonl`, of this version or an older one."""
    return restored(Notice, _with_subject(form))


def _with_subject(form: Mapping[str, Any]) -> Mapping[str, Any]:
    # An alert was about a whole block before there were parts, and called it `layer`.
    return {"subject": form["layer"], **form} if "layer" in form else form
