"""A run's whole history, read from a ledger beside a running agent or without one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.errors import NoReport
from peel_agent.ledger.database import FILE, Database, open_beside
from peel_agent.records import Gap, GapCause, KeptRun

_CAUSES: dict[str, GapCause] = {
    "vanished": "rotated",
    "refused": "refused",
    "failed": "given up",
    "passed over": "overtaken",
}
"""By outcome."""


@dataclass(frozen=True)
class Extent:
    """How much of a history is meant: checkpoints that were written until this time, in Unix seconds, and the alerts up
    to a position of their log; of more reports than `most`, the first, the last, those at which an alert was told, and
    others evenly.
    """

    until: float = math.inf
    alerts_until: int | None = None
    most: int | None = None


def kept_run(state_dir: Path, name: str | None) -> KeptRun:
    """The run of this name; without a name the only one that is watched, or the only one there ever was.

    Raises NoReport when there is no such run, or several and no name; LedgerError and sqlite3.Error.
    """
    if not (state_dir / FILE).exists():
        raise NoReport(
            f"there is no report: no agent has kept anything in {state_dir}",
            remedy="name the directory that `peel-agent watch` was given, its file with -c, or its folder with --state",
        )
    with closing(open_beside(state_dir)) as database:
        rows = database.query("SELECT run, name, place, ended FROM runs ORDER BY name")
        return _kept(database, state_dir, _chosen(rows, name, state_dir), Extent())


def kept_run_of(state_dir: Path, key: str, extent: Extent) -> tuple[KeptRun, int]:
    """So much of the run of this key, and how many of its reports have a step. Raises NoReport when it has no reports;
    LedgerError and sqlite3.Error.
    """
    with closing(open_beside(state_dir)) as database:
        rows = database.query("SELECT run, name, place FROM runs WHERE run = ?", (key,))
        counted = "SELECT count(*) FROM checkpoints WHERE run = ? AND outcome = 'peeled' AND committed_at <= ? "
        (steps,) = database.query(counted + "AND step IS NOT NULL", (key, extent.until))[0]
        kept = _kept(database, state_dir, rows[0], extent) if rows else None
    if kept is None or not kept.reports:
        raise NoReport(f"there is no report of the run {key} in {state_dir}", remedy="wait for the next checkpoint")
    return kept, int(steps)


def _kept(database: Database, state_dir: Path, run: tuple[str, str, str], extent: Extent) -> KeptRun:
    key, name, place = run
    checkpoints = database.query(
        "SELECT path, step, outcome, detail FROM checkpoints WHERE run = ? AND committed_at <= ? "
        "ORDER BY committed_at, step",
        (key, extent.until),
    )
    position = extent.alerts_until
    alerts = database.query(
        "SELECT line FROM alerts WHERE run = ? AND (? IS NULL OR position <= ?) ORDER BY position",
        (key, position, position),
    )
    torn = database.query("SELECT amount FROM tallies WHERE run = ? AND what = 'torn'", (key,))
    lines = tuple(line for (line,) in alerts)
    wanted = _wanted([(detail, step) for _, step, outcome, detail in checkpoints if outcome == "peeled"], lines, extent)
    folder = state_dir / "runs" / key / "reports"
    reports: list[tuple[str, str]] = []
    gaps: list[Gap] = []
    left_out = 0
    for path, step, outcome, detail in checkpoints:
        if outcome != "peeled":
            gaps.append(Gap(step, path, _CAUSES[outcome], detail))
        elif wanted is not None and detail not in wanted:
            left_out += 1
        else:
            try:
                reports.append((detail, (folder / detail).read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                why = f"its report {folder / detail} cannot be read: {error}"
                gaps.append(Gap(step, path, "unreadable report", why))
    return KeptRun(name, place, tuple(reports), lines, tuple(gaps), int(torn[0][0]) if torn else 0, left_out)


def _wanted(peeled: Sequence[tuple[str, int | None]], alerts: Sequence[str], extent: Extent) -> set[str] | None:
    """The names of the reports that are chosen; None for all."""
    if extent.most is None or len(peeled) <= extent.most:
        return None
    told = {json.loads(line).get("step") for line in alerts} - {None}
    at_alerts = [name for name, step in peeled if step in told][-extent.most // 2 :]
    chosen = {peeled[0][0], peeled[-1][0], *at_alerts}
    left = extent.most - len(chosen)
    return chosen | {peeled[round(n * (len(peeled) - 1) / (left + 1))][0] for n in range(1, left + 1)}


def _chosen(rows: list[Any], name: str | None, state_dir: Path) -> tuple[str, str, str]:
    """Key, name and place of the one run that is meant."""
    fitting = [row for row in rows if name in (None, row[1])]
    if len(fitting) > 1:
        fitting = [row for row in fitting if not row[3]] or fitting
    if len(fitting) == 1:
        key, own_name, place, _ = fitting[0]
        return key, own_name, place
    names = ", ".join(sorted({row[1] for row in rows}))
    if not fitting:
        what = f"there is no run `{name}` in {state_dir}" if name else f"no run was watched yet with {state_dir}"
        if not rows:
            raise NoReport(
                what, remedy="start `peel-agent watch` with these settings; its first checkpoint brings a report"
            )
        raise NoReport(what, remedy=f"give one of these with --run: {names}")
    raise NoReport(
        f"{state_dir} holds {len(fitting)} runs, and a page shows one",
        remedy=f"give its name with --run: {names}",
    )
