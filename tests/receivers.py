"""Servers that notices are sent to: one for HTTP whose faults are chosen, one for mail, and their certificates."""

from __future__ import annotations

import contextlib
import email.policy
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from tests.servers import free_port

DRIP_SECONDS = 0.02
"""Between the pieces of an answer that is slow on purpose."""


@dataclass(frozen=True)
class Certificates:
    """An authority made for the tests, in a file, and contexts of servers that it signed."""

    ca_file: Path
    right: ssl.SSLContext
    other_name: ssl.SSLContext
    """Signed by the same authority, for another host."""
    unknown: ssl.SSLContext
    """For the right host, signed by an authority that nobody knows."""


def certificates(folder: Path, *names: str) -> Certificates:
    """Certificates for `localhost`, 127.0.0.1 and these names."""
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    hosts = ("localhost", "127.0.0.1", *names)
    return Certificates(
        folder / "ca.pem",
        _context(authority, *hosts),
        _context(authority, "elsewhere.example"),
        _context(stranger, *hosts),
    )


def _context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


@dataclass(frozen=True)
class Request:
    """What was asked, as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Act = Callable[["Receiver", socket.socket], None]
"""What a receiver does with a connection once it has read the request."""


@dataclass
class Receiver:
    """A server on loopback. `acts` are taken in order, one a request, and the last one goes on."""

    port: int
    acts: list[Act]
    requests: list[Request] = field(default_factory=list)
    greeting: bytes = b""
    connections: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    def act(self) -> Act:
        return self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]


def reply(status: int, body: bytes = b"", **headers: str) -> Act:
    """A whole answer; `_` in a header's name stands for `-`."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status} Words\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode()
    return lambda _, connection: connection.sendall(head + body)


def hang(receiver: Receiver, _: socket.socket) -> None:
    """No answer, and no end."""
    receiver.closing.wait()


def reset(_: Receiver, connection: socket.socket) -> None:
    """The connection is thrown away."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def dripping(head: bytes) -> Act:
    """This, and then a byte now and then, for ever."""

    def drip(receiver: Receiver, connection: socket.socket) -> None:
        connection.sendall(head)
        while not receiver.closing.wait(DRIP_SECONDS):
            connection.sendall(b"x")

    return drip


def flood(receiver: Receiver, connection: socket.socket) -> None:
    """A refusal whose body does not end."""
    connection.sendall(b"HTTP/1.1 403 Words\r\n\r\n")
    while not receiver.closing.is_set():
        connection.sendall(b"flood " * 10_000)


def says(raw: bytes) -> Act:
    """These bytes, whatever they mean."""
    return lambda _, connection: connection.sendall(raw)


def echo(receiver: Receiver, connection: socket.socket) -> None:
    """A refusal that repeats all that it was sent: a secret in it must not come out at the sender's end."""
    asked = receiver.requests[-1]
    words = f"no {asked.target} for {asked.headers}".encode()
    reply(403, words)(receiver, connection)


@contextlib.contextmanager
def http_receiver(*acts: Act, tls: ssl.SSLContext | None = None, greeting: bytes = b"") -> Iterator[Receiver]:
    """A receiver that listens. With a greeting it is no HTTP server: it speaks first, and acts on whatever it hears."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = Receiver(int(listener.getsockname()[1]), list(acts or (reply(204),)), greeting=greeting)
        threads: list[threading.Thread] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    receiver.connections += 1
                    threads.append(threading.Thread(target=_serve, args=(receiver, connection, tls)))
                    threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield receiver
        finally:
            receiver.closing.set()
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for thread in threads:
                thread.join()


def _serve(receiver: Receiver, connection: socket.socket, tls: ssl.SSLContext | None) -> None:
    with contextlib.suppress(OSError, ssl.SSLError, ValueError), contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        connection.settimeout(20)  # a client that says nothing
        if tls is not None:
            connection = stack.enter_context(tls.wrap_socket(connection, server_side=True))
        if receiver.greeting:
            connection.sendall(receiver.greeting)
            request = Request("", "", {}, connection.recv(65536))
        else:
            request = _request(connection)
        if request is not None:
            receiver.requests.append(request)
            receiver.act()(receiver, connection)


def _request(connection: socket.socket) -> Request | None:
    text = b""
    while b"\r\n\r\n" not in text:
        piece = connection.recv(65536)
        if not piece:
            return None
        text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    method, target, _ = first.split(" ")
    return Request(method, target, headers, body)


# ---------------------------------------------------------------- mail


@dataclass
class MailServer:
    """What came, in order; `refuse` maps a recipient, or DATA, to the answer that it gets instead of 250."""

    port: int
    security: str
    user: str
    password: str
    messages: list[EmailMessage] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)
    refuse: dict[str, str] = field(default_factory=dict)

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address in self.refuse:
            return self.refuse[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        if "DATA" in self.refuse:
            return self.refuse["DATA"]
        parser = BytesParser(_class=EmailMessage, policy=email.policy.default)
        self.messages.append(parser.parsebytes(envelope.content))  # type: ignore[arg-type]
        self.recipients.append(list(envelope.rcpt_tos))
        return "250 taken"

    def text(self) -> str:
        """Subjects and bodies of all that came."""
        return "\n".join(f"{one['Subject']}\n{one.get_content()}" for one in self.messages)

    def authenticate(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        right = (data.login, data.password) == (self.user.encode(), self.password.encode())
        return AuthResult(success=right, handled=False)


@contextlib.contextmanager
def mail_server(security: str, tls: ssl.SSLContext, *, user: str = "us", password: str = "") -> Iterator[MailServer]:
    """A mail server on loopback that speaks as `security` says; with a password it wants one."""
    server = MailServer(free_port(), security, user, password)
    options: dict[str, Any] = {"authenticator": server.authenticate, "auth_required": bool(password)}
    if security == "tls":
        options |= {"ssl_context": tls, "auth_require_tls": False}
    elif security == "starttls":
        options |= {"tls_context": tls, "require_starttls": True}
    controller = Controller(server, hostname="127.0.0.1", port=server.port, **options)
    controller.start()
    try:
        yield server
    finally:
        controller.stop()
