"""A run as it is looked back on: its reports in order, what was told, and which checkpoints have no report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peel_agent.records.report import Notice, PeelReport

GapCause = Literal["rotated", "refused", "given up", "overtaken", "unreadable report"]
"""Why a checkpoint has no report: removed before it was peeled; not usable; given up after its worker died; passed over
for a newer one; or its report was removed or damaged later.
"""


@dataclass(frozen=True)
class Gap:
    """A checkpoint without a report: its `path`, and `why` in words."""

    step: int | None
    path: str
    cause: GapCause
    why: str


@dataclass(frozen=True)
class KeptRun:
    """A run as it was kept: the JSON text of each report by its file's name, in order, and the log of alerts as lines.

    `gaps` is None where nobody knows which checkpoints were missed. `torn` counts those that changed while they were
    read, and were read again, `left_out` those whose reports are there and were left out, evenly over the run.
    """

    name: str
    place: str
    reports: tuple[tuple[str, str], ...]
    alerts: tuple[str, ...]
    gaps: tuple[Gap, ...] | None = None
    torn: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class History:
    """A run's `reports`, oldest first, and its notices in the order in which they were told; the rest as of a KeptRun.

    `unreadable` counts lines of the log of alerts that could not be read.
    """

    name: str
    place: str
    reports: tuple[PeelReport, ...]
    notices: tuple[Notice, ...] = ()
    gaps: tuple[Gap, ...] | None = None
    torn: int = 0
    unreadable: int = 0
    left_out: int = 0
