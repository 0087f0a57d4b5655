"""The sections of the configuration, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from peel_agent.records import ModelSettings, PeelSettings, ProbeSettings, Rule, RuleKind

Backlog: TypeAlias = str
Device: TypeAlias = str


@dataclass(frozen=True)
class WatchSettings:
    """`[watch]`: a checkpoint is read once its files have not changed for `settle_seconds`.

    `backlog` says which are peeled when they come faster than that: `latest` (the default while watching), `all` (the
    default for what is there already, with `--once`), or `every:N`. A checkpoint folder counts as whole only when every
    file of `ready_markers` is in it. Nothing is held, copied or fetched that would leave less than `keep_free_gb` GiB
    of its file system free; None is a tenth of it, at most 50 GiB.
    """

    path: str | None = None
    format: str = "auto"
    settle_seconds: float = 10.0
    poll_seconds: float = 10.0
    backlog: Backlog | None = None
    ready_markers: tuple[str, ...] = ()
    keep_free_gb: float | None = None


@dataclass(frozen=True)
class DeviceSettings:
    """`[device]`: `auto` takes a GPU that nobody uses, or else the CPU; `nice` keeps the training first.

    The worker takes at most `memory_fraction` of the machine's memory, or of the GPU's.
    """

    select: Device = "auto"
    memory_fraction: float = 0.5
    nice: int = 19


@dataclass(frozen=True)
class TrackerSettings:
    """`[tracker]`: which trackers to write to, and each one's own table, as it stands in the file.

    `training_loss` names the metric that the training logs its loss under; by default it is looked for under the usual
    names. Trackers that can show them get the run's page and heat maps after each checkpoint, unless `report` is false.
    `flags` are options of the command line, for every tracker in use that has them.
    """

    use: tuple[str, ...] = ("mlflow",)
    max_series: int = 400
    training_loss: str | None = None
    report: bool = True
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SinkSettings:
    """`[[sink]]`: where notices go; `use` names the plug-in, all other keys are its own."""

    use: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StateSettings:
    """`[state]`: the folder that keeps what must survive a restart, one an agent.

    By default $STATE_DIRECTORY, which systemd sets, or else a folder beneath $XDG_STATE_HOME.
    """

    path: Path | None = None


@dataclass(frozen=True)
class HealthSettings:
    """`[health]`: where `/healthz`, `/readyz` and `/metrics` are served; not at all when `listen` is empty.

    None is the default address, which another agent of this machine may hold already: then they are not served.
    """

    listen: str | None = None


@dataclass(frozen=True)
class LogSettings:
    """`[log]`: `text` for people or `json`, one object a line; events below `level` are left out."""

    format: str = "text"
    level: str = "info"


@dataclass(frozen=True)
class EngineSettings:
    """`[engine]`: what peels, and each engine's own table as it stands; `local` is a child process of the agent."""

    use: str = "local"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


SHIPPED_RULES: tuple[RuleKind, ...] = (
    "layer_below",
    "layer_changed",
    "layer_regressed",
    "layer_dropped",
    "layer_stalled",
    "layer_flooding",
    "run_below_bound",
    "no_checkpoint",
    "agent_error",
)
"""The rules without a configuration. Those of layers were chosen by the gallery (docs/proof.md)."""


DEFAULT_RULES = tuple(Rule(name=kind, kind=kind) for kind in SHIPPED_RULES)


@dataclass(frozen=True)
class RunSettings:
    """One watched place, with everything that is its own: a `[[run]]` table over the sections of the top level."""

    name: str
    watch: WatchSettings
    model: ModelSettings = ModelSettings()
    probe: ProbeSettings = ProbeSettings()
    peel: PeelSettings = PeelSettings()
    tracker: TrackerSettings = TrackerSettings()
    rules: tuple[Rule, ...] = DEFAULT_RULES


@dataclass(frozen=True)
class Settings:
    """The agent's settings; `runs` has one for each `[[run]]`, or the one run of the top level, if that has a path."""

    watch: WatchSettings = WatchSettings()
    model: ModelSettings = ModelSettings()
    probe: ProbeSettings = ProbeSettings()
    peel: PeelSettings = PeelSettings()
    device: DeviceSettings = DeviceSettings()
    tracker: TrackerSettings = TrackerSettings()
    state: StateSettings = StateSettings()
    health: HealthSettings = HealthSettings()
    log: LogSettings = LogSettings()
    engine: EngineSettings = EngineSettings()
    rules: tuple[Rule, ...] = DEFAULT_RULES
    sinks: tuple[SinkSettings, ...] = ()
    runs: tuple[RunSettings, ...] = ()
