"""Notices as lines on stderr: for terminals, for the journal, and for what collects the output of a service."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from peel_agent.errors import DestinationUnavailable, printable
from peel_agent.records import Notice, NoticeGroup
from peel_agent.spi import SinkPlugin, setting

PRIORITIES = {"critical": 3, "warning": 4, "info": 6}
"""syslog's: error, warning, information."""

RESOLVED = 5


@dataclass(frozen=True)
class StderrSettings:
    """`[[sink]]` with use = "stderr": whether lines begin with a priority, as systemd's journal reads them.

    By default they do where `journal_stream`, `device:inode`, names our own stderr, as systemd has it.
    """

    journal: bool = setting(False)
    journal_stream: str | None = setting(None, environment="JOURNAL_STREAM")


class StderrSink:
    def __init__(self, settings: StderrSettings) -> None:
        self._settings = settings

    def deliver(self, group: NoticeGroup) -> None:
        lines = [printable(line) for line in group.text.splitlines()]
        if self._settings.journal or _is_stderr(self._settings.journal_stream):
            lines = [f"<{priority}>{line}" for priority, line in zip(_priorities(group, lines), lines, strict=True)]
        try:
            sys.stderr.write("".join(f"{line}\n" for line in lines))
            sys.stderr.flush()
        except (OSError, ValueError) as error:
            raise DestinationUnavailable(
                f"stderr cannot be written to: {error}", remedy="nothing to do: it is tried again"
            ) from error

    def where(self) -> str:
        return "stderr"

    def close(self) -> None:
        """It stays open."""


def _priorities(group: NoticeGroup, lines: Sequence[str]) -> Sequence[int]:
    """One a line: that of its notice, or the most urgent of all where it cannot be told whose line it is."""
    priorities = [_priority(notice) for notice in group.notices]
    notices = list(accumulate(not line.startswith(" ") for line in lines))  # what goes on is indented
    if not notices or notices[0] != 1 or notices[-1] != len(priorities):
        return [min(priorities, default=RESOLVED)] * len(lines)
    return [priorities[notice - 1] for notice in notices]


def _priority(notice: Notice) -> int:
    return PRIORITIES[notice.severity] if notice.state == "firing" else RESOLVED


def _is_stderr(stream: str | None) -> bool:
    try:
        about = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # it is closed, or no file
        return False
    return stream == f"{about.st_dev}:{about.st_ino}"


class StderrPlugin:
    name = "stderr"
    settings = StderrSettings

    def connect(self, settings: StderrSettings, *, state_dir: Path) -> StderrSink:  # noqa: ARG002 -- the protocol's
        return StderrSink(settings)


PLUGIN: SinkPlugin = StderrPlugin()
