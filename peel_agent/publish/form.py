"""The report and its notices as JSON: the contract's `peel-agent/report/1`, there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from peel_agent.records import (
    SCHEMA,
    BoundReport,
    CheckpointInfo,
    Estimate,
    LayerReport,
    ModelInfo,
    Notice,
    PartReport,
    PeelReport,
    ProbeInfo,
    Skipped,
    Timing,
)


def report_line(report: PeelReport) -> str:
    """The report as one line of JSON, without the newline. ValueError for a NaN or an infinity."""
    return json.dumps({"schema": report.schema, **_plain(report)}, allow_nan=False)


def report_json(report: PeelReport) -> dict[str, Any]:
    """The report as plain JSON values: objects, lists, strings and numbers. ValueError for a NaN or an infinity."""
    return cast("dict[str, Any]", json.loads(report_line(report)))


def alert_line(notice: Notice) -> str:
    """A notice as one line of `alerts.jsonl`, without the newline."""
    return json.dumps(_plain(notice), allow_nan=False)


def report_from_json(form: Mapping[str, Any]) -> PeelReport:
    """The report whose `report_json` this is. ValueError for another schema."""
    if form["schema"] != SCHEMA:
        raise ValueError(f"a report of schema {form['schema']!r}; this version reads {SCHEMA!r}")
    redundancy = form["redundancy"]
    return PeelReport(
        checkpoint=CheckpointInfo(**form["checkpoint"]),
        model=ModelInfo(**form["model"]),
        probe=ProbeInfo(**form["probe"]),
        loss=Estimate(**form["loss"]),
        bound=_estimate(form["bound"]),
        gap=_estimate(form["gap"]),
        zone=form["zone"],
        bounds=tuple(_bound(bound) for bound in form["bounds"]),
        layers=tuple(_layer(layer) for layer in form["layers"]),
        skipped=tuple(Skipped(**skipped) for skipped in form["skipped"]),
        timing=Timing(**form["timing"]),
        redundancy=None if redundancy is None else tuple(tuple(row) for row in redundancy),
        alerts=tuple(Notice(**alert) for alert in form["alerts"]),
        schema=form["schema"],
    )


def _plain(record: object) -> Any:
    # Not dataclasses.asdict: it copies what is not a dict, and a read-only Mapping cannot be copied.
    if is_dataclass(record):
        return {field.name: _plain(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, Mapping):
        return {key: _plain(value) for key, value in record.items()}
    if isinstance(record, tuple):
        return [_plain(value) for value in record]
    return record


def _estimate(form: Mapping[str, float] | None) -> Estimate | None:
    return None if form is None else Estimate(**form)


def _bound(form: Mapping[str, Any]) -> BoundReport:
    return BoundReport(**{**form, "map": tuple(form["map"]), "value": Estimate(**form["value"])})


def _layer(form: Mapping[str, Any]) -> LayerReport:
    parts = {
        name: PartReport(part["status"], _estimate(part["margin"]), _estimate(part.get("headroom")))
        for name, part in form["parts"].items()
    }
    estimates = {name: _estimate(form[name]) for name in ("margin", "headroom")}
    return LayerReport(**{**form, **estimates, "parts": parts})
