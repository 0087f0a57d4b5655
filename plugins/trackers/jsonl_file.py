"""Publications as lines of a local file: for runs without a tracking server, and for other programs to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import DestinationUnavailable
from peel_agent.records import Check, Publication
from peel_agent.spi import TrackerPlugin, setting

from ..durable_lines import DurableLines  # noqa: TID252 -- shared by two kinds
from .local_files import try_to_write


@dataclass(frozen=True)
class JsonlSettings:
    """`[tracker.jsonl]`: the file, by default `publications.jsonl` in the run's own state folder."""

    path: Path | None = setting(None)


class JsonlTracker:
    """A JSON object for each publication: `step`, `timestamp_ms`, `metrics`, `tags`, `files`, and any `headline`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = DurableLines(path)

    def prepare(self) -> None:
        """It needs none."""

    def publish(self, publication: Publication) -> None:
        try:
            self._lines.append(_line(publication))
        except OSError as error:
            raise DestinationUnavailable(
                f"publications cannot be written to {self._path}: {error.strerror or error}",
                remedy="make the file writable and its disk have room, or set [tracker.jsonl] path; it is tried again",
            ) from error

    def where(self) -> str:
        return f"publications in {self._path}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        try:
            try_to_write(self._path)
        except OSError as error:
            return (
                Check(
                    "file",
                    False,
                    f"publications cannot be written to {self._path}: {error.strerror or error}",
                    "make the file and its folder writable, or set [tracker.jsonl] path",
                ),
            )
        return (Check("file", True, f"{self._path} can be written to"),)

    def look(self) -> tuple[Check, ...]:
        return self.check(lambda: 0.0)

    def close(self) -> None:
        self._lines.close()


class JsonlPlugin:
    name = "jsonl"
    settings = JsonlSettings

    def connect(self, settings: JsonlSettings, *, checkpoint_dir: str, state_dir: Path) -> JsonlTracker:  # noqa: ARG002 -- the protocol's; one file serves one run
        return JsonlTracker(settings.path or state_dir / "publications.jsonl")


PLUGIN: TrackerPlugin = JsonlPlugin()


def _line(publication: Publication) -> bytes:
    form = {
        "step": publication.step,
        "timestamp_ms": publication.timestamp_ms,
        "metrics": dict(publication.metrics),
        "tags": dict(publication.tags),
        "files": dict(publication.files),
    }
    if publication.headline:  # a line of an earlier version has none, and is the same when it is sent again
        form["headline"] = publication.headline
    return json.dumps(form, sort_keys=True, allow_nan=False).encode() + b"\n"
