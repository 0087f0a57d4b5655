"""One exchange over one connection, within a time that counts all of it, to addresses that are allowed."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable

MOST_ADDRESSES = 4
"""Of one name, so many addresses are tried."""

Answer = TypeVar("Answer")


class AddressRefused(OSError):
    """Every address of the host is one that must not be connected to; `address` is the first."""

    def __init__(self, address: str) -> None:
        super().__init__(f"{address} is refused")
        self.address = address


class Exchange:
    """Used once. `seconds` limit the look-up of the name, the connection, TLS and the whole conversation together.

    A socket's own time-out is for each call: a peer that sends a byte now and then would hold a lane for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self.is_over = False
        """Whether nobody waits for the answer any more: what comes now was cut off."""
        self._handle: socket.socket | None = None

    def run(self, work: Callable[[], Answer]) -> Answer:
        """What `work` returns or raises; TimeoutError when it takes too long, and then its connection is cut."""
        answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put(work())
            except Exception as error:  # it is raised again in the thread that waits
                answers.put(error)

        threading.Thread(target=answer, name="exchange", daemon=True).start()
        try:
            answered = answers.get(timeout=self._seconds)
        except queue.Empty:
            raise TimeoutError from None
        finally:
            self._end()
        if isinstance(answered, Exception):
            raise answered
        return answered

    def connect(self, host: str, port: int, allows: Callable[[str], bool]) -> socket.socket:
        """A connection to the first address of `host` that is allowed and answers. Called within `work`.

        The name is looked up once, and what was looked at is what is connected to: a name server that answers
        differently the next time gains nothing. Raises AddressRefused and OSError.
        """
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        allowed = [entry for entry in resolved if allows(str(entry[4][0]))][:MOST_ADDRESSES]
        failure: OSError = AddressRefused(str(resolved[0][4][0]))
        for family, kind, protocol, _, address in allowed:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(self._seconds / len(allowed))
            try:
                connection.connect(address)
            except OSError as error:
                connection.close()
                failure = error
                continue
            connection.settimeout(None)  # the limit of the whole is enough, and there is one error for it
            self._hold(connection)
            return connection
        raise failure

    def _hold(self, connection: socket.socket) -> None:
        """Keeps a second handle of it, which can cut it whatever wraps the first one by then."""
        with self._lock:
            if self.is_over:
                connection.close()
                raise TimeoutError
            self._handle = connection.dup()

    def _end(self) -> None:
        with self._lock:
            self.is_over = True
            if self._handle is not None:
                with suppress(OSError):  # it has ended by itself
                    self._handle.shutdown(socket.SHUT_RDWR)
                self._handle.close()


def trusted(ca_file: Path | None) -> ssl.SSLContext:
    """TLS that trusts the system's authorities, or those of this file instead. Raises DestinationDenied."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise DestinationDenied(
            f"the authorities of ca_file {ca_file} cannot be read: {error.strerror or error}",
            remedy="name a readable file of certificates in PEM form",
        ) from None


def within_tls(connection: socket.socket, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    """The connection within TLS, once the server has shown that it is `host`. Closed when it is not."""
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise


def failure(place: str, error: Exception, *, seconds: float) -> DeliveryError:
    """What kept an exchange with `place` from its end. The words of the peer are not in it."""
    if isinstance(error, DeliveryError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return DestinationDenied(
            f"the certificate of {place} is not to be trusted: {error.verify_message}",
            remedy="have the server's certificate mended, or name the authority that signed it in ca_file",
        )
    if isinstance(error, TimeoutError):
        return DestinationUnavailable(
            f"{place} did not finish within {seconds:g} s",
            remedy="see whether it is overloaded, or set timeout_seconds higher; it is tried again",
        )
    if isinstance(error, socket.gaierror):
        return DestinationUnavailable(
            f"{place} has no address: {error.strerror}", remedy="check the name and the resolver; it is tried again"
        )
    if isinstance(error, ssl.SSLError):
        return DestinationUnavailable(
            f"no TLS connection to {place}: {error.reason or 'it was cut off'}",
            remedy="check the port, and that TLS is spoken there; it is tried again",
        )
    what = error.strerror if isinstance(error, OSError) and error.strerror else "the connection was cut off"
    return DestinationUnavailable(f"{place} cannot be reached: {what}", remedy="check that it is up; it is tried again")
