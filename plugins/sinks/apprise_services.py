"""Notices to any of the services that Apprise knows, each named by one of Apprise's URLs."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.errors import ConfigurationError, DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Check, NoticeGroup
from peel_agent.spi import SinkPlugin, setting

from .limits import check_timeout
from .network import Exchange
from .taken import Taken
from .wording import headline, paragraphs

LONGEST_TIMEOUT = 300.0
INSTALL = 'pip install "peel-agent[apprise]"'


@dataclass(frozen=True)
class AppriseSettings:
    """`[[sink]]` with use = "apprise": the services' URLs, which hold their passwords."""

    urls: tuple[str, ...] = setting(secret=True)
    timeout_seconds: float = setting(60.0)

    def __post_init__(self) -> None:
        for number, url in enumerate(self.urls, 1):
            if not re.match(r"[A-Za-z][\w.+-]*://", url):
                raise ConfigurationError(
                    f"number {number} of the `urls` of an apprise sink is none (it is not shown: it may hold a secret)",
                    remedy="write each as Apprise does: service://what/it/needs",
                )
        if not self.urls:
            raise ConfigurationError("`urls` of an apprise sink is empty", remedy='list them: ["${CHAT_URL}"]')
        check_timeout(self.timeout_seconds, LONGEST_TIMEOUT, of="an apprise sink")


class AppriseSink:
    """A service that has taken a group does not get it again while others are tried again."""

    def __init__(self, settings: AppriseSettings) -> None:
        self._settings = settings
        self._taken = Taken()
        self._sending = threading.Lock()

    def deliver(self, group: NoticeGroup) -> None:
        library = _library()
        services = {_name(number, url): url for number, url in enumerate(self._settings.urls, 1)}
        wanted = {name: _service(library, name, services[name]) for name in self._taken.lack(group.id, tuple(services))}
        if not self._sending.acquire(blocking=False):
            raise DestinationUnavailable(
                "Apprise is still sending what it was given before", remedy="see which service hangs; it is tried again"
            )
        try:
            refused = Exchange(self._settings.timeout_seconds).run(lambda: self._send(library, wanted, group))
        except TimeoutError:
            raise DestinationUnavailable(
                f"Apprise did not finish within {self._settings.timeout_seconds:g} s",
                remedy="see which service hangs, or set timeout_seconds higher; it is tried again",
            ) from None
        if refused:
            raise DestinationUnavailable(
                f"Apprise could not hand it to {', '.join(refused)}, of {len(services)} in `urls`",
                remedy="try the URL with the `apprise` command, which says why; it is tried again",
            )

    def where(self) -> str:
        return f"Apprise: {', '.join(_scheme(url) for url in self._settings.urls)}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        """Whether Apprise is there and understands each URL. Nothing is sent."""
        checks = []
        for number, url in enumerate(self._settings.urls, 1):
            name = _name(number, url)
            try:
                _service(_library(), name, url)
                checks.append(Check(name, True, "Apprise understands its URL; nothing was sent"))
            except DeliveryError as error:
                checks.append(Check(name, False, error.what, error.remedy))
        return tuple(checks)

    def close(self) -> None:
        """Each delivery has connections of its own."""

    def _send(self, library: Any, wanted: dict[str, Any], group: NoticeGroup) -> list[str]:
        """The names of the services that did not take it."""
        try:
            return [name for name, service in wanted.items() if not self._send_to(library, name, service, group)]
        finally:
            self._sending.release()

    def _send_to(self, library: Any, name: str, service: Any, group: NoticeGroup) -> bool:
        sender = library.Apprise(asset=service.asset)
        sender.add(service)
        try:
            took = sender.notify(
                title=headline(group),
                body="\n\n".join(paragraphs(group)),
                body_format=library.NotifyFormat.TEXT,
                notify_type=_type(library, group),
            )
        except Exception:  # a hundred libraries stand behind it, and what they say may hold the URL
            took = False
        if took:
            self._taken.add(name)
        return bool(took)


def _library() -> Any:
    try:
        import apprise
    except ImportError:
        raise DestinationDenied(
            "the apprise sink needs the package apprise, which is not installed",
            remedy=INSTALL,
        ) from None
    log = logging.getLogger("apprise")  # it would tell of every attempt, in words of its own
    log.propagate = False
    log.handlers = [logging.NullHandler()]
    logging.getLogger("urllib3").setLevel(logging.INFO)  # below it tells of every path
    return apprise


def _service(library: Any, name: str, url: str) -> Any:
    asset = library.AppriseAsset(app_id="peel-agent", app_desc="notices of peel-agent", plugin_paths=[])
    asset.http_redirects = False
    service = library.Apprise.instantiate(url, asset=asset)
    if service is None:
        raise DestinationDenied(
            f"Apprise does not understand {name} of `urls`",
            remedy="correct it: `apprise --details` shows what each service needs",
        )
    return service


def _type(library: Any, group: NoticeGroup) -> Any:
    severities = {notice.severity for notice in group.notices if notice.state == "firing"}
    if not severities:
        return library.NotifyType.SUCCESS
    if "critical" in severities:
        return library.NotifyType.FAILURE
    return library.NotifyType.WARNING if "warning" in severities else library.NotifyType.INFO


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _name(number: int, url: str) -> str:
    return f"number {number} ({_scheme(url)})"


class ApprisePlugin:
    name = "apprise"
    settings = AppriseSettings
    needs = ("apprise", INSTALL)

    def connect(self, settings: AppriseSettings, *, state_dir: Path) -> AppriseSink:  # noqa: ARG002 -- the protocol's
        return AppriseSink(settings)


PLUGIN: SinkPlugin = ApprisePlugin()
