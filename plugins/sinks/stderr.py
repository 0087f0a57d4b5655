"""Notices as lines on stderr: for terminals, and for what collects the output of a service."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import DestinationUnavailable
from peel_agent.records import NoticeGroup
from peel_agent.spi import SinkPlugin


@dataclass(frozen=True)
class StderrSettings:
    """It has none."""


class StderrSink:
    def deliver(self, group: NoticeGroup) -> None:
        try:
            sys.stderr.write(group.text + "\n")
            sys.stderr.flush()
        except (OSError, ValueError) as error:
            raise DestinationUnavailable(
                f"stderr cannot be written to: {error}", remedy="nothing to do: it is tried again"
            ) from error

    def where(self) -> str:
        return "stderr"

    def close(self) -> None:
        """It stays open."""


class StderrPlugin:
    name = "stderr"
    settings = StderrSettings

    def connect(self, settings: StderrSettings, *, state_dir: Path) -> StderrSink:  # noqa: ARG002 -- the protocol's
        return StderrSink()


PLUGIN: SinkPlugin = StderrPlugin()
