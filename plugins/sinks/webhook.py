"""Notices as CloudEvents 1.0, each group one JSON document posted to an address of the user's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from peel_agent.errors import ConfigurationError
from peel_agent.records import Check, NoticeGroup, plain
from peel_agent.spi import SinkPlugin, setting

from .limits import bearer, check_token
from .network import HttpSettings, Poster
from .signature import HEADER, signature

TYPE = "peel-agent.notices.v1"
CONTENT_TYPE = "application/cloudevents+json"


@dataclass(frozen=True)
class WebhookSettings(HttpSettings):
    """`[[sink]]` with use = "webhook": the address, and what it proves the sender by."""

    token: str | None = setting(None, secret=True)
    signing_secret: str | None = setting(None, secret=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_token(self.token, of="a webhook")
        if self.signing_secret is not None and not self.signing_secret:
            raise ConfigurationError(
                "the `signing_secret` of a webhook is empty", remedy="give it, or take the key out: nothing is signed"
            )


class WebhookSink:
    """`clock` gives Unix seconds: a receiver may refuse what was signed long ago, so that nobody can repeat it."""

    def __init__(self, settings: WebhookSettings, clock: Callable[[], float]) -> None:
        self._token = settings.token
        self._signing_secret = settings.signing_secret
        self._clock = clock
        self._poster = Poster(settings, [settings.token or "", settings.signing_secret or ""])

    def deliver(self, group: NoticeGroup) -> None:
        body = json.dumps(cloud_event(group), allow_nan=False).encode()
        headers = {"Content-Type": CONTENT_TYPE, **bearer(self._token)}
        if self._signing_secret is not None:
            headers[HEADER] = signature(self._signing_secret, body, self._clock())
        self._poster.post(body, headers)

    def where(self) -> str:
        return f"a webhook at {self._poster.where()}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        """Whether the server is there and is who it says."""
        return self._poster.check()

    def close(self) -> None:
        """Each delivery has a connection of its own."""


def cloud_event(group: NoticeGroup) -> dict[str, object]:
    """The group as a CloudEvent in structured mode; the same group is the same event whenever it is sent."""
    return {
        "specversion": "1.0",
        "id": group.id,
        "source": f"peel-agent/{quote(group.run, safe='', errors='replace')}",
        "type": TYPE,
        "time": datetime.fromtimestamp(group.at, UTC).isoformat(),
        "datacontenttype": "application/json",
        "data": plain(group),
    }


class WebhookPlugin:
    name = "webhook"
    settings = WebhookSettings

    def connect(self, settings: WebhookSettings, *, state_dir: Path) -> WebhookSink:  # noqa: ARG002 -- the protocol's
        return WebhookSink(settings, time.time)


PLUGIN: SinkPlugin = WebhookPlugin()
