"""What each path answers. No sockets: an HTTP request's head goes in, an answer comes out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder

from peel_agent.errors import printable
from peel_agent.health.metrics import registry_of
from peel_agent.records.figures import AgentFigures

REASONS = 100
"""Reasons that `/readyz` lists."""

METHODS = ("GET", "HEAD")
NOT_ALIVE = "the agent's loop has not ticked lately\n"
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Request:
    """A request's method, its path without the query, and what it accepts."""

    method: str
    path: str
    accept: str


@dataclass(frozen=True)
class Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT

    def encoded(self, method: str) -> bytes:
        """What is sent: the status line, the headers, and the body unless `method` is HEAD."""
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Cache-Control: no-store",
            "Connection: close",
        ]
        if self.status == HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: " + ", ".join(METHODS))
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        return head if method == "HEAD" else head + self.body


def refusal(status: HTTPStatus) -> Answer:
    """An answer that says no more than its status."""
    return Answer(status, f"{status.phrase}\n".encode())


def request_of(head: bytes) -> Request | Answer:
    """The request whose first line and headers are `head`, or the answer that refuses it."""
    first, _, headers = head.partition(b"\r\n")
    words = first.decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return refusal(HTTPStatus.BAD_REQUEST)
    try:
        path = urlsplit(words[1]).path
        accept = parse_headers(io.BytesIO(headers)).get_all("Accept", [])
    except HTTPException:
        return refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    except ValueError:
        return refusal(HTTPStatus.BAD_REQUEST)
    return Request(words[0], path, ",".join(str(one) for one in accept))


class Pages:
    """`/healthz`, `/readyz` and `/metrics`.

    `alive` answers at once. `figures` may take its time and may fail; a failure is told by its class alone.
    """

    def __init__(self, figures: Callable[[], AgentFigures], alive: Callable[[], bool]) -> None:
        self._figures = figures
        self._alive = alive
        self._registry = registry_of(figures)

    def at_once(self, request: Request) -> Answer | None:
        """The answer to `request`; None when it needs the figures."""
        if request.path not in ("/healthz", "/readyz", "/metrics"):
            return refusal(HTTPStatus.NOT_FOUND)
        if request.method not in METHODS:
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED)
        return self._healthz() if request.path == "/healthz" else None

    def from_figures(self, request: Request) -> Answer:
        """The answer to a request for which `at_once` has none. Never raises."""
        try:
            return self._readyz() if request.path == "/readyz" else self._metrics(request.accept)
        except Exception as error:  # whatever it is, the agent works on and the prober is told its class
            return self.without_figures(request, error)

    def without_figures(self, request: Request, error: Exception) -> Answer:
        """The answer when the figures cannot be read because of `error`."""
        reason = f"the agent's figures cannot be read: {type(error).__name__}"
        if request.path == "/readyz":
            return _readiness(ready=False, reasons=(reason,))
        return Answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{printable(reason)}\n".encode())

    def _healthz(self) -> Answer:
        try:
            alive = self._alive()
        except Exception as error:  # as above
            return Answer(HTTPStatus.SERVICE_UNAVAILABLE, f"liveness is not known: {type(error).__name__}\n".encode())
        return Answer(HTTPStatus.OK, b"ok\n") if alive else Answer(HTTPStatus.SERVICE_UNAVAILABLE, NOT_ALIVE.encode())

    def _readyz(self) -> Answer:
        figures = self._figures()
        return _readiness(ready=figures.ready, reasons=figures.unready)

    def _metrics(self, accept: str) -> Answer:
        try:
            encode, content_type = choose_encoder(accept if accept.isprintable() else "")
        except (TypeError, ValueError):  # the library compares a version that is no number
            encode, content_type = choose_encoder("")
        return Answer(HTTPStatus.OK, encode(self._registry), content_type)


def _readiness(*, ready: bool, reasons: tuple[str, ...]) -> Answer:
    body = {"ready": ready, "reasons": [printable(reason) for reason in reasons[:REASONS]]}
    return Answer(
        HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE,
        json.dumps(body).encode() + b"\n",
        "application/json",
    )
