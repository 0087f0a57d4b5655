"""The address that a sink posts to: which ones are taken, and what of one may be shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from peel_agent.errors import ConfigurationError, PeelError
from peel_agent.spi import setting

from ..limits import check_timeout  # noqa: TID252 -- shared with sinks that use no network
from .addresses import is_literal, is_private

LONGEST_TIMEOUT = 120.0

Refusal = TypeVar("Refusal", bound=PeelError)


@dataclass(frozen=True)
class HttpSettings:
    """What every sink has that posts to an address: it often is the key to the place, and is shown by its host alone.

    A proxy is shown so too, and is no `secret` as such, of which a user would be warned: most have no password.
    """

    url: str = setting(secret=True)
    timeout_seconds: float = setting(10.0)
    allow_private: bool = setting(False)
    ca_file: Path | None = setting(None)
    proxy: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        url = _split("url", self.url, ("https", "http"))
        if url.username is not None or url.fragment:
            raise ConfigurationError(
                f"the `url` of a sink at {url.hostname} holds a user name, a password or a #fragment",
                remedy="leave it out, and give a token of its own where the sink has one",
            )
        if url.scheme == "http" and not self.allow_private:
            raise ConfigurationError(
                f"the `url` of a sink at {url.hostname} is http, which anybody on the way can read",
                remedy="use https, or allow_private = true within a network of your own",
            )
        if is_literal(str(url.hostname)) and is_private(str(url.hostname)) and not self.allow_private:
            raise refused(str(url.hostname), str(url.hostname), ConfigurationError)
        if self.proxy is not None:
            _split("proxy", self.proxy, ("http",))
            if url.scheme == "http":
                raise ConfigurationError(
                    f"the `url` of a sink at {url.hostname} is http, and a `proxy` is for https only",
                    remedy="use https, or take `proxy` out",
                )
        check_timeout(self.timeout_seconds, LONGEST_TIMEOUT, of="a sink")


def _split(key: str, text: str, schemes: tuple[str, ...]) -> SplitResult:
    """The parts of an address; ConfigurationError, without the address, for one that cannot be used."""
    try:
        url = urlsplit(text)
        valid = url.scheme in schemes and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigurationError(
            f"the `{key}` of a sink is no address that can be used (it is not shown: it may hold a secret)",
            remedy=f"write it as {schemes[0]}://host/path, in plain ASCII, without spaces",
        )
    return url


def refused(host: str, address: str, kind: type[Refusal]) -> Refusal:
    """The error for an address that may not be connected to."""
    named = host if host == address else f"{host} ({address})"
    return kind(
        f"{named} is an address of a private network or of this machine",
        remedy="set allow_private = true for this sink if it is meant, or correct its `url`",
    )


def shown(url: SplitResult) -> str:
    """Scheme, host and port alone."""
    try:
        return f"{url.scheme}://{authority(url)}" if url.hostname else "another address"
    except ValueError:
        return "another address"


def authority(url: SplitResult, port: int | None = None) -> str:
    """Host and port as a URL has them; `port` where it names none."""
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else str(url.hostname)
    port = url.port or port
    return f"{host}:{port}" if port else host
