"""sd_notify: what the agent tells the service manager, in the protocol of sd_notify(3)."""

from __future__ import annotations

import socket as sockets
from collections.abc import Callable

from peel_agent.errors import printable

PATIENCE = 0.5
"""Seconds that a service manager that does not read may hold the agent up."""


class Notifier:
    """Sends states to the datagram socket `socket` ($NOTIFY_SOCKET: a path, or "@name" of an abstract socket).

    Without one it does nothing. `watchdog_usec` is $WATCHDOG_USEC, to be given only where $WATCHDOG_PID is unset or
    this process; anything but a positive whole number is no watchdog. `monotonic` is the system's CLOCK_MONOTONIC in
    seconds (time.monotonic). No method raises: a service manager that is gone must not end a peeling.
    """

    def __init__(self, socket: str | None, watchdog_usec: str | None, *, monotonic: Callable[[], float]) -> None:
        self._address = _address(socket)
        self._monotonic = monotonic
        self._beaten: float | None = None
        self.interval = _half(watchdog_usec) if self._address is not None else None
        """Seconds between two beats of the watchdog, half of what systemd allows; None without one."""

    def ready(self, status: str) -> None:
        """The agent is up, or has reloaded."""
        self._send("READY=1", _status(status))

    def status(self, text: str) -> None:
        """The one line that `systemctl status` shows."""
        self._send(_status(text))

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(self._monotonic() * 1e6)}")

    def stopping(self) -> None:
        """The agent is going down."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """Called at every turn of the agent's loop: sends a beat when `interval` has passed since the last one."""
        if self.interval is None:
            return
        now = self._monotonic()
        if (self._beaten is None or now - self._beaten >= self.interval) and self._send("WATCHDOG=1"):
            self._beaten = now

    def _send(self, *lines: str) -> bool:
        """Whether the lines were sent."""
        if self._address is None:
            return False
        try:
            with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as sender:
                sender.settimeout(PATIENCE)
                sender.sendto("\n".join(lines).encode(), self._address)
        except (OSError, ValueError):  # ValueError: a path that cannot be encoded
            return False
        return True


def _address(socket: str | None) -> str | None:
    """The socket's address; None when there is none, or none of a kind that is known."""
    if not socket or socket[0] not in "/@":
        return None
    return "\0" + socket[1:] if socket[0] == "@" else socket


def _half(watchdog_usec: str | None) -> float | None:
    microseconds = int(watchdog_usec) if watchdog_usec and watchdog_usec.isascii() and watchdog_usec.isdigit() else 0
    return microseconds / 2e6 if microseconds else None


def _status(text: str) -> str:
    return f"STATUS={printable(text)}"
