"""Notices as lines of a local file, for other programs to follow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import DestinationUnavailable
from peel_agent.records import NoticeGroup, plain
from peel_agent.spi import SinkPlugin, setting

from ..durable_lines import DurableLines  # noqa: TID252 -- shared by two kinds


@dataclass(frozen=True)
class JsonlSettings:
    """`[[sink]]` with use = "jsonl": the file, by default `notices.jsonl` in the agent's state folder."""

    path: Path | None = setting(None)


class JsonlSink:
    """One JSON object a line and group of notices: `id`, `run`, `at`, `notices`, `text`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = DurableLines(path)

    def deliver(self, group: NoticeGroup) -> None:
        try:
            self._lines.append(json.dumps(plain(group), sort_keys=True, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise DestinationUnavailable(
                f"notices cannot be written to {self._path}: {error.strerror or error}",
                remedy="make the file writable and its disk have room, or set the sink's path; it is tried again",
            ) from error

    def where(self) -> str:
        return f"notices in {self._path}"

    def close(self) -> None:
        self._lines.close()


class JsonlPlugin:
    name = "jsonl"
    settings = JsonlSettings

    def connect(self, settings: JsonlSettings, *, state_dir: Path) -> JsonlSink:
        return JsonlSink(settings.path or state_dir / "notices.jsonl")


PLUGIN: SinkPlugin = JsonlPlugin()
