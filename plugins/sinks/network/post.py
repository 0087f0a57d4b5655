"""One POST over HTTP or HTTPS: no redirects, no surprises of the network, and an answer that is read with care."""

from __future__ import annotations

import http.client
import socket
from base64 import b64encode
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from urllib.parse import SplitResult, unquote, urlsplit

from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Check

from ...redaction import redacted  # noqa: TID252 -- shared by sinks and trackers
from .addresses import is_private
from .exchange import AddressRefused, Exchange, failure, trusted, within_tls
from .url import HttpSettings, authority, refused, shown

TOKEN_LENGTH = 8
"""A part of the address's path that is so long may be a token."""

LONGEST_ANSWER = 4096
"""Bytes of a refusal that are read. Of an acceptance nothing is: its status is enough."""

NEVER = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY})
"""Statuses that speak of this one body: it will not be taken later either."""

LATER = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
"""Statuses that, like 500 and above, may be over soon. All others stand until somebody changes something."""


class Poster:
    """Posts to the address of these settings. `secrets`, and the address itself, are in nothing that it says."""

    def __init__(self, settings: HttpSettings, secrets: Iterable[str] = ()) -> None:
        self._settings = settings
        self._url = urlsplit(settings.url)
        self._host = str(self._url.hostname)
        self._port = self._url.port or (443 if self._url.scheme == "https" else 80)
        self._target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        self._place = shown(self._url)
        proxy = urlsplit(settings.proxy or "")
        self._secrets = [settings.url, self._target, self._url.path, self._url.query, *_tokens(self._url)]
        self._secrets += [settings.proxy or "", unquote(proxy.password or ""), *secrets]

    def where(self) -> str:
        """The server, without what comes after its name."""
        return self._place

    def post(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Returns once the server has taken it. Raises DestinationUnavailable, DestinationDenied, DeliveryError."""
        exchange = Exchange(self._settings.timeout_seconds)
        answer = _Answer()
        try:
            exchange.run(partial(self._converse, exchange, body, headers, answer))
        except (OSError, http.client.HTTPException, DeliveryError) as error:
            if answer.status is None:  # else the rest of the answer is all that is missing
                raise self._failure(error) from None
        refusal = self._refusal(answer)
        if refusal is not None:
            raise refusal

    def check(self) -> tuple[Check, ...]:
        """Whether the server is there and is who it says; nothing is posted."""
        exchange = Exchange(self._settings.timeout_seconds)
        try:
            peer = exchange.run(lambda: self._peer(exchange))
        except (OSError, http.client.HTTPException, DeliveryError) as error:
            refusal = self._failure(error)
            return (Check("connection", False, refusal.what, refusal.remedy),)
        by = f"the proxy {peer}" if self._settings.proxy else peer
        sure = ", its certificate is right" if self._url.scheme == "https" else ""
        return (Check("connection", True, f"{self._place} is reached by {by}{sure}; nothing was posted"),)

    def _peer(self, exchange: Exchange) -> str:
        with self._connection(exchange) as connection:
            return str(connection.getpeername()[0])

    def _converse(self, exchange: Exchange, body: bytes, headers: Mapping[str, str], answer: _Answer) -> None:
        with self._connection(exchange) as connection:
            speaker = http.client.HTTPConnection(self._host, self._port)
            speaker.sock = connection
            speaker.request(
                "POST",
                self._target,
                body,
                {"Host": authority(self._url), "User-Agent": "peel-agent", "Connection": "close", **headers},
            )
            with speaker.getresponse() as response:
                if exchange.is_over:
                    raise TimeoutError
                answer.location = response.getheader("Location")
                answer.retry_after = response.getheader("Retry-After")
                answer.status = response.status
                if not 200 <= response.status < 300:
                    answer.text = response.read(LONGEST_ANSWER).decode("utf-8", "replace")

    def _connection(self, exchange: Exchange) -> socket.socket:
        """A connection to the server, by the proxy where there is one, and within TLS for https."""
        context = trusted(self._settings.ca_file) if self._url.scheme == "https" else None
        if self._settings.proxy is None:
            connection = exchange.connect(self._host, self._port, self._allows)
        else:
            connection = self._through(exchange, urlsplit(self._settings.proxy))
        return connection if context is None else within_tls(connection, context, self._host)

    def _allows(self, address: str) -> bool:
        return self._settings.allow_private or not is_private(address)

    def _through(self, exchange: Exchange, proxy: SplitResult) -> socket.socket:
        """A tunnel of the proxy's to the server: the proxy looks the name up, and sees nothing of what is said."""
        target = authority(self._url, self._port)
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if proxy.username is not None:
            pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            lines.append(f"Proxy-Authorization: Basic {b64encode(pair.encode()).decode()}")
        with ExitStack() as on_failure:
            connection = on_failure.enter_context(
                exchange.connect(str(proxy.hostname), proxy.port or 80, lambda _: True)
            )
            connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
            with http.client.HTTPResponse(connection, method="CONNECT") as response:
                response.begin()
                if response.status != HTTPStatus.OK:
                    raise DestinationDenied(
                        f"the proxy {proxy.hostname} answered {_named(response.status)} when asked for {self._place}",
                        remedy="check what the proxy lets through, and the user and password in `proxy`",
                    )
            on_failure.pop_all()
        return connection

    def _failure(self, error: Exception) -> DeliveryError:
        if isinstance(error, AddressRefused):
            return refused(self._host, error.address, DestinationDenied)
        if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
            return DestinationUnavailable(
                f"{self._place} does not answer as HTTP does", remedy="check what listens there; it is tried again"
            )
        place = f"the proxy for {self._place}" if self._settings.proxy and isinstance(error, socket.gaierror) else ""
        return failure(place or self._place, error, seconds=self._settings.timeout_seconds)

    def _refusal(self, answer: _Answer) -> DeliveryError | None:
        status = answer.status
        assert status is not None
        if 200 <= status < 300:
            return None
        said = redacted(answer.text, self._secrets)
        what = f"{self._place} answered {_named(status)}{f': {said}' if said else ''}"
        if 300 <= status < 400:
            target = redacted(shown(urlsplit(answer.location or "")), self._secrets)
            return DestinationDenied(
                f"{self._place} answered {_named(status)} to {target}: redirects are not followed",
                remedy="set `url` to the address where notices are taken",
            )
        if status >= 500 or status in LATER:
            pause = redacted(answer.retry_after or "", self._secrets)
            asks = f" (it asks to wait: Retry-After {pause})" if pause else ""
            return DestinationUnavailable(what + asks, remedy="see what the server says of it; it is tried again")
        if status in NEVER:
            return DeliveryError(
                what, remedy="see whether it is made for this kind of sink; then peel-agent deliveries resend"
            )
        return DestinationDenied(what, remedy="check the `url`, its token, and what the server lets us do")


@dataclass
class _Answer:
    """What is known of an answer so far."""

    status: int | None = None
    location: str | None = None
    retry_after: str | None = None
    text: str = ""


def _tokens(url: SplitResult) -> list[str]:
    return [part for part in url.path.split("/") if len(part) >= TOKEN_LENGTH]


def _named(status: int) -> str:
    try:
        return f"{status} ({HTTPStatus(status).phrase})"
    except ValueError:
        return str(status)
