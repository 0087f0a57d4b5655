"""Settings: peel.toml, then the environment (`PEEL__SECTION__KEY`), then flags; the last one wins.

An unknown key is an error that names the nearest known one. This is the only module that reads the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import tomli

from peel_agent.errors import ConfigurationError
from peel_agent.records import SETS, Rule, WeightSet

PREFIX = "PEEL__"
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

    path: Path | None = None
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


@dataclass(frozen=True)
class Settings:
    watch: WatchSettings = WatchSettings()
    model: ModelSettings = ModelSettings()
    probe: ProbeSettings = ProbeSettings()
    peel: PeelSettings = PeelSettings()
    device: DeviceSettings = DeviceSettings()
    tracker: TrackerSettings = TrackerSettings()
    state: StateSettings = StateSettings()
    rules: tuple[Rule, ...] = (Rule(name="layer_below", kind="layer_below"),)


RESERVED = {
    "health": {"listen"},
    "engine": {"use"},
    "sink": set[str](),
}
"""Keys of the contract that this version does not act on: refused by name rather than silently ignored."""

CHOICES = {
    "peel.effort": ("quick", "standard", "full"),
    "peel.solver": ("closed_form", "descent", "descent_cold"),
    "peel.quantities": ("margin", "bounds", "headroom", "redundancy"),
    "rule.kind": ("layer_below",),
    "rule.severity": ("info", "warning", "critical"),
}


def load_settings(file: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Settings from a file (or none), the environment, and `flags` by dotted key; None among the flags is not given.

    Raises ConfigurationError naming the key, the value and the remedy.
    """
    raw = _read(file) if file is not None else {}
    for name, text in sorted(os.environ.items()):
        if name.startswith(PREFIX):
            keys = name.removeprefix(PREFIX).lower().split("__")
            _put(raw, keys, text if len(keys) > 2 else _from_environment(text))  # a tracker's own options are text
    for dotted, value in flags.items():
        if value is not None:
            _put(raw, dotted.split("."), value)
    settings = _settings(raw)
    _check_ranges(settings)
    return _with_run_of_environment(settings)


def default_state_dir(watched: Path, tracker: TrackerSettings) -> Path:
    """One folder for each watched path and destination, beneath $XDG_STATE_HOME (or ~/.local/state).

    The destination counts, so that a new run in an old directory neither inherits the old one's alerts and bounds nor
    is sent what waits for it, and a back-fill into another run sends everything.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    identity = json.dumps([str(watched), sorted(tracker.use), tracker.options, uri], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return base / "peel-agent" / f"{watched.name}-{digest}"


def worker_environment(device: str) -> tuple[dict[str, str], str]:
    """The environment of the child that peels on `device`, and the device's name inside it.

    Only the GPU that was named is visible there; with the CPU, none is.
    """
    environment = dict(os.environ)
    if device in ("auto", "cpu"):
        environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment, "cpu"
    inherited = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = device.removeprefix("cuda:")
    if inherited and device.startswith("cuda:"):  # N counts what this process may see, as it does for torch
        if int(number) >= len(inherited):
            raise ConfigurationError(
                f"`device.select` is `{device}`; CUDA_VISIBLE_DEVICES leaves {len(inherited)} GPUs here",
                remedy=f"use cuda:0 to cuda:{len(inherited) - 1}, a GPU's uuid, or cpu",
            )
        number = inherited[int(number)]
    environment["CUDA_VISIBLE_DEVICES"] = number
    return environment, "cuda:0"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomli.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the configuration {file}: {error.strerror}", remedy="check the path given with -c"
        ) from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} is not valid TOML: {error}", remedy="repair that line") from error


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigurationError(
                f"`{key}` is not a table, so `{'.'.join(keys)}` cannot be set", remedy=f"make it a table: [{key}]"
            )
    raw[keys[-1]] = value


def _from_environment(text: str) -> Any:
    """Numbers, booleans and lists as TOML writes them; anything else is text."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def _settings(raw: Mapping[str, Any]) -> Settings:
    tables: dict[str, Any] = {
        name: cast(type, kind.default.__class__)
        for name, kind in ((f.name, f) for f in dataclasses.fields(Settings))
        if name != "rules"
    }
    _known("", raw, {*tables, "rule"})
    built: dict[str, Any] = {}
    for name, kind in tables.items():
        table = raw.get(name, {})
        if not isinstance(table, Mapping):
            raise ConfigurationError(f"`{name}` is {table!r}, not a table", remedy=f"write it as [{name}]")
        built[name] = _tracker(table) if name == "tracker" else _section(kind, name, table)
    if "rule" in raw:
        if not isinstance(raw["rule"], list):
            raise ConfigurationError(f"`rule` is {raw['rule']!r}", remedy="write each rule as [[rule]]")
        built["rules"] = tuple(_section(Rule, "rule", entry) for entry in raw["rule"])
    return Settings(**built)


