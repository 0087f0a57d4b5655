"""Which earlier reports a report may be held against."""

from __future__ import annotations

from collections.abc import Iterable

from peel_agent.records import PeelReport


def lineage(reports: Iterable[PeelReport], step: int | None) -> tuple[PeelReport, ...]:
    """The reports that lead to `step`, oldest first: after a roll-back those of the abandoned steps are left out.

    `reports` are in the order in which their checkpoints were written.
    """
    line: list[PeelReport] = []
    for report in reports:
        at = report.checkpoint.step
        if at is None:
            continue
        while line and (line[-1].checkpoint.step or 0) >= at:
            line.pop()
        line.append(report)
    return tuple(report for report in line if step is not None and (report.checkpoint.step or 0) < step)


def comparable(history: Iterable[PeelReport], report: PeelReport) -> tuple[PeelReport, ...]:
    """Those of the same model, whose numbers come from the same probe."""
    model, probe = report.model, report.probe.fingerprint
    return tuple(
        earlier
        for earlier in history
        if (earlier.model.blocks, earlier.model.parameters, earlier.probe.fingerprint)
        == (model.blocks, model.parameters, probe)
    )
