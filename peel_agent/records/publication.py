"""What a tracker and a sink are sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peel_agent.records.report import Notice


@dataclass(frozen=True)
class Publication:
    """Everything one checkpoint sends to a tracker. Sending it twice changes nothing.

    `timestamp_ms` comes from the checkpoint, never from the clock. `files` maps artifact paths to text. `headline` is
    what was found, in one line; "" where nothing is to be said. `training_ended` says that the training is over, as far
    as its checkpoints show.
    """

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    headline: str = ""
    training_ended: bool = False


@dataclass(frozen=True)
class Pages:
    """What people look at of a run, up to its checkpoint of this step: files of this machine, which soon are gone.

    `timestamp_ms` is the checkpoint's own time. `files` maps artifact paths to files, `images` the name of a series of
    images to its newest, a PNG file, which stays in the series at this step if it is to `keep`.
    """

    step: int
    timestamp_ms: int
    files: Mapping[str, Path]
    images: Mapping[str, Path] = field(default_factory=dict)
    keep: bool = True


@dataclass(frozen=True)
class NoticeGroup:
    """All notices of one checkpoint, or of one moment, that one sink is to get; `id` is the same when it comes again.

    `text` is for people; `at` is in Unix seconds. A group that is `standing` holds all that goes on firing, for a place
    that takes silence for an end.
    """

    id: str
    run: str
    at: float
    notices: tuple[Notice, ...]
    text: str
    standing: bool = False
