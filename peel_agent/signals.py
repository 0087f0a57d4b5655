"""Signals: those of the agent, and the Ctrl-C that ends any other command."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

GRACE_SECONDS = 15.0
"""A command that was interrupted ends within this time, even where a library swallowed the interrupt."""

AGAIN_SECONDS = 0.1


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """One handler for SIGTERM, SIGINT and SIGHUP."""
    before = {number: signal.signal(number, handler) for number in HANDLED}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def exit_status(number: int) -> int:
    """The exit status of a process that a signal ended, as shells give it: 130 for Ctrl-C."""
    return 128 + number


def status_of_stop(number: int, *, is_service: bool) -> int:
    """The exit status of an agent that a signal stopped: SIGTERM is how a service ends well, and nothing else is."""
    return 0 if is_service and number == signal.SIGTERM else exit_status(number)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; `words` say in one sentence what was under way and what is kept of it."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


@dataclass
class Interruption:
    """Which signal interrupted the command; None while none did."""

    number: int | None = None


@contextmanager
def interruptible(*, to_the_end: bool) -> Iterator[Interruption]:
    """SIGINT raises KeyboardInterrupt once; a second one is not heard, so that what the first began can end.

    An interrupt that Python drops, as it does in a destructor, is raised again. SIGINT stays ignored where it is, and
    afterwards too when that is `to_the_end` of the process: only the interpreter is left to end then.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread() or _is_ignored():
        yield interruption
        return

    is_over = dropped = False

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if interruption.number is None and not is_over:
            interruption.number = number
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
            raise KeyboardInterrupt

    def late(_number: int, _frame: FrameType | None) -> None:
        nonlocal dropped
        if not dropped:
            _end(signal.SIGINT, "interrupted")
        dropped = False
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        raise KeyboardInterrupt

    def drop(unraisable: Any) -> None:
        nonlocal dropped
        if interruption.number is None:
            report(unraisable)
        elif unraisable.exc_type is KeyboardInterrupt:
            dropped = True
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    report, sys.unraisablehook = sys.unraisablehook, drop
    on_alarm = signal.signal(signal.SIGALRM, late)
    on_interrupt = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interruption
    finally:
        is_over = True
        signal.signal(signal.SIGINT, signal.SIG_IGN if to_the_end else on_interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, on_alarm)
        sys.unraisablehook = report


@contextmanager
def ending_at_once() -> Iterator[None]:
    """SIGINT ends the process with one sentence: for the imports at its start, where nothing is to be kept."""
    if threading.current_thread() is not threading.main_thread() or _is_ignored():
        yield
        return
    earlier = signal.signal(signal.SIGINT, lambda number, _: _end(number, "interrupted before anything was begun"))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _is_ignored() -> bool:
    """As in a job that a shell runs in the background."""
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def _end(number: int, words: str) -> None:
    os.write(2, f"peel-agent: {words}\n".encode())
    os._exit(exit_status(number))
