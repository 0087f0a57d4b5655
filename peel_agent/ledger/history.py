"""A run's whole history, read from a ledger beside a running agent or without one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from peel_agent.errors import NoReport
from peel_agent.ledger.database import FILE, open_beside
from peel_agent.records import Gap, GapCause, KeptRun

_CAUSES: dict[str, GapCause] = {
    "vanished": "rotated",
    "refused": "refused",
    "failed": "given up",
    "passed over": "overtaken",
}
"""By outcome."""


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
        key, own_name, place = _chosen(rows, name, state_dir)
        checkpoints = database.query(
            "SELECT path, step, outcome, detail FROM checkpoints WHERE run = ? ORDER BY committed_at, step", (key,)
        )
        alerts = database.query("SELECT line FROM alerts WHERE run = ? ORDER BY position", (key,))
        torn = database.query("SELECT amount FROM tallies WHERE run = ? AND what = 'torn'", (key,))
    folder = state_dir / "runs" / key / "reports"
    reports: list[tuple[str, str]] = []
    gaps: list[Gap] = []
    for path, step, outcome, detail in checkpoints:
        if outcome != "peeled":
            gaps.append(Gap(step, path, _CAUSES[outcome], detail))
            continue
        try:
            reports.append((detail, (folder / detail).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            gaps.append(Gap(step, path, "unreadable report", f"its report {folder / detail} cannot be read: {error}"))
    return KeptRun(
        own_name, place, tuple(reports), tuple(line for (line,) in alerts), tuple(gaps), int(torn[0][0]) if torn else 0
    )


def _chosen(rows: list[Any], name: str | None, state_dir: Path) -> tuple[str, str, str]:
    """Key, name and place of the one run that is meant."""
    fitting = [row for row in rows if name in (None, row[1])]
    if len(fitting) > 1:
        fitting = [row for row in fitting if not row[3]] or fitting
    if len(fitting) == 1:
        key, own_name, place, _ = fitting[0]
        return key, own_name, place
    names = ", ".join(sorted({row[1] for row in rows})) or "none"
    if not fitting:
        what = f"there is no run `{name}` in {state_dir}" if name else f"no run was watched yet with {state_dir}"
        raise NoReport(what, remedy=f"runs that are there: {names}; give one with --run, or ask again later")
    raise NoReport(
        f"{state_dir} holds {len(fitting)} runs, and a page shows one",
        remedy=f"give its name with --run: {names}",
    )
