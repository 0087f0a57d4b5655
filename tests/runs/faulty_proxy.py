"""A proxy before a real server that fails as it is told: for faults that a server does not make on command."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Fault = Callable[[BaseHTTPRequestHandler], bool]
"""Answers a request in the server's place, and returns whether it did."""


@dataclass
class Proxy:
    """`fault` decides what fails now; `requests` are the paths that were asked for."""

    uri: str
    fault: Fault | None = None
    requests: list[str] = field(default_factory=list)


def answering(status: int, body: str, *, only: str = "", seconds: float = 0.0) -> Fault:
    """Requests whose path holds `only` get this status and body, after some seconds."""

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        if only not in handler.path:
            return False
        time.sleep(seconds)
        _answer(handler, status, body.encode(), {})
        return True

    return fault


def slow(seconds: float) -> Fault:
    """Every request waits, and is answered then."""

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        time.sleep(seconds)
        return False

    return fault


def cut_after_write() -> Fault:
    """The server gets the request, and nobody gets its answer: as when it is restarted in the middle of a write."""

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        if "log-batch" in handler.path or handler.command == "PUT":
            _forward(handler)
            handler.connection.close()
            return True
        return False

    return fault


def killing(writes: Path, kill: Callable[[], None]) -> Fault:
    """The server gets a batch of numbers, and is killed while it writes: when the file `writes` is there."""

    def forward(handler: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            _forward(handler)

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        if "log-batch" not in handler.path:
            return False
        request = threading.Thread(target=forward, args=(handler,))
        request.start()
        while request.is_alive() and not writes.exists():
            time.sleep(0)
        kill()
        request.join()
        handler.connection.close()
        return True

    return fault


@contextlib.contextmanager
def faulty_proxy(server: str) -> Iterator[Proxy]:
    """A proxy on loopback before the server of this URI."""
    target = urlsplit(server)

    class Handler(BaseHTTPRequestHandler):
        upstream = target

        def handle_any(self) -> None:
            proxy.requests.append(self.path)
            if proxy.fault is not None and proxy.fault(self):
                return
            with contextlib.suppress(OSError):
                _answer(self, *_forward(self))

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A connection that was cut."""

    with Server(("127.0.0.1", 0), Handler) as listener:
        proxy = Proxy(f"http://127.0.0.1:{listener.server_address[1]}")
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        yield proxy
        listener.shutdown()
        thread.join()


def _forward(handler: BaseHTTPRequestHandler) -> tuple[int, bytes, dict[str, str]]:
    target = handler.upstream  # type: ignore[attr-defined]
    length = int(handler.headers.get("Content-Length") or 0)
    if not hasattr(handler, "own_body"):
        handler.own_body = handler.rfile.read(length)  # type: ignore[attr-defined]
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
    headers = {key: value for key, value in handler.headers.items() if key.lower() != "host"}
    try:
        connection.request(handler.command, handler.path, handler.own_body, headers)  # type: ignore[attr-defined]
        response = connection.getresponse()
        return response.status, response.read(), {"Content-Type": response.getheader("Content-Type") or "text/plain"}
    finally:
        connection.close()


def _answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    with contextlib.suppress(OSError):
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
