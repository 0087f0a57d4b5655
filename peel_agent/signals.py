"""Signals of the agent."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """One handler for SIGTERM, SIGINT and SIGHUP."""
    before = {number: signal.signal(number, handler) for number in HANDLED}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
