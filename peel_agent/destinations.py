"""Trackers and sinks of the settings, as addresses that a courier can connect; and which run of a tracker is pinned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peel_agent import registry
from peel_agent.config import RunSettings, Settings, SinkSettings, TrackerSettings, plugin_settings, variable_of
from peel_agent.errors import ConfigurationError, printable
from peel_agent.records import LaneKind, plain, restored
from peel_agent.spi import Sink, Tracker
from peel_agent.views import EXTRA, lacks

USUAL_LOSSES = ("train/loss", "train_loss", "loss", "training_loss", "train/train_loss")
"""Where trainings log their loss: transformers and nanoGPT, Lightning, loops of one's own."""


@dataclass(frozen=True)
class Address:
    """One destination of one run: the plug-in's name, and the JSON form of its own settings, secrets and all."""

    kind: Literal["tracker", "sink"]
    name: str
    plugin: str
    settings: Mapping[str, Any] = dataclasses.field(repr=False)
    run: str
    checkpoint_dir: str
    state_dir: Path
    loss_keys: tuple[str, ...] = ()
    """The metrics of the training that rules of the run read, the likeliest first."""

    @property
    def lanes(self) -> tuple[LaneKind, ...]:
        """What it is sent, each in an order of its own. Raises PluginError."""
        if self.kind == "sink":
            return ("notices",)
        return ("numbers", "files", "pages") if shows_pages(self.plugin) else ("numbers", "files")

    def tracker(self) -> Tracker:
        """A connection of its own to this tracker."""
        plugin = registry.tracker(self.plugin)
        options = restored(plugin.settings, self.settings)
        return plugin.connect(options, checkpoint_dir=self.checkpoint_dir, state_dir=self.state_dir)

    def sink(self) -> Sink:
        """A connection of its own to this sink."""
        plugin = registry.sink(self.plugin)
        return plugin.connect(restored(plugin.settings, self.settings), state_dir=self.state_dir)


def shows_pages(tracker: str) -> bool:
    """Whether the trackers of this plug-in show the page and the images of a run. Raises PluginError."""
    return bool(getattr(registry.tracker(tracker), "shows_pages", False))


def showing(tracking: TrackerSettings) -> tuple[str, ...]:
    """The trackers in use that get the page and the images of a run: none where what draws them is not installed."""
    is_wanted = tracking.report and lacks() is None
    return tuple(name for name in tracking.use if shows_pages(name)) if is_wanted else ()


def not_shown(tracking: TrackerSettings) -> tuple[str, ...]:
    """What a tracker would show, and why it does not, in a sentence."""
    names = ", ".join(name for name in tracking.use if shows_pages(name))
    if lacks() is None or not tracking.report or not names:
        return ()
    without = "[tracker] report = false goes without"
    return (f"{names}: no report page and no heat maps, since {lacks()} is not installed -> {EXTRA}; {without}",)


def tracker_settings(tracking: TrackerSettings, *, alone: bool) -> dict[str, Any]:
    """Each tracker in use with its own settings; raises ConfigurationError for a table or a key that nothing reads.

    What pins a tracker's run is taken from the environment only for a run that is `alone`: it cannot pin several.
    """
    unused = set(tracking.options) - set(tracking.use)
    if unused:
        raise ConfigurationError(
            f"[tracker.{min(unused)}] is configured, and not in use",
            remedy=f'add "{min(unused)}" to [tracker] use, or take the table out',
        )
    settings: dict[str, Any] = {}
    unread = set(tracking.flags)
    for name in tracking.use:
        plugin = registry.tracker(name)
        fields = {field.name: field for field in dataclasses.fields(plugin.settings)}
        flags = {key: value for key, value in tracking.flags.items() if key in fields}
        unread -= set(flags)
        table = {**tracking.options.get(name, {}), **flags}
        environment = _variables(plugin.settings, table, alone=alone)
        settings[name] = plugin_settings(plugin.settings, f"tracker.{name}", table, from_environment=environment)
    if unread:
        flag = min(unread)
        raise ConfigurationError(
            f"--{flag.replace('_', '-')} is given, and no tracker in use has it",
            remedy="leave it out, or add the tracker that it is for to [tracker] use",
        )
    return settings


def sink_settings(sink: SinkSettings) -> Any:
    """A sink's own settings, by its plug-in. Raises ConfigurationError, and PluginError where there is none."""
    plugin = registry.sink(sink.use)
    environment = _variables(plugin.settings, sink.options, alone=True)
    name = f"sink.{sink.name}"
    try:
        return plugin_settings(plugin.settings, name, sink.options, from_environment=environment)
    except ConfigurationError as error:
        if name in error.what:
            raise
        raise ConfigurationError(f"[[{name}]]: {error.what}", remedy=error.remedy) from None


