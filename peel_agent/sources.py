"""The watched place of a run: a folder of this machine, or one in an object store, through a mirror."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from peel_agent import registry
from peel_agent.config import RunSettings, Settings
from peel_agent.watch import GIVE_UP_SECONDS, Bucket, Folder, Mirror, Reserve, Settling, Source, Store, is_url


def with_absolute_places(settings: Settings) -> Settings:
    """The same settings with the path of every watched directory absolute, whether it is there or not."""
    runs = tuple(
        dataclasses.replace(run, watch=dataclasses.replace(run.watch, path=_absolute(str(run.watch.path))))
        for run in settings.runs
    )
    return dataclasses.replace(settings, runs=runs)


def _absolute(place: str) -> str:
    return place if is_url(place) else str(Path(place).expanduser().resolve())


def source_of(
    run: RunSettings,
    folder: Path,
    policy: str,
    *,
    once: bool,
    stopping: Callable[[], bool],
) -> Source:
    """What the run looks at; a mirror is kept in the run's own state `folder`."""
    watch, place = run.watch, str(run.watch.path)
    formats = registry.formats(watch.format)
    marker_seconds = watch.settle_seconds if once else math.inf
    if not is_url(place):
        give_up = watch.settle_seconds if once else GIVE_UP_SECONDS
        settling = Settling(watch.settle_seconds, give_up, marker_seconds)
        return Folder(Path(place), formats, settling, watch.ready_markers)
    mirror_folder = folder / "mirror"
    mirror_folder.mkdir(exist_ok=True)
    reserve = Reserve(watch.keep_free_gb)
    mirror = Mirror(Store(place), mirror_folder, formats, watch.ready_markers, marker_seconds, reserve=reserve)
    return Bucket(mirror, formats, watch.settle_seconds, policy == "latest", stopping)