def _check_ranges(settings: Settings) -> None:
    """Values of the right type that nothing could work with."""
    probe, watch = settings.probe, settings.watch
    least: dict[str, tuple[float, float]] = {
        "watch.settle_seconds": (watch.settle_seconds, 0),
        "watch.poll_seconds": (watch.poll_seconds, 0),
        "probe.fit_tokens": (probe.fit_tokens, 1),
        "probe.select_tokens": (probe.select_tokens, 1),
        "probe.confirm_tokens": (probe.confirm_tokens, 1),
        "tracker.max_series": (settings.tracker.max_series, 10),
    }
    for rule in settings.rules:
        least[f"rule.{rule.name}.for_checkpoints"] = (rule.for_checkpoints, 1)
        least[f"rule.{rule.name}.clear_checkpoints"] = (rule.clear_checkpoints, 1)
        if not re.fullmatch(r"[\w.-]{1,100}", rule.name):
            raise ConfigurationError(
                f"a rule is called `{rule.name}`", remedy="letters, digits, `_`, `-` and `.` make a rule's name"
            )
    if not 0 < settings.device.memory_fraction <= 1:
        raise ConfigurationError(
            f"`device.memory_fraction` is {settings.device.memory_fraction:g}", remedy="it must be above 0, at most 1"
        )
    if settings.peel.time_budget_seconds is not None:
        least["peel.time_budget_seconds"] = (settings.peel.time_budget_seconds, 0)
    for dotted, (value, bound) in least.items():
        if not bound <= value < float("inf"):
            raise ConfigurationError(f"`{dotted}` is {value:g}", remedy=f"it must be {bound:g} or more")
    names = [rule.name for rule in settings.rules]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigurationError(f"two rules are called `{min(twice)}`", remedy="give each rule a name of its own")


def _with_run_of_environment(settings: Settings) -> Settings:
    """MLFLOW_RUN_ID, which trainings set, names the run unless the configuration names one."""
    tracking, run_id = settings.tracker, os.environ.get("MLFLOW_RUN_ID")
    if run_id is None or "mlflow" not in tracking.use:
        return settings
    mlflow = {"run_id": run_id, **tracking.options.get("mlflow", {})}
    options = {**tracking.options, "mlflow": mlflow}
    return dataclasses.replace(settings, tracker=dataclasses.replace(tracking, options=options))


def _tracker(table: Mapping[str, Any]) -> TrackerSettings:
    options = {
        name: {key: _revealed(f"tracker.{name}.{key}", str(value)) for key, value in own.items()}
        for name, own in table.items()
        if isinstance(own, Mapping)
    }
    own = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    settings: TrackerSettings = _section(TrackerSettings, "tracker", own)
    return dataclasses.replace(settings, options=options)


