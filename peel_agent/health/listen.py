"""`[health] listen`: from its text to a listening socket."""

from __future__ import annotations

import errno
import re
import socket
from dataclasses import dataclass

from peel_agent.errors import ConfigurationError

_PLACE = re.compile(r"(?:\[(?P<six>[^\[\]\s]+)\]|(?P<name>[^\[\]\s:]*)):(?P<port>[0-9]{1,5})", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A host and a TCP port. An empty host is every address of the machine, port 0 any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def place_of(listen: str) -> Place | None:
    """The place that `listen` names: `HOST:PORT`, `:PORT` or `[IPV6]:PORT`; None when it is empty.

    ConfigurationError for any other text.
    """
    if not listen:
        return None
    match = _PLACE.fullmatch(listen)
    if match is None or int(match["port"]) > 65535:
        raise ConfigurationError(
            f'[health] listen = "{listen}" is no address',
            remedy='write HOST:PORT, as in "127.0.0.1:9877", ":9877" (every address) or "[::1]:9877"; "" turns it off',
        )
    return Place(match["six"] or match["name"], int(match["port"]))


def listening(place: Place) -> socket.socket:
    """A socket that listens at `place`; ConfigurationError when the port is taken or the address is not ours."""
    try:
        return _bound(place)
    except OSError as error:
        raise _refusal(place, error) from error


def place_of_socket(listener: socket.socket) -> Place:
    """Where a listening socket listens, with the port that the system chose for port 0."""
    host, port = listener.getsockname()[:2]
    return Place(str(host), int(port))


def _bound(place: Place) -> socket.socket:
    if place.host:
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        return socket.create_server((place.host, place.port), family=family)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # a machine with IPv6 turned off
                raise
    return socket.create_server(("0.0.0.0", place.port))  # noqa: S104 - the empty host asks for every address


def _refusal(place: Place, error: OSError) -> ConfigurationError:
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"[health] listen: {place} is in use by another process",
            remedy='stop that process, set another port, or set listen = "" to turn the health endpoint off',
        )
    return ConfigurationError(
        f"[health] listen: cannot listen at {place}: {error.strerror or error}",
        remedy="set an address of this machine and a port above 1023",
    )
