"""The sections of the configuration, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from peel_agent.records import Rule, RuleKind, WeightSet

Backlog: TypeAlias = str
Device: TypeAlias = str
Factory: TypeAlias = str
Precision: TypeAlias = Mapping[str, WeightSet]


@dataclass(frozen=True)
class WatchSettings:
    """`[watch]`: a checkpoint is read once its files have not changed for `settle_seconds`.

    `backlog` says which are peeled when they come faster than that: `latest` (the default while watching), `all` (the
    default for what is there already, with `--once`), or `every:N`.
    """

    path: str | None = None
    format: str = "auto"
    settle_seconds: float = 10.0
    poll_seconds: float = 10.0
    backlog: Backlog | None = None


@dataclass(frozen=True)
class ModelSettings:
    """`[model]`: `factory` makes models of your own, `package.module:callable`; None (`auto`) is transformers.

    `precision` says by glob which matrices hold the latents of a quantiser, and of which.
    """

    factory: Factory | None = None
    precision: Precision = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeSettings:
    """`[probe]`: held-out token ids or text from the training distribution."""

    path: Path | None = None
    tokenizer: Path | None = None
    sequence_length: int | None = None
    fit_tokens: int = 65_536
    select_tokens: int = 8_192
    confirm_tokens: int = 16_384


@dataclass(frozen=True)
class PeelSettings:
    """`[peel]`: what to compute; what `time_budget_seconds` do not suffice for is left out and said."""

    effort: str = "standard"
    quantities: tuple[str, ...] | None = None
    maps: str | tuple[tuple[int, ...], ...] = "ends"
    solver: str = "closed_form"
    time_budget_seconds: float | None = None


@dataclass(frozen=True)
class DeviceSettings:
    """`[device]`: `auto` is the CPU unless a spare GPU is named; the worker's niceness keeps the training first.

    The worker takes at most `memory_fraction` of the machine's memory, or of the GPU's.
    """

    select: Device = "auto"
    memory_fraction: float = 0.5
    nice: int = 10

    @property
    def in_process(self) -> str:
        """The device for a command that computes in its own process."""
        return "cpu" if self.select == "auto" else self.select


@dataclass(frozen=True)
class TrackerSettings:
    """`[tracker]`: which trackers to write to, and each one's own table."""

    use: tuple[str, ...] = ("mlflow",)
    max_series: int = 400
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class StateSettings:
    """`[state]`: where what must survive a restart is kept; by default beneath $XDG_STATE_HOME, one folder a run."""

    path: Path | None = None


SHIPPED_RULES: tuple[RuleKind, ...] = (
    "layer_below",
    "layer_changed",
    "layer_regressed",
    "layer_dropped",
    "layer_stalled",
    "layer_flooding",
)
"""The rules without a configuration, chosen by the gallery (docs/proof.md)."""


@dataclass(frozen=True)
class Settings:
    watch: WatchSettings = WatchSettings()
    model: ModelSettings = ModelSettings()
    probe: ProbeSettings = ProbeSettings()
    peel: PeelSettings = PeelSettings()
    device: DeviceSettings = DeviceSettings()
    tracker: TrackerSettings = TrackerSettings()
    state: StateSettings = StateSettings()
    rules: tuple[Rule, ...] = tuple(Rule(name=kind, kind=kind) for kind in SHIPPED_RULES)
