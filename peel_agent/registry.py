"""Plug-ins by kind and name, loaded from entry points only when they are asked for.

A plug-in that is named and broken is an error; one that is only installed and broken is reported by `peel-agent
plugins` and otherwise left alone.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from peel_agent.errors import PluginError, UnknownFamily
from peel_agent.records import Claim, Listing, Strength
from peel_agent.spi import KINDS, EnginePlugin, Family, Format, SinkPlugin, TrackerPlugin

DISTRIBUTION = "peel-agent"
STRENGTHS: tuple[Strength, ...] = ("specific", "generic", "declined", "begun")
"""Of what a format may say of a listing, the strongest first."""


@dataclass(frozen=True)
class Installed:
    """One installed plug-in; `problem` is None when it loads, and the package that it writes with is there."""

    kind: str
    name: str
    source: str
    problem: str | None


def _installed(kind: str) -> tuple[EntryPoint, ...]:
    """Those of other distributions first, then ours, each by name."""
    unique = {(point.name, point.value): point for point in entry_points(group=f"peel_agent.{kind}")}
    return tuple(sorted(unique.values(), key=lambda point: (_is_ours(point), point.name)))


def _is_ours(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == DISTRIBUTION


def _named(kind: str, name: str) -> object:
    points = {point.name: point for point in _installed(kind)}
    if name not in points:
        near = difflib.get_close_matches(name, points, n=1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        valid = ", ".join(points) or "none"
        raise PluginError(
            f"no plug-in `{name}` of kind {kind} is installed",
            remedy=f"{guess}installed: {valid}; `peel-agent plugins` lists them all",
        )
    return _load(kind, points[name])


def _load(kind: str, point: EntryPoint) -> object:
    try:
        plugin: object = point.load()
    except Exception as error:
        raise PluginError(
            f"plug-in `{point.name}` of kind {kind} ({point.value}) does not load: {type(error).__name__}: {error}",
            remedy="repair or uninstall the distribution it comes from, or take it out of the configuration",
        ) from error
    return plugin


def _usable(kind: str) -> tuple[object, ...]:
    plugins = []
    for point in _installed(kind):
        try:
            plugins.append(_load(kind, point))
        except PluginError:
            continue  # unnamed and broken: `peel-agent plugins` says so
    return tuple(plugins)


def formats(name: str = "auto") -> tuple[Format, ...]:
    """The format named, or every one that loads when `auto`: those of other distributions first, then by name."""
    return cast("tuple[Format, ...]", _usable("formats") if name == "auto" else (_named("formats", name),))


@dataclass(frozen=True)
class Claims:
    """What formats say of one listing: the format that has it, with its claim, and what the first said that failed."""

    winner: tuple[Format, Claim] | None
    failure: PluginError | None


def claims(listing: Listing, formats: Sequence[Format]) -> Claims:
    """The strongest claim, of equal ones that of the first format. One that fails has none, and stops no other."""
    ranked: list[tuple[int, Format, Claim]] = []
    failure = None
    for form in formats:
        try:
            claim = form.claim(listing)
            if claim is not None:
                ranked.append((STRENGTHS.index(claim.strength), form, claim))
        except Exception as error:  # somebody else's plug-in may raise anything
            failure = failure or failed(form, listing, error)
    winner = min(ranked, key=lambda entry: entry[0], default=None)
    return Claims(None if winner is None else winner[1:], failure)


def claimed(listing: Listing, formats: Sequence[Format]) -> tuple[Format, Claim] | None:
    """The format that has a file or a folder, with its claim; see `claims`."""
    return claims(listing, formats).winner


def failed(form: Format, listing: Listing, error: Exception) -> PluginError:
    """What to say of a format that raised what it may not."""
    return PluginError(
        f"the format plug-in `{form.name}` failed at {listing.name}: {type(error).__name__}: {error}",
        remedy="repair or uninstall the distribution it comes from, or name the format that is meant: [watch] format",
    )


def tracker(name: str) -> TrackerPlugin:
    """The tracker plug-in of this name."""
    return cast(TrackerPlugin, _named("trackers", name))


def sink(name: str) -> SinkPlugin:
    """The sink plug-in of this name."""
    return cast(SinkPlugin, _named("sinks", name))


def engine(name: str) -> EnginePlugin:
    """The engine plug-in of this name."""
    return cast(EnginePlugin, _named("engines", name))


def family(model_type: str) -> Family:
    """The family that covers `model_type` of config.json; UnknownFamily names those that are covered."""
    families = cast("tuple[Family, ...]", _usable("families"))
    for candidate in families:
        if model_type in candidate.model_types:
            return candidate
    covered = sorted(name for candidate in families for name in candidate.model_types)
    raise UnknownFamily(
        f"no family plug-in covers model_type `{model_type}`",
        remedy=f"covered: {', '.join(covered)}; for a model of your own name a [model] factory (docs/inputs.md)",
    )


def problems(kind: str) -> tuple[str, ...]:
    """What is wrong with the plug-ins of a kind that are installed and do not load."""
    return tuple(problem for point in _installed(kind) if (problem := _problem(kind, point)) is not None)


def _problem(kind: str, point: EntryPoint) -> str | None:
    try:
        _load(kind, point)
    except PluginError as error:
        return error.what
    return None


def _lack(kind: str, point: EntryPoint) -> str | None:
    """The package of an extra that a plug-in which loads needs and has not, with the way to install it."""
    package, command = getattr(_load(kind, point), "needs", ("", ""))
    if not package or importlib.util.find_spec(package) is not None:
        return None
    return f"the package {package} is not installed -> {command}"


def installed() -> tuple[Installed, ...]:
    """Every installed plug-in of every kind, each loaded once to see whether it does."""
    plugins = []
    for kind in KINDS:
        for point in sorted(_installed(kind), key=lambda point: point.name):
            distribution = point.dist.name if point.dist is not None else "unknown distribution"
            problem = _problem(kind, point) or _lack(kind, point)
            plugins.append(Installed(kind, point.name, f"{distribution}: {point.value}", problem))
    return tuple(plugins)