def _section(kind: type, name: str, table: Mapping[str, Any]) -> Any:
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    _known(name, table, set(fields) - {"options"})
    values = {key: _converted(f"{name}.{key}", fields[key], value) for key, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigurationError(f"[[{name}]] is not complete: {error}", remedy="add the keys named") from error


def _known(section: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key in known:
            continue
        dotted = f"{section}.{key}" if section else key
        if key in (RESERVED.get(section, set()) if section else RESERVED):
            raise ConfigurationError(
                f"`{dotted}` is not available in this version of peel-agent", remedy="take it out of the configuration"
            )
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigurationError(
            f"unknown key `{dotted}` in the configuration", remedy=f"{guess}known here: {', '.join(sorted(known))}"
        )


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _device(value: Any) -> str:
    if not re.fullmatch(r"auto|cpu|cuda:\d+|(GPU|MIG)-[\w-]+", str(value)):
        raise ValueError
    return str(value)


def _backlog(value: Any) -> str:
    if not re.fullmatch(r"latest|all|every:[1-9]\d{0,8}", str(value)):
        raise ValueError
    return str(value)


def _factory(value: Any) -> str | None:
    if value == "auto":
        return None
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", str(value)):
        raise ValueError
    return str(value)


def _maps(value: Any) -> str | tuple[tuple[int, ...], ...]:
    if isinstance(value, str):
        return value
    return tuple(tuple(_whole(entry) for entry in own) for own in value)


def _precision(value: Any) -> Precision:
    if not isinstance(value, Mapping):
        raise TypeError
    return {glob: WeightSet.named(str(name)) for glob, name in value.items()}


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(value.split(",")) if isinstance(value, str) else tuple(str(entry) for entry in value)


CONVERTERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (str, "text"),
    "int": (_whole, "a whole number"),
    "int | None": (_whole, "a whole number"),
    "float": (float, "a number"),
    "float | None": (float, "a number"),
    "Path | None": (lambda value: Path(value).expanduser(), "a path"),
    "tuple[str, ...]": (_texts, "a list of names"),
    "tuple[str, ...] | None": (_texts, "a list of names"),
    "str | tuple[tuple[int, ...], ...]": (_maps, "the name of a suite or a list of maps such as [[1, 4], [2, 4]]"),
    "Precision": (_precision, f'a table such as {{ "model.layers.*_proj.weight" = "ternary" }}, with sets like {SETS}'),
    "Backlog | None": (_backlog, "latest, all, or every:N with a whole number N"),
    "Factory | None": (_factory, "auto, or package.module:callable"),
    "Device": (_device, "auto, cpu, cuda:N, or a GPU's uuid as nvidia-smi -L prints it"),
    "RuleKind": (str, "a rule kind"),
    "Severity": (str, "a severity"),
}


def _converted(dotted: str, kind: str, value: Any) -> Any:
    convert, words = CONVERTERS[kind]
    try:
        converted = convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigurationError(f"`{dotted}` is {value!r}", remedy=f"it must be {words}") from error
    choices = CHOICES.get(dotted)
    wrong = [
        one for one in (converted if isinstance(converted, tuple) else (converted,)) if choices and one not in choices
    ]
    if choices and wrong:
        raise ConfigurationError(f"`{dotted}` is `{wrong[0]}`", remedy=f"it must be one of: {', '.join(choices)}")
    return converted


def _revealed(dotted: str, text: str) -> str:
    """A secret named by `${ENV}` or `file:PATH` is fetched; it is never printed, logged or stored."""
    if match := re.fullmatch(r"\$\{(\w+)\}", text):
        if match[1] not in os.environ:
            raise ConfigurationError(
                f"`{dotted}` names the environment variable {match[1]}, which is not set", remedy=f"set {match[1]}"
            )
        return os.environ[match[1]]
    if text.startswith("file:"):
        try:
            return Path(text.removeprefix("file:")).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigurationError(
                f"`{dotted}` names a file that cannot be read: {error.strerror}", remedy="check the path after file:"
            ) from error
    return text
