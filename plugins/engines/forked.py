"""Workers that are forked from a process which has read in torch and transformers: see peel_agent.worker_server.

What is read in once serves each checkpoint that follows within a minute: a backlog, several runs, `watch --once`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress

import psutil

ROOM_BYTES = 2 << 30
"""With less memory free than this, no process is kept to fork from: each worker is started by itself."""

END_SECONDS = 5.0

STDERR = 2


def command(niceness: int) -> list[str]:
    """How the process is started from which workers are forked. -P: as for a worker."""
    return [sys.executable, "-P", "-m", "peel_agent.worker_server", str(niceness)]


class ForkedWorker:
    """What the engine needs of `subprocess.Popen`, for a worker that another process has forked.

    `stdin`, `stdout` and `outcome` are our ends of pipes; on the last the exit status comes. `status` is that of a
    worker which has ended already.
    """

    def __init__(self, pid: int, stdin: int, stdout: int, outcome: int, status: int | None) -> None:
        self.pid = pid
        self._stdin, self._stdout, self._outcome = stdin, stdout, outcome
        self._status = status
        self._waiting, self._killing = threading.Lock(), threading.Lock()
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except OSError:  # it has ended
            self._handle = None

    def kill(self) -> None:
        with self._killing, suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def communicate(self, text: str) -> tuple[str, None]:
        """Hands it the text, which it reads to the end before it writes, and returns what it wrote until its end."""
        with suppress(BrokenPipeError), os.fdopen(self._stdin, "w", encoding="utf-8") as stdin:
            stdin.write(text)
        with os.fdopen(self._stdout, encoding="utf-8") as stdout:
            return stdout.read(), None

    def wait(self, timeout: float) -> int:
        """Its exit status, negative for a signal. subprocess.TimeoutExpired when it has none within so many seconds."""
        with self._waiting:
            if self._status is None:
                if not select.select([self._outcome], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("worker", timeout)
                line = os.read(self._outcome, 64)
                self._status = int(line) if line else -signal.SIGKILL  # what forked it was killed: it ends too
            self._release()
            return self._status

    def _release(self) -> None:
        with self._killing:
            if self._outcome >= 0:
                os.close(self._outcome)
            if self._handle is not None:
                os.close(self._handle)
            self._outcome, self._handle = -1, None


class WorkerServers:
    """At most one process at a time from which workers are forked; it is started when the first is asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._niceness = 0
        self._closed = False

    def start(self, environment: Mapping[str, str], niceness: int) -> ForkedWorker | None:
        """A worker that waits for its request; None where it is better started by itself.

        That is so when memory is short; when the system has no pidfd_open; when this worker is to have more priority
        than the process that would fork it; and when that process fails to import what workers need: a worker that is
        started by itself then says why.
        """
        if psutil.virtual_memory().available < ROOM_BYTES or not hasattr(os, "pidfd_open"):
            return None
        with self._lock:
            for _ in range(2):  # a process that ends just now, for nothing was asked of it, is followed by another
                if self._closed or (self._process is not None and niceness < self._niceness):
                    return None
                with suppress(OSError):
                    if self._channel is None:
                        self._channel = self._open(environment, niceness)
                    worker = self._ask(self._channel, environment)
                    if worker is not None:
                        return worker
                self._end()
        return None

    def close(self) -> None:
        """Ends the process and its workers, also while it is being started."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _open(self, environment: Mapping[str, str], niceness: int) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                command(niceness),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,  # as a worker
            )
        threading.Thread(target=self._process.wait, name="worker server", daemon=True).start()  # none stays a zombie
        if self._closed:  # meanwhile
            self._process.kill()
        self._niceness = niceness
        return ours

    def _ask(self, channel: socket.socket, environment: Mapping[str, str]) -> ForkedWorker | None:
        """A worker, or None when the process has ended before it forked one."""
        (its_stdin, stdin), (stdout, its_stdout), (outcome, its_outcome) = os.pipe(), os.pipe(), os.pipe()
        theirs = (its_stdin, its_stdout, STDERR, its_outcome)
        try:
            socket.send_fds(channel, [json.dumps({"environment": dict(environment)}).encode()], theirs)
            failed = False
        except OSError:
            failed = True
        for descriptor in (its_stdin, its_stdout, its_outcome):
            os.close(descriptor)
        lines = [] if failed else os.read(outcome, 64).split()
        if not lines:
            for descriptor in (stdin, stdout, outcome):
                os.close(descriptor)
            return None
        return ForkedWorker(int(lines[0]), stdin, stdout, outcome, int(lines[1]) if len(lines) > 1 else None)

    def _end(self) -> None:
        """Its workers end with it."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            self._process.kill()
            self._process.wait()
        self._channel = self._process = None
