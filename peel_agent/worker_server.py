"""The process from which workers are forked (`python -m peel_agent.worker_server NICENESS`, with a socket as stdin).

It reads in torch and transformers once, which takes seconds and several hundred MiB, and forks a worker for each
request. The worker is a process of its own all the same: its memory, its limits and its death are its own, and this one
computes nothing, so that it never grows. It ends when its agent does, and when nothing was asked of it for
KEEP_SECONDS.

A message of the agent is one datagram: a JSON object {"environment": {name: value}} with four file descriptors, which
are the worker's stdin, stdout and stderr and a pipe for its outcome: a line with its process id, then one with its exit
status (negative: the signal that ended it). See peel_plugins/engines/forked.py for the other end.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peel_agent.worker import STALL_SECONDS, be_ended_first, give_way, main, quiet_libraries

KEEP_SECONDS = 60.0
"""An agent that waits longer than this for its next checkpoint gets the memory back."""

LARGEST_MESSAGE = 1 << 20
DESCRIPTORS = 4


@dataclass(frozen=True)
class Forked:
    """A worker that was forked. The pipe `alive` closes when it ends; its exit status is written to `outcome`."""

    pid: int
    alive: int
    outcome: int


class WorkerServer:
    """Forks workers for what comes on `channel`, until it is closed or nothing comes for KEEP_SECONDS."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._workers: dict[int, Forked] = {}
        """By `alive`."""

    def serve(self) -> None:
        while True:
            events = self._selector.select(None if self._workers else KEEP_SECONDS)
            if not events:
                return
            for key, _ in events:
                if key.fd != self._channel.fileno():
                    self._ended(self._workers.pop(key.fd))
                elif not self._accept():
                    self._kill_all()
                    return

    def _accept(self) -> bool:
        """Forks a worker for the next message; False when the agent has gone."""
        message, descriptors, _, _ = socket.recv_fds(self._channel, LARGEST_MESSAGE, DESCRIPTORS)
        if not message:
            return False
        environment = json.loads(message)["environment"]
        *standard, outcome = descriptors
        alive, held = os.pipe()
        pid = os.fork()
        if pid == 0:
            for descriptor in (alive, outcome):
                os.close(descriptor)
            self._become_worker(standard, environment)
        for descriptor in (*standard, held):
            os.close(descriptor)
        self._workers[alive] = Forked(pid, alive, outcome)
        self._selector.register(alive, selectors.EVENT_READ)
        _write_line(outcome, pid)
        return True

    def _become_worker(self, standard: list[int], environment: dict[str, str]) -> None:
        """Answers one request as a process that was started for it would; never returns."""
        status = 1
        try:
            os.setsid()
            self._channel.close()
            self._selector.close()
            for descriptor, original in zip(range(3), standard, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            for worker in self._workers.values():  # the pipes of other workers must close with the server, not with us
                os.close(worker.alive)
                os.close(worker.outcome)
            _adopt(environment)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the process's own, to its end
            status = main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _ended(self, worker: Forked) -> None:
        self._selector.unregister(worker.alive)
        os.close(worker.alive)
        _, status = os.waitpid(worker.pid, 0)
        _write_line(worker.outcome, os.waitstatus_to_exitcode(status))
        os.close(worker.outcome)

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            os.kill(worker.pid, signal.SIGKILL)


def _adopt(environment: dict[str, str]) -> None:
    """Makes this the environment, as of a process that was started with it."""
    os.environ.clear()
    os.environ.update(environment)


def _write_line(outcome: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(outcome, f"{number}\n".encode())


def read_in() -> None:
    """What every worker needs, whatever it peels."""
    from transformers import AutoModelForCausalLM  # noqa: F401

    import peel_agent.capture
    import peel_agent.load
    import peel_agent.peel
    import peel_agent.pipeline  # noqa: F401


def run(niceness: int) -> int:
    """Serves the socket that is stdin."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    be_ended_first()
    give_way(niceness)
    channel = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.alarm(STALL_SECONDS)
    with quiet_libraries():
        read_in()
    signal.alarm(0)
    gc.freeze()  # pages that no collection writes to stay shared with the workers
    WorkerServer(channel).serve()
    return 0


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
