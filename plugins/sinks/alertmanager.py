"""Notices as alerts of Prometheus's Alertmanager, by its v2 API: it groups, silences and routes them further."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from peel_agent.errors import printable
from peel_agent.records import Check, Notice, NoticeGroup
from peel_agent.spi import SinkPlugin, setting

from .limits import bearer, check_token
from .network import HttpSettings, Poster

PATH = "/api/v2/alerts"

RESEND_SECONDS = 120.0
"""An alert that Alertmanager has not heard of for its `resolve_timeout`, by default 5 minutes, is over for it."""

LONGEST_LABEL = 200


@dataclass(frozen=True)
class AlertmanagerSettings(HttpSettings):
    """`[[sink]]` with use = "alertmanager": its address, as `http://alertmanager:9093`; mostly it is a private one."""

    allow_private: bool = setting(True)
    token: str | None = setting(None, secret=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_token(self.token, of="an alertmanager")


class AlertmanagerSink:
    def __init__(self, settings: AlertmanagerSettings) -> None:
        url = settings.url.rstrip("/")
        endpoint = url if url.endswith(PATH) else url + PATH
        self._poster = Poster(replace(settings, url=endpoint), [settings.token or ""])
        self._headers = {"Content-Type": "application/json", **bearer(settings.token)}

    def deliver(self, group: NoticeGroup) -> None:
        alerts = [alert(notice, group) for notice in group.notices]
        self._poster.post(json.dumps(alerts, allow_nan=False).encode(), self._headers)

    def where(self) -> str:
        return f"Alertmanager at {self._poster.where()}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        """Whether the server is there and is who it says."""
        return self._poster.check()

    def close(self) -> None:
        """Each delivery has a connection of its own."""


def alert(notice: Notice, group: NoticeGroup) -> dict[str, object]:
    """One alert of the v2 API. Its labels are what it is known by: the same when it fires, goes on and ends.

    One that fires has no end: Alertmanager counts from when it heard of it last.
    """
    at = datetime.fromtimestamp(group.at, UTC).isoformat()
    annotations = {
        "summary": printable(notice.text),
        "step": "" if notice.step is None else str(notice.step),
        "causes": "\n".join(map(printable, notice.causes)),
        "command": printable(notice.command or ""),
    }
    form: dict[str, object] = {
        "labels": {
            "alertname": _label(notice.rule),
            "job": "peel-agent",
            "run": _label(group.run),
            "severity": notice.severity,
            "subject": _label(notice.subject),
        },
        "annotations": {key: text for key, text in annotations.items() if text},
    }
    if notice.state == "resolved":
        form["endsAt"] = at
    elif not group.standing:
        form["startsAt"] = at
    return form


def _label(text: str) -> str:
    return printable(text)[:LONGEST_LABEL]


class AlertmanagerPlugin:
    name = "alertmanager"
    settings = AlertmanagerSettings
    resend_seconds = RESEND_SECONDS

    def connect(self, settings: AlertmanagerSettings, *, state_dir: Path) -> AlertmanagerSink:  # noqa: ARG002
        return AlertmanagerSink(settings)


PLUGIN: SinkPlugin = AlertmanagerPlugin()