def _variables(kind: type[Any], table: Mapping[str, Any], *, alone: bool) -> dict[str, str]:
    """The variables that stand for what this table leaves out, by field."""
    return {
        field.name: field.metadata["environment"]
        for field in dataclasses.fields(kind)
        if field.metadata.get("environment")
        and (alone or not field.metadata.get("pins_run"))
        and field.metadata.get("instead_of") not in table
    }


def notes(tracking: TrackerSettings, *, alone: bool) -> tuple[str, ...]:
    """What of each tracker's settings comes from a variable, and what cannot, and what is not shown, in sentences."""
    said = []
    for name in tracking.use:
        kind = registry.tracker(name).settings
        table = {**tracking.options.get(name, {}), **tracking.flags}
        secrets = {field.name for field in dataclasses.fields(kind) if field.metadata.get("secret")}
        for key, variable in _variables(kind, table, alone=True).items():
            text = "as it stands" if key in secrets and variable_of(variable) else variable_of(variable)
            if key in table or text is None:
                continue
            if key in _variables(kind, table, alone=alone):
                said.append(f"{name}: {key} is {printable(text)}, from {variable}")
            else:
                said.append(f"{name}: {variable} is not used, since it cannot name several runs; give each its {key}")
    return (*said, *not_shown(tracking))


def pinned_run(settings: Mapping[str, Any]) -> str:
    """What the user pinned of the trackers' own runs; another text is another run."""
    pins = {
        f"{name}.{field.name}": getattr(options, field.name)
        for name, options in sorted(settings.items())
        for field in dataclasses.fields(options)
        if field.metadata.get("pins_run") and getattr(options, field.name)
    }
    return ", ".join(f"{key}={value}" for key, value in pins.items())


def addresses(run: RunSettings, settings: Settings, *, key: str, folder: Path, state_dir: Path) -> tuple[Address, ...]:
    """Where this run's numbers, files and notices go. Raises ConfigurationError."""
    place = str(run.watch.path)
    trackers = tracker_settings(run.tracker, alone=len(settings.runs) == 1)
    loss = _loss_keys(run)
    to_trackers = (
        Address("tracker", name, name, plain(options), key, place, folder, loss) for name, options in trackers.items()
    )
    return (*to_trackers, *sink_addresses(settings, key=key, place=place, state_dir=state_dir))


def exposed_secrets(settings: Settings, file: Path | None) -> tuple[str, ...]:
    """What stands in plain text in a configuration that others of the machine may read, one sentence each."""
    try:
        if file is None or not file.stat().st_mode & 0o077:
            return ()
    except OSError:
        return ()
    tables: list[tuple[str, Any, Mapping[str, Any]]] = []
    for tracking in (settings.tracker, *(run.tracker for run in settings.runs)):
        named = tracking.options
        tables += [(f"tracker.{use}", registry.tracker(use), named.get(use, {})) for use in tracking.use]
    tables += [(f"sink.{sink.name}", registry.sink(sink.use), sink.options) for sink in settings.sinks]
    return tuple(
        dict.fromkeys(
            f"`{name}.{field.name}` stands in plain text in {file}, which others may read: "
            "write it as ${VARIABLE} or file:PATH, or take their permission away (chmod 600)"
            for name, plugin, table in tables
            for field in dataclasses.fields(plugin.settings)
            if _is_exposed(table.get(field.name), secret=bool(field.metadata.get("secret")))
        )
    )


def _is_exposed(value: object, *, secret: bool) -> bool:
    """Whether a value of the file is a secret itself, or an address with a password, and not the name of one.

    An address that is a scheme, a host and a port lets nobody in by itself.
    """
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
    if secret:
        return any(not re.fullmatch(r"\$\{\w+\}|file:.*|https?://[\w.:\[\]-]+/?", text) for text in texts)
    return any(re.search(r"://[^/@\s]*:[^/@\s]+@", text) for text in texts)


def _loss_keys(run: RunSettings) -> tuple[str, ...]:
    """None where no rule reads it: a long history costs the tracking server something."""
    if not any(rule.kind == "false_convergence" for rule in run.rules):
        return ()
    return USUAL_LOSSES if run.tracker.training_loss is None else (run.tracker.training_loss,)


def sink_addresses(settings: Settings, *, key: str, place: str, state_dir: Path) -> tuple[Address, ...]:
    """Every sink, for the run `key` of this place. Raises ConfigurationError."""
    return tuple(
        Address("sink", sink.name, sink.use, plain(sink_settings(sink)), key, place, state_dir)
        for sink in settings.sinks
    )
