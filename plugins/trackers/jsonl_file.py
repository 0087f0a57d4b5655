"""Publications as lines of a local file: for runs without a tracking server, and for other programs to read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from peel_agent.errors import TrackerUnavailable
from peel_agent.records import Publication
from peel_agent.spi import TrackerPlugin


class JsonlTracker:
    """One JSON object a line and publication: `step`, `timestamp_ms`, `metrics`, `tags`, `files`.

    A publication whose line is already there is not appended again. A last line that a crash left without its newline
    was never acknowledged to the sender, who will send it again: it is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: set[bytes] | None = None

    def publish(self, publication: Publication) -> None:
        line = _line(publication)
        digest = sha256(line).digest()
        try:
            written = self._whole_lines() if self._written is None else self._written
            self._written = None  # unknown until this append is known to be whole
            if digest not in written:
                self._append(line)
                written.add(digest)
            self._written = written
        except OSError as error:
            raise TrackerUnavailable(
                f"publications cannot be written to {self._path}: {error.strerror or error}",
                remedy="make the file writable and its disk have room, or set [tracker.jsonl] path; it is tried again",
            ) from error

    def where(self) -> str:
        return f"publications in {self._path}"

    def close(self) -> None:
        self._written = None

    def _whole_lines(self) -> set[bytes]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        digests, end = set(), 0
        with self._path.open("a+b") as file:
            file.seek(0)
            for line in file:
                if line.endswith(b"\n"):
                    digests.add(sha256(line).digest())
                    end += len(line)
            file.truncate(end)
        _sync_directory(self._path.parent)  # a file just created is as durable as its directory
        return digests

    def _append(self, line: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class JsonlPlugin:
    name = "jsonl"
    options = frozenset({"path"})

    def connect(self, options: Mapping[str, str], *, checkpoint_dir: str, state_dir: Path) -> JsonlTracker:  # noqa: ARG002 -- the protocol's; one file serves one state folder
        """A tracker that appends to `path`, by default `publications.jsonl` in the state folder."""
        return JsonlTracker(Path(options.get("path", state_dir / "publications.jsonl")).expanduser())


PLUGIN: TrackerPlugin = JsonlPlugin()


def _line(publication: Publication) -> bytes:
    form = {
        "step": publication.step,
        "timestamp_ms": publication.timestamp_ms,
        "metrics": dict(publication.metrics),
        "tags": dict(publication.tags),
        "files": dict(publication.files),
    }
    return json.dumps(form, sort_keys=True, allow_nan=False).encode() + b"\n"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
