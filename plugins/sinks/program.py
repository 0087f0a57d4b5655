"""Notices handed to a program of the user's own: an argument list, never a shell, and a time-out for all it starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from peel_agent.errors import ConfigurationError, DeliveryError, DestinationDenied, DestinationUnavailable, printable
from peel_agent.records import Check, NoticeGroup, plain
from peel_agent.spi import SinkPlugin, setting

from ..redaction import redacted  # noqa: TID252 -- shared by sinks and trackers
from .limits import check_timeout

LONGEST_TIMEOUT = 600.0

LATER = 75
"""EX_TEMPFAIL of sysexits.h."""

KEPT_BYTES = 4096
"""Of what it writes to stderr, the end is kept."""

READER_SECONDS = 1.0


@dataclass(frozen=True)
class ProgramSettings:
    """`[[sink]]` with use = "exec": the program with its arguments, and the three variables that it inherits."""

    command: tuple[str, ...] = field(repr=False)  # an argument may be a secret
    enabled: bool = setting(False)
    timeout_seconds: float = setting(30.0)
    path: str = setting(os.defpath, environment="PATH")
    home: str = setting("/", environment="HOME")
    lang: str = setting("C.UTF-8", environment="LANG")

    def __post_init__(self) -> None:
        if not self.command or not self.command[0]:
            raise ConfigurationError(
                "`command` of an exec sink is empty",
                remedy='name the program and its arguments: ["/usr/bin/page", "-q"]',
            )
        if not self.enabled:
            raise ConfigurationError(
                f"an exec sink would run {self.command[0]}, and is not enabled",
                remedy="add enabled = true if that program is meant to run for every group of notices, or take it out",
            )
        check_timeout(self.timeout_seconds, LONGEST_TIMEOUT, of="an exec sink")


class ProgramSink:
    """The program reads the group as JSON from stdin. Exit status 0 is delivered, 75 later, any other never."""

    def __init__(self, settings: ProgramSettings) -> None:
        self._settings = settings
        self._name = settings.command[0]

    def deliver(self, group: NoticeGroup) -> None:
        with tempfile.TemporaryFile() as message:  # a pipe would have to be fed while it runs
            message.write(json.dumps(plain(group), allow_nan=False).encode())
            message.seek(0)
            process = self._started(message, group)
        status, said = self._ended(process)
        if status == 0:
            return
        shown = redacted(said, self._settings.command[1:])
        how = f"with exit status {status}" if status >= 0 else f"by signal {-status}"
        what = f"{self._name} ended {how}{f': {shown}' if shown else ''}"
        if status == LATER:
            raise DestinationUnavailable(what, remedy="nothing to do yet: 75 asks for it to be tried again")
        raise DeliveryError(what, remedy="mend the program, then peel-agent deliveries resend")

    def where(self) -> str:
        return f"the program {self._name}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        """Whether the program is there. It is not run."""
        try:
            return (Check("program", True, f"{self._executable()} is there; it was not run"),)
        except DestinationDenied as error:
            return (Check("program", False, error.what, error.remedy),)

    def close(self) -> None:
        """Nothing of it runs between deliveries."""

    def _executable(self) -> str:
        executable = shutil.which(self._name, path=self._settings.path)
        if executable is None:
            raise DestinationDenied(
                f"the program {self._name} is not there, or may not be run (PATH is {self._settings.path})",
                remedy="install it, make it executable, or name it with its whole path in `command`",
            )
        return executable

    def _started(self, message: IO[bytes], group: NoticeGroup) -> subprocess.Popen[bytes]:
        states = {notice.state for notice in group.notices}
        environment = {
            "PATH": self._settings.path,
            "HOME": self._settings.home,
            "LANG": self._settings.lang,
            "PEEL_RUN": printable(group.run),
            "PEEL_STATE": "firing" if "firing" in states else "resolved",
        }
        executable = self._executable()
        try:
            return subprocess.Popen(  # noqa: S603 -- the list that the user enabled
                [executable, *self._settings.command[1:]],
                stdin=message,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise DestinationDenied(
                f"the program {executable} cannot be started: {error.strerror}",
                remedy="check its first line, its permissions and its file system",
            ) from None

    def _ended(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Its exit status and the end of what it wrote to stderr; what it left running is ended with it."""
        kept, has_ended = bytearray(), threading.Event()
        reader = threading.Thread(target=_read, args=(process.stderr, kept), name="stderr", daemon=True)
        reader.start()
        threading.Thread(target=_await, args=(process.pid, has_ended), name="exit", daemon=True).start()
        in_time = has_ended.wait(self._settings.timeout_seconds)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its number cannot be another's yet: it was not waited for
        status = process.wait()
        reader.join(READER_SECONDS)
        if not in_time:
            raise DestinationUnavailable(
                f"{self._name} did not end within {self._settings.timeout_seconds:g} s, and was killed",
                remedy="see what it waits for, or set timeout_seconds higher; it is tried again",
            )
        return status, kept.decode("utf-8", "replace")


def _await(process: int, has_ended: threading.Event) -> None:
    """Sees the end of a process, and leaves it to be waited for."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    has_ended.set()


def _read(stream: IO[bytes], kept: bytearray) -> None:
    with stream:
        while piece := os.read(stream.fileno(), 65536):
            kept += piece
            del kept[:-KEPT_BYTES]


class ProgramPlugin:
    name = "exec"
    settings = ProgramSettings

    def connect(self, settings: ProgramSettings, *, state_dir: Path) -> ProgramSink:  # noqa: ARG002 -- the protocol's
        return ProgramSink(settings)


PLUGIN: SinkPlugin = ProgramPlugin()
