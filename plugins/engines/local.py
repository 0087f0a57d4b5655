"""The engine of one machine: a process for each request, which gives back all memory when it ends.

On the CPU it is forked from one that has read in torch and transformers. With a GPU it is started by itself: what has
touched a GPU's driver cannot be forked.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import psutil

from peel_agent import errors
from peel_agent.errors import GaveWay, PeelError, WorkerError
from peel_agent.records import Peeled, Request, plain, restored
from peel_agent.spi import Engine, EnginePlugin

from .forked import ForkedWorker, WorkerServers

KILL_SECONDS = 2.0
"""A child in the middle of a system call on a dead mount cannot be killed: it is waited for no longer than this."""

STALLED = -signal.SIGALRM


def command() -> list[str]:
    """How a worker is started. -P: the working directory may be a checkpoint's, with a torch.py in it."""
    return [sys.executable, "-P", "-m", "peel_agent.worker"]


Child = subprocess.Popen[str] | ForkedWorker


class LocalEngine:
    """Children of this process, each with the environment that `environment` gives for its lease."""

    def __init__(self, environment: Callable[[str], Mapping[str, str]]) -> None:
        self._environment = environment
        self._servers = WorkerServers()
        self._children: dict[str, Child | None] = {}
        """By the checkpoint's fingerprint; None for one that is about to be started."""
        self._gave_way: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, request: Request) -> Future[Peeled]:
        answer: Future[Peeled] = Future()
        with self._lock:
            self._children[request.ref.fingerprint] = None
        threading.Thread(target=self._work, args=(request, answer), name="worker", daemon=True).start()
        return answer

    def give_way(self, fingerprint: str, why: str) -> None:
        with self._lock:
            if fingerprint in self._children:
                self._gave_way[fingerprint] = why
            child = self._children.get(fingerprint)
            if child is not None:
                child.kill()

    def memory_bytes(self) -> int | None:
        with self._lock:
            children = [child for child in self._children.values() if child is not None]
        sizes = []
        for child in children:
            try:
                sizes.append(psutil.Process(child.pid).memory_info().rss)
            except psutil.Error:
                continue
        return sum(sizes) if sizes else None

    def close(self, seconds: float) -> None:
        with self._lock:
            self._closed = True
            children = [child for child in self._children.values() if child is not None]
        for child in children:
            child.kill()
        self._servers.close()
        deadline = time.monotonic() + seconds
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue

    def _work(self, request: Request, answer: Future[Peeled]) -> None:
        try:
            answer.set_result(restored(Peeled, self.answer(request)["peeled"]))
        except PeelError as error:
            answer.set_exception(error)
        except Exception as error:  # whatever it is, the agent is told, and goes on with the next checkpoint
            answer.set_exception(WorkerError(f"{type(error).__name__}: {error}", remedy="please report it"))

    def answer(self, request: Request) -> Mapping[str, Any]:
        """What the worker of a request wrote, which is waited for. Raises what `submit` answers."""
        fingerprint = request.ref.fingerprint
        child = self._start(request)
        with self._lock:
            self._children[fingerprint] = child
            if self._closed or fingerprint in self._gave_way:
                child.kill()
        try:
            written, _ = child.communicate(json.dumps(plain(request)))
        finally:
            child.kill()
            with self._lock:
                gave_way = self._forget(fingerprint, child)
        status = _status(child)
        if status != 0 and gave_way is not None:
            raise GaveWay(gave_way, remedy="nothing to do: it is peeled again later")
        return _told(written, status)

    def _start(self, request: Request) -> Child:
        environment = self._environment(request.lease.visible)
        if not request.lease.visible:
            forked = self._servers.start(environment, request.nice)
            if forked is not None:
                return forked
        return subprocess.Popen(  # noqa: S603 - our own interpreter
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # the kernel shares processors out by session: see worker.give_way
        )

    def _forget(self, fingerprint: str, child: Child) -> str | None:
        """Why this child was ended by us, if it was; the checkpoint may be another child's by now."""
        closed = "the agent ends" if self._closed else None
        if self._children.get(fingerprint) is not child:
            return closed
        del self._children[fingerprint]
        return self._gave_way.pop(fingerprint, closed)


def _status(child: Child) -> int:
    try:
        return child.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise WorkerError(
            f"the worker (process {child.pid}) cannot be ended: it hangs in the system",
            remedy="look at the file system of the checkpoints: a mount that is dead keeps it",
        ) from error


def _told(written: str, status: int) -> Mapping[str, Any]:
    """The answer in what a child wrote that ended with this status."""
    if status != 0:
        cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if status == STALLED:
            cause = "no progress for too long"
        raise WorkerError(
            f"the worker that peeled it ended with {cause}",
            remedy="its output stands above; SIGKILL usually means that memory ran out",
        )
    answer: dict[str, Any] = json.loads(written.splitlines()[-1])
    if "error" in answer:
        raise error_of(answer["error"])
    return answer


def error_of(told: Mapping[str, str]) -> PeelError:
    """The error that an answer in JSON tells of, by its `kind`, `what` and `remedy`."""
    kind: type[PeelError] = getattr(errors, told["kind"], errors.CheckpointError)  # a plug-in may have its own
    return kind(told["what"], remedy=told["remedy"])


@dataclass(frozen=True)
class LocalSettings:
    """`[engine.local]`: there is nothing to set; its devices are those of `[device]`."""


class LocalPlugin:
    name = "local"
    settings = LocalSettings

    def open(self, environment: Callable[[str], Mapping[str, str]], settings: LocalSettings) -> Engine:  # noqa: ARG002
        return LocalEngine(environment)


PLUGIN: EnginePlugin = LocalPlugin()
