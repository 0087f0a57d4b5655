"""The report page: a run's history."""

from __future__ import annotations

from typing import Any

from peel_agent.errors import printable
from peel_agent.records import History, Skipped, plain
from peel_agent.views.content import Content, content_of
from peel_agent.views.frame import MOST_ROWS, Provenance, Shown, cell, page, probe_words, shown
from peel_agent.views.specs import Chart
from peel_agent.views.table import DIGITS
from peel_agent.views.verdict import situation, verdict

SCHEMA = "peel-agent/history/1"

MOST_STEPS = 12
"""Columns of the table of margins."""


def report_page(history: History, provenance: Provenance) -> str:
    """The page of a history with at least one report. Raises ConfigurationError without the extra `report`."""
    content = content_of(history)
    return page(
        title="peel-agent report",
        schema=SCHEMA,
        data=_form(history, content, provenance),
        name=history.name,
        place=history.place,
        verdict=verdict(content.newest),
        situation=situation(content.newest, content.alerts, history),
        findings_heading="Found at the newest checkpoint",
        findings=_findings(content),
        charts=[(chart, _beside(chart, content)) for chart in content.charts],
        notes=_notes(history, content),
        unchecked=_unchecked(history, content),
        alerts=_alerts(content),
        reproduce=_reproduce(history, content, provenance),
    )


def _form(history: History, content: Content, provenance: Provenance) -> dict[str, Any]:
    """The data of the page."""
    newest = content.newest
    return {
        "schema": SCHEMA,
        "run": {"name": history.name, "place": history.place},
        "made": plain(provenance),
        "verdict": verdict(newest),
        "unit": newest.probe.unit,
        "significant_digits": DIGITS,
        "drawn": {"checkpoints": len(content.line.by_step), "in_detail": len(content.line.drawn)},
        "newest": {name: plain(getattr(newest, name)) for name in ("checkpoint", "model", "probe", "skipped")},
        "tables": {name: table.form() for name, table in content.tables.items()},
        "charts": {chart.key: {"tables": list(chart.tables), "spec": chart.spec} for chart in content.charts},
    }


# ---------------------------------------------------------------- tables for people


def _beside(chart: Chart, content: Content) -> Shown:
    """What a chart shows, for those who do not see it."""
    columns_of = {
        "loss": ("checkpoints", ("step", "loss", "loss_low", "loss_high", "bound", "gap", "zone", "below")),
        "alerts": ("alerts", ("rule", "subject", "severity", "since", "until", "state")),
        "gaps": ("gaps", ("step", "cause", "path", "why")),
        "shares": ("shares", ("layer", "name", "what", "share")),
        "redundancy": ("redundancy", ("first", "last", "cost")),
    }
    if chart.key == "heat_map":
        return _margins(content)
    if chart.key == "layer":
        return _newest_cells(content)
    name, columns = columns_of[chart.key]
    return shown(content.tables[name], columns)


def _margins(content: Content) -> Shown:
    """The margin and the status of each layer at some of the drawn checkpoints."""
    steps = content.line.drawn
    if len(steps) > MOST_STEPS:
        steps = tuple(dict.fromkeys(steps[round(n * (len(steps) - 1) / (MOST_STEPS - 1))] for n in range(MOST_STEPS)))
    margin_words = {
        (row[0], row[1]): f"{cell(row[3])} {row[6]}" for row in content.tables["cells"].rows if row[2] == "block"
    }
    rows = tuple(
        (str(index), str(name), *(margin_words.get((step, index), "not measured") for step in steps))
        for index, name in content.tables["layers"].rows
    )
    left = len(content.line.drawn) - len(steps)
    note = f"{len(steps)} of {len(content.line.drawn)} checkpoints; the data has all." if left else ""
    return Shown(("layer", "name", *(f"step {step:,}" for step in steps)), rows, note)


