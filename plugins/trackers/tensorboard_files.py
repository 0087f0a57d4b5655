"""TensorBoard: the numbers as event files, each checkpoint's files beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Check, Publication
from peel_agent.spi import TrackerPlugin, setting

from .event_files import EventFiles
from .local_files import try_to_write, write_if_newer

INSTALL = 'pip install "peel-agent[tensorboard]"'


@dataclass(frozen=True)
class TensorboardSettings:
    """`[tracker.tensorboard]`: the folder that `tensorboard --logdir` is given, by default one in the state folder."""

    log_dir: Path | None = setting(None)


class TensorboardTracker:
    """Writes beneath `log_dir`, in a folder of the run's own, so that several runs and their trainings may share it.

    Event files are in `001`, `002` and so on, the publications' files in `peel`. A publication's numbers are one
    record: they are there all, or not at all. TensorBoard keeps seven digits; the checkpoint's file has them all.
    """

    def __init__(self, log_dir: Path, run: str) -> None:
        self._log_dir = log_dir
        self._folder = log_dir / run
        self._events = EventFiles(self._folder)

    def prepare(self) -> None:
        _load()

    def publish(self, publication: Publication) -> None:
        if publication.metrics or publication.tags:
            _load()
        try:
            if publication.metrics or publication.tags:
                self._events.write(publication)
            for path, text in publication.files.items():
                write_if_newer(self._folder / path, text.encode(), publication.timestamp_ms)
        except OSError as error:
            raise DestinationUnavailable(
                f"results for TensorBoard cannot be written to {self._folder}: {error.strerror or error}",
                remedy="make the folder writable and its disk have room, or set [tracker.tensorboard] log_dir; "
                "it is tried again",
            ) from error

    def where(self) -> str:
        return f"TensorBoard's files in {self._folder}; to see them: tensorboard --logdir {self._log_dir}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        try:
            _load()
            try_to_write(self._folder / "check")
        except DeliveryError as error:
            return (Check("package", False, error.what, error.remedy),)
        except OSError as error:
            return (
                Check(
                    "folder",
                    False,
                    f"results for TensorBoard cannot be written to {self._folder}: {error.strerror or error}",
                    "make the folder writable, or set [tracker.tensorboard] log_dir",
                ),
            )
        return (Check("folder", True, f"{self._folder} can be written to"),)

    def look(self) -> tuple[Check, ...]:
        return self.check(lambda: 0.0)

    def close(self) -> None:
        """Nothing is held open."""


class TensorboardPlugin:
    name = "tensorboard"
    settings = TensorboardSettings
    needs = ("tensorboard", INSTALL)

    def connect(self, settings: TensorboardSettings, *, checkpoint_dir: str, state_dir: Path) -> TensorboardTracker:
        return TensorboardTracker(settings.log_dir or state_dir / "tensorboard", _run_name(checkpoint_dir))


PLUGIN: TrackerPlugin = TensorboardPlugin()


def _run_name(checkpoint_dir: str) -> str:
    """The directory's own name, for people, and what tells it from others of that name."""
    last = re.sub(r"[^\w.-]", "_", checkpoint_dir.rstrip("/").rpartition("/")[2])
    return f"{last}-{sha256(checkpoint_dir.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _load() -> None:
    """Imports what writes of `tensorboard`: neither torch nor tensorflow. Raises DestinationDenied without it."""
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.plugins.scalar.metadata
        import tensorboard.plugins.text.metadata
        import tensorboard.summary.writer.record_writer  # noqa: F401 -- so that the first publication does not wait
    except ImportError as error:
        raise DestinationDenied(
            f"the package tensorboard cannot be imported: {error}", remedy=f"install it: {INSTALL}"
        ) from error
