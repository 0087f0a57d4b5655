"""The engine of a Ray cluster: whole checkpoints as tasks, each on a node that has what was asked for.

A task is the local engine on that node: the same process, limits and numbers. The agent itself imports no ray: a child
of it is connected to the cluster (see ray_driver).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from peel_agent.errors import (
    ConfigurationError,
    DeviceUnavailable,
    GaveWay,
    PeelError,
    TornCheckpoint,
    WorkerError,
)
from peel_agent.records import CheckpointRef, DeviceLease, Peeled, Request, plain, restored
from peel_agent.spi import Engine, EnginePlugin, setting

from .local import error_of
from .ray_task import DISTRIBUTION, Share

NEEDS = ("ray", 'pip install "peel-agent[ray]"')

RETRY_SECONDS = 30.0
"""The pause before a cluster that was away is asked for again."""

START = "start it (ray start), or name another one: [engine.ray] address, or RAY_ADDRESS"

LEAST = {"num_cpus": 1, "at_once": 1, "retries": 0, "spread": 0, "num_gpus": 0, "memory_bytes": 1}
"""What each number in the settings must be at least."""


@dataclass(frozen=True)
class RaySettings:
    """`[engine.ray]`: a cluster, and what each checkpoint asks of it.

    `address` is HOST:PORT, a `ray://` one, or `auto` for the cluster of this machine. A checkpoint takes `num_cpus`
    processors, as many threads, `num_gpus` of a GPU (0: it is peeled on the CPU), `memory_bytes`, and one of the custom
    `resource`. At most `at_once` are peeled at a time. One whose node is lost is started again `retries` times. So many
    pieces of each as `spread` may be with other nodes at a time, each of which takes as much as a checkpoint does.
    """

    address: str = setting("auto", environment="RAY_ADDRESS")
    num_cpus: int = setting(1)
    num_gpus: float = setting(0.0)
    memory_bytes: int | None = setting(None)
    resource: str | None = setting(None)
    at_once: int = setting(2)
    retries: int = setting(3)
    spread: int = setting(0)


@dataclass
class _Task:
    """A request that the cluster has, and why it is to be given up, if it is."""

    request: Request
    answer: Future[Peeled]
    gave_way: str | None = None


def command(options: Mapping[str, Any]) -> list[str]:
    """How the child is started that is connected to the cluster."""
    return [sys.executable, "-P", "-m", f"{__package__}.ray_driver", json.dumps(options)]


class _Driver:
    """The child that is connected to the cluster. What it is told is written by a thread: nobody waits for it."""

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter
            command(options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
            cwd="/",  # Ray's workers import from a driver's working directory, and ours may be a checkpoint's
            start_new_session=True,  # Ctrl-C is the agent's
        )
        self._messages: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        threading.Thread(target=self._write, name="ray messages", daemon=True).start()

    def tell(self, message: Mapping[str, Any]) -> None:
        self._messages.put(message)

    def end(self) -> None:
        """It ends once it has read all that it was told."""
        self._messages.put(None)

    def _write(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError), self.process.stdin as stdin:  # one that has ended is seen by who listens to it
            while (message := self._messages.get()) is not None:
                stdin.write(json.dumps(message) + "\n")
                stdin.flush()


class RayEngine:
    """Requests on a cluster by a child that is connected to it; its devices are `at_once` places there."""

    def __init__(self, environment: Callable[[str], Mapping[str, str]], settings: RaySettings) -> None:
        self._environment = environment
        self._settings = settings
        self._free = [f"ray/{place}" for place in range(settings.at_once, 0, -1)]
        self._driver: _Driver | None = None
        self._tasks: dict[str, _Task] = {}
        """By their number."""
        self._numbers = itertools.count()
        self._away: str | None = None
        """Why the cluster cannot be used, since it was tried in vain."""
        self._not_before = 0.0
        self._lock = threading.RLock()
        self._closed = False

    def acquire(self) -> DeviceLease | None:
        """A place on the cluster; DeviceUnavailable while that is away, which is tried every RETRY_SECONDS."""
        with self._lock:
            if self._away is not None:
                if self._driver is None and not self._closed and time.monotonic() >= self._not_before:
                    self._connect()
                raise DeviceUnavailable(self._away, remedy=START)
            if not self._free:
                return None
            name = "cuda:0" if self._settings.num_gpus else "cpu"
            return DeviceLease(name, "", "the Ray cluster", self._reason(), elsewhere=self._free.pop())

    def release(self, lease: DeviceLease) -> None:
        with self._lock:
            if lease.elsewhere not in self._free:
                self._free.append(lease.elsewhere)

    def submit(self, request: Request) -> Future[Peeled]:
        request = _with_absolute_paths(request)
        message = {"request": json.dumps(plain(request)), "paths": _needed(request)}
        task = _Task(request, Future())
        with self._lock:
            if not self._closed:
                number = str(next(self._numbers))
                self._tasks[number] = task
                driver = self._driver or self._connect()
                driver.tell({"id": number, **message})
                return task.answer
        task.gave_way = "the agent ends"
        _conclude(task, {})
        return task.answer

    def give_way(self, fingerprint: str, why: str) -> None:
        with self._lock:
            for number, task in self._tasks.items():
                if task.request.ref.fingerprint == fingerprint:
                    task.gave_way = why
                    if self._driver is not None:
                        self._driver.tell({"cancel": number})

    def memory_bytes(self) -> int | None:
        """None: what runs is on other machines, and Ray says how much it takes."""
        return None

    def close(self, seconds: float) -> None:
        """The cluster ends the tasks of a driver that has gone."""
        with self._lock:
            self._closed = True
            driver = self._driver
            for task in self._tasks.values():
                task.gave_way = task.gave_way or "the agent ends"
        if driver is None:
            return
        driver.end()
        try:
            driver.process.wait(seconds)
        except subprocess.TimeoutExpired:
            driver.process.kill()
            driver.process.wait()

    def _reason(self) -> str:
        settings = self._settings
        asked = [f"{settings.num_cpus:g} CPU", *([f"{settings.num_gpus:g} GPU"] if settings.num_gpus else [])]
        asked += [f"1 {settings.resource}"] if settings.resource else []
        return f"[engine.ray] asks for {', '.join(asked)} for each checkpoint, {settings.at_once} at once"

    def _connect(self) -> _Driver:
        settings = self._settings
        share = Share(
            threads=settings.num_cpus,
            gpus=settings.num_gpus,
            memory_bytes=settings.memory_bytes,
            resource=settings.resource,
            pieces=settings.spread,
            retries=settings.retries,
        )
        options = {**asdict(settings), "share": asdict(share), "version": version(DISTRIBUTION)}
        self._driver = driver = _Driver(options, self._environment(""))
        threading.Thread(target=self._listen, args=(driver.process,), name="ray answers", daemon=True).start()
        return driver

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        why = "the connection was lost"
        with process.stdout as lines:
            for line in lines:
                message = json.loads(line)
                if "away" in message:
                    why = message["away"]
                elif "connected" in message:
                    self._away = None
                else:
                    with self._lock:
                        task = self._tasks.pop(message["id"])
                    # In a thread: whether a path is there is asked, and its mount may be dead.
                    threading.Thread(target=_conclude, args=(task, message), name="ray answer", daemon=True).start()
        process.wait()
        with self._lock:
            if self._driver is not None:
                self._driver.end()  # its thread
            self._driver = None
            self._away = f"the Ray cluster at {self._settings.address} cannot be used: {why}"
            self._not_before = time.monotonic() + RETRY_SECONDS
            given_up, self._tasks = list(self._tasks.values()), {}
        for task in given_up:  # no fault of theirs
            task.gave_way = task.gave_way or self._away
            _conclude(task, {})


def _conclude(task: _Task, message: Mapping[str, Any]) -> None:
    """Called without a lock: who waits for the answer has locks of its own."""
    try:
        task.answer.set_result(_peeled(task, message))
    except PeelError as error:
        task.answer.set_exception(error)
    except Exception as error:  # whatever it is, the agent is told, and goes on with the next checkpoint
        task.answer.set_exception(WorkerError(f"{type(error).__name__}: {error}", remedy="please report it"))


def _peeled(task: _Task, message: Mapping[str, Any]) -> Peeled:
    if "peeled" in message:
        return restored(Peeled, message["peeled"])
    if task.gave_way is not None:
        raise GaveWay(task.gave_way, remedy="it is peeled again later")
    if "unfit" in message:
        raise GaveWay(
            f"no node of the Ray cluster has {message['unfit']}, as [engine.ray] asks: add one, or ask for less",
            remedy="it is peeled again later",
        )
    if "absent" in message:
        raise _absent(message["absent"], message["node"])
    if "error" in message:
        raise _error(message["error"], message["node"])
    raise WorkerError(
        f"the task that peeled it failed on the Ray cluster: {message['lost']}",
        remedy="look at the nodes (ray status, and Ray's logs there); each needs Ray, Python and peel-agent in the "
        "versions that the agent has",
    )


def _absent(paths: list[str], node: str) -> PeelError:
    """What a node could not see: gone meanwhile, or on no file system that it shares with the agent."""
    unseen = [path for path in paths if Path(path).exists()]
    if not unseen:
        return TornCheckpoint(f"{paths[0]} is gone", remedy="it was removed before a node could read it")
    return WorkerError(
        f"the node {node} cannot see {', '.join(unseen)}",
        remedy="mount it there under the same path: checkpoints, probe and the agent's state folder must be on a file "
        "system that every node shares, or keep peels off that node with [engine.ray] resource",
    )


def _error(told: Mapping[str, str], node: str) -> PeelError:
    """What the node's own engine raised; a failed worker is one of that node."""
    error = error_of(told)
    if type(error) is not WorkerError:
        return error
    return WorkerError(
        f"{error.what} (on the node {node})",
        remedy=error.remedy.replace("its output stands above", "its output is in the logs of Ray on that node"),
    )