def _newest_cells(content: Content) -> Shown:
    """Every band of every layer at the newest checkpoint, with intervals."""
    names = {index: name for index, name in content.tables["layers"].rows}  # noqa: C416 -- rows of any length
    last = content.line.drawn[-1]
    rows = tuple(
        (cell(row[1]), cell(names.get(row[1])), *map(cell, (row[2], row[3], row[4], row[5], row[6], row[7])))
        for row in content.tables["cells"].rows
        if row[0] == last
    )
    note = f"At step {last:,}; earlier ones are in the data of this page."
    return Shown(("layer", "name", "of it", "margin", "low", "high", "status", "stand-in"), rows, note)


def _findings(content: Content) -> list[tuple[str, str, list[str]]]:
    """Subject, words and likely causes of each finding of the newest report."""
    newest = content.newest
    findings = [newest.finding, *(layer.finding for layer in newest.layers)]
    return [
        (printable(finding.subject), printable(finding.words), [printable(cause) for cause in finding.causes])
        for finding in findings
        if finding is not None
    ]


def _alerts(content: Content) -> list[tuple[str, str]]:
    """Rule with subject, and text, of each alert that fires."""
    firing = [alert for alert in content.alerts if not alert.is_over][-MOST_ROWS:]
    return [(printable(f"{alert.rule}: {alert.subject}"), printable(alert.text)) for alert in firing]


def _notes(history: History, content: Content) -> list[str]:
    """What is left out of the drawing, and why the axis is as it is."""
    line = content.line
    notes = []
    if history.left_out:
        notes.append(
            f"Left out, evenly over the run: {history.left_out:,} of {len(history.reports) + history.left_out:,} "
            "checkpoints. The command below makes a page of all."
        )
    if len(line.drawn) < len(line.by_step):
        notes.append(
            f"Thinned: {len(line.drawn)} of {len(line.by_step):,} checkpoints are drawn in detail: the first, the "
            "last, those at which an alert was told, and others evenly between. The data of this page has the margin "
            "of each layer at every checkpoint."
        )
    if line.repeated:
        notes.append(
            f"Reports of a step that was saved again later: {line.repeated:,}. The last of each step is shown."
        )
    without = sum(report.checkpoint.step is None for report in history.reports)
    if without:
        notes.append(f"Reports of an export without a step, which has no place on the axis: {without:,}.")
    if history.torn:
        notes.append(f"Times that a checkpoint changed while it was read, and was read again: {history.torn:,}.")
    return notes


def _unchecked(history: History, content: Content) -> list[tuple[str, str]]:
    """What was not checked, and why."""
    newest = content.newest
    rows = [
        (printable(skipped.what), printable(skipped.why)) for skipped in newest.skipped if isinstance(skipped, Skipped)
    ]
    blank = [layer.name for layer in newest.layers if layer.status == "not_measured"]
    if blank:
        rows.append((f"margins of {len(blank)} of {len(newest.layers)} layers", printable(", ".join(blank))))
    rows += [(printable(layer.name), printable(layer.hint)) for layer in newest.layers if layer.hint is not None]
    if newest.bound is None:
        rows.append(("the bound of the run", "no map was solved for this checkpoint"))
    if history.gaps is None:
        rows.append(("which checkpoints were missed", "a tracker does not know; the agent's state folder does"))
    if history.unreadable:
        rows.append((f"{history.unreadable} lines of the log of alerts", "they cannot be read"))
    unplaced = [gap for gap in history.gaps or () if gap.step is None]
    rows += [(printable(f"{gap.cause}: {gap.path}"), printable(gap.why)) for gap in unplaced[-MOST_ROWS:]]
    return rows


def _reproduce(history: History, content: Content, provenance: Provenance) -> list[tuple[str, str]]:
    """What somebody needs who wants the same numbers."""
    newest, model = content.newest, content.newest.model
    scans = [notice.command for notice in history.notices if notice.command]
    rows = [
        ("this page", provenance.command),
        ("one checkpoint", scans[-1] if scans else f"peel-agent scan {newest.checkpoint.path} --probe PROBE"),
        ("checkpoint", f"{newest.checkpoint.path} ({newest.checkpoint.format}, {newest.checkpoint.fingerprint})"),
        ("probe", probe_words(newest.probe)),
        ("model", f"{model.family}, {model.blocks} blocks, {model.parameters:,} parameters, {model.precision}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
        ("made", provenance.at),
    ]
    return [(what, printable(words)) for what, words in rows]
