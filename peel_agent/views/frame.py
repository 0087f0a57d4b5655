"""The frame of a page: one HTML file that asks no network for anything, under a policy that allows none.

Names come from checkpoints, which are hostile: the template escapes every text, the data is a script of JSON in which
no tag can end, and no script runs but the two whose hashes the policy names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from peel_agent.errors import ConfigurationError, printable
from peel_agent.records import ProbeInfo
from peel_agent.views.drawing import EXTRA, vega_script
from peel_agent.views.specs import Chart
from peel_agent.views.table import Table, Value

MOST_ROWS = 200
"""Of a table beside a chart; the embedded data has all."""


@dataclass(frozen=True)
class Provenance:
    """How the page was made: with which `command`, when (`at`, in words), and by which `versions` of what."""

    command: str
    at: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Shown:
    """A table for people."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def page(
    *,
    title: str,
    schema: str,
    data: Mapping[str, Any],
    name: str,
    place: str,
    verdict: str,
    situation: Sequence[str],
    findings_heading: str,
    findings: Sequence[tuple[str, str, list[str]]],
    charts: Sequence[tuple[Chart, Shown]],
    notes: Sequence[str],
    unchecked: Sequence[tuple[str, str]],
    reproduce: Sequence[tuple[str, str]],
    alerts: Sequence[tuple[str, str]] = (),
) -> str:
    """The page of these texts, and of `data`, which has the charts' tables.

    `findings_heading` is the heading above the `findings`, each a subject, words and causes. Raises as `vega_script`.
    """
    scripts = {"vega": vega_script(), "own": _asset("page.js")}
    style = _asset("page.css")
    text = _template().render(
        scripts=scripts,
        style=style,
        policy=_policy(scripts, style),
        data=_embedded(data),
        title=title,
        name=printable(name),
        place=printable(place),
        verdict=printable(verdict),
        situation=[printable(sentence) for sentence in situation],
        findings_heading=findings_heading,
        findings=findings,
        charts=charts,
        notes=notes,
        unchecked=unchecked,
        alerts=alerts,
        reproduce=reproduce,
        schema=schema,
    )
    return str(text)


def _asset(name: str) -> str:
    return (files("peel_agent.views") / name).read_text(encoding="utf-8").strip("\n")


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ConfigurationError(f"the report page needs what is not installed: {error}", remedy=EXTRA) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("page.html"))


def _policy(scripts: Mapping[str, str], style: str) -> str:
    """Nothing is fetched, framed or sent; only these very scripts and this style count."""
    allowed = " ".join(_hash(script) for script in scripts.values())
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(form: Mapping[str, Any]) -> str:
    """The data as JSON in which no tag and no comment can begin or end."""
    text = json.dumps(_clean_all(form), allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean_all(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _clean_all(entry) for key, entry in value.items()}
    return [_clean_all(entry) for entry in value] if isinstance(value, list) else value


def shown(table: Table, columns: Sequence[str]) -> Shown:
    """Some columns of a table beside a chart, the last MOST_ROWS of its rows."""
    places = [table.columns.index(name) for name in columns]
    rows = tuple(tuple(cell(row[place]) for place in places) for row in table.rows[-MOST_ROWS:])
    left = len(table.rows) - len(rows)
    note = f"The last {len(rows)} of {len(table.rows):,} rows; the data of this page has all." if left else ""
    return Shown(tuple(name.replace("_", " ") for name in columns), rows, note)


def probe_words(probe: ProbeInfo) -> str:
    """What somebody needs to know of a probe who wants the same numbers."""
    return (
        f"{probe.fingerprint}: {probe.fit_tokens:,} tokens to fit, {probe.select_tokens:,} to select, "
        f"{probe.confirm_tokens:,} to confirm, in sequences of {probe.sequence_length}"
    )


def cell(value: Value) -> str:
    """A value in a table for people."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