def _needed(request: Request) -> list[str]:
    """The files and folders that are here, and that the node must see too."""
    probe = request.probe
    paths = (request.ref.in_place().path, probe.path, probe.tokenizer, request.patch)
    return [str(path) for path in paths if path is not None and path.exists()]


def _with_absolute_paths(request: Request) -> Request:
    """A task's working directory is another one."""
    probe, before = request.probe, request.before
    if before is not None and before.ref is not None:
        before = replace(before, ref=_absolute_ref(before.ref))
    return replace(
        request,
        ref=_absolute_ref(request.ref),
        probe=replace(probe, path=_absolute(probe.path), tokenizer=_absolute(probe.tokenizer)),
        before=before,
        patch=_absolute(request.patch),
    )


def _absolute_ref(ref: CheckpointRef) -> CheckpointRef:
    return replace(ref, path=ref.path.absolute(), held=_absolute(ref.held))


def _absolute(path: Path | None) -> Path | None:
    return path.absolute() if path is not None and path.exists() else path


class RayPlugin:
    name = "ray"
    settings = RaySettings
    needs = NEEDS

    def open(self, environment: Callable[[str], Mapping[str, str]], settings: RaySettings) -> Engine:
        if importlib.util.find_spec(NEEDS[0]) is None:
            raise ConfigurationError("[engine] use is `ray`, and the package ray is not installed", remedy=NEEDS[1])
        for key, least in LEAST.items():
            number = getattr(settings, key)
            if number is not None and number < least:
                raise ConfigurationError(f"`engine.ray.{key}` is {number}", remedy=f"it must be at least {least}")
        if settings.num_gpus > 1:
            raise ConfigurationError(
                f"`engine.ray.num_gpus` is {settings.num_gpus:g}", remedy="a checkpoint is peeled on one GPU: 0 to 1"
            )
        return RayEngine(environment, settings)


PLUGIN: EnginePlugin = RayPlugin()
