"""Peel a training run checkpoint by checkpoint: layer-wise reference bounds and margins."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peel_agent.config import Settings
    from peel_agent.records import DifferenceReport, PeelReport

__all__ = ["compare", "scan"]


def scan(
    path: str | Path, *, probe: str | Path, since: str | Path | None = None, device: str = "cpu", **options: Any
) -> PeelReport:
    """Peels one checkpoint in this process, as `peel-agent scan` does, and returns its report.

    `since` is an earlier checkpoint of the run to hold it against.

    `options` are keys of the configuration's `[probe]` (`sequence_length`, `fit_tokens`, ...), `[peel]` (`effort`,
    `quantities`, `maps`, `solver`) and `[model]` sections (`precision`). Raises the errors of `peel_agent.errors`.
    """
    from peel_agent.pipeline import scan as scan_one
    from peel_agent.watch import Reserve
    from peel_agent.worker import quiet_libraries

    settings = _settings(probe, device, options)
    with quiet_libraries():
        return scan_one(
            path,
            probe=settings.probe,
            peeling=settings.peel,
            model=settings.model,
            device="cpu" if device == "auto" else device,
            since=since,
            reserve=Reserve(settings.watch.keep_free_gb),
            clock=time.perf_counter,
        )


def compare(
    a: str | Path, b: str | Path, *, probe: str | Path, device: str = "cpu", **options: Any
) -> DifferenceReport:
    """Measures two checkpoints on the same tokens in this process, as `peel-agent compare` does; every difference is
    b - a, in nats per token, paired by sequence.

    `options` as of `scan`, but for maps and solver; `quantities` are some of `margin` (the default) and `headroom`.
    Raises the errors of `peel_agent.errors`.
    """
    from peel_agent.comparing import compare_checkpoints
    from peel_agent.watch import Reserve
    from peel_agent.worker import quiet_libraries

    settings = _settings(probe, device, {"quantities": ("margin",), **options})
    with quiet_libraries():
        return compare_checkpoints(
            a,
            b,
            probe=settings.probe,
            peeling=settings.peel,
            model=settings.model,
            device="cpu" if device == "auto" else device,
            reserve=Reserve(settings.watch.keep_free_gb),
            clock=time.perf_counter,
        )


def _settings(probe: str | Path, device: str, options: dict[str, Any]) -> Settings:
    """The settings of keyword arguments, each in the section that has a key of its name."""
    import dataclasses

    from peel_agent.config import Settings, load_settings

    sections = ("probe", "model", "peel")
    homes = {field.name: name for name in sections for field in dataclasses.fields(getattr(Settings, name))}
    flags = {f"{homes.get(key, 'peel')}.{key}": value for key, value in options.items()}
    return load_settings(None, flags | {"probe.path": str(probe), "device.select": device})
