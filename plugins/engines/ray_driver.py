"""The child process that is connected to the cluster: `python -m ...ray_driver OPTIONS`, with OPTIONS in JSON.

Ray's client takes 126 MB and two dozen threads, changes the handling of signals, and ends the process when a cluster
is away for too long: all of that is here and not in the agent. Messages are lines of JSON. It reads
{"id", "request", "paths"} and {"cancel": id} from stdin, and ends with it; the cluster then ends what still runs. It
writes {"connected": true} or {"away": why}, then one answer for each id: that of the task, or {"cancelled"},
{"lost": why} or {"unfit": what no node has}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import IO, Any, NoReturn

LOOK_SECONDS = 15.0
"""How often a task that does not end is asked after: whether there is still a node that could run it."""


CONNECT_SECONDS = 60.0
"""A cluster that has not answered by then is away: Ray itself would try for several minutes."""


class Driver:
    """Tasks of one connection; each is followed by a thread, and there are never more than the engine's capacity."""

    def __init__(self, options: Mapping[str, Any], answers: IO[str]) -> None:
        self._options = options
        self._answers = answers
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        """By id: the reference of the task that runs for it."""
        self._cancelled: set[str] = set()

    def connect(self) -> None:
        import ray

        ray.init(
            address=self._options["address"],
            namespace="peel-agent",
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
        )

    def take(self, message: Mapping[str, Any]) -> None:
        """Begins what a message asks for."""
        if "cancel" in message:
            self._cancel(message["cancel"])
        else:
            threading.Thread(target=self._follow, args=(message,), daemon=True).start()

    def say(self, message: Mapping[str, Any]) -> None:
        with self._lock, suppress(BrokenPipeError):  # the agent has gone, and so does this process
            self._answers.write(json.dumps(message, allow_nan=False) + "\n")
            self._answers.flush()

    def _cancel(self, identity: str) -> None:
        import ray

        with self._lock:
            self._cancelled.add(identity)
            task = self._tasks.get(identity)
        if task is not None:
            ray.cancel(task, force=True)

    def _follow(self, message: Mapping[str, Any]) -> None:
        identity = message["id"]
        try:
            answer = self._answer(message)
        except Exception as error:  # whatever it is, the agent is told
            answer = {"lost": f"{type(error).__name__}: {_first_lines(error)}"}
        with self._lock:
            self._tasks.pop(identity, None)
            if identity in self._cancelled and "peeled" not in answer:
                answer = {"cancelled": True}
            self._cancelled.discard(identity)
        self.say({"id": identity, **answer})

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Of a node that is lost, the task is given to another one, `retries` times: the checkpoint is not to blame."""
        from ray import exceptions

        lost = (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
            exceptions.LocalRayletDiedError,
        )
        tries = self._options["retries"] + 1
        for turn in range(1, tries + 1):
            try:
                return self._result(message)
            except lost as error:
                why = _first_lines(error)
                if message["id"] in self._cancelled or turn == tries:
                    break
                words = f"a task is lost with its node or its worker of Ray, and is started again: {why}"
                sys.stderr.write(f"peel-agent on Ray: {words} ({turn} of {tries - 1})\n")
        return {"lost": f"lost {tries} times with its node or its worker of Ray; at last: {why}"}

    def _result(self, message: Mapping[str, Any]) -> dict[str, Any]:
        import ray

        task = self._start(message)
        while not ray.wait([task], timeout=LOOK_SECONDS)[0]:
            lacking = self._lacking()
            if lacking:
                ray.cancel(task, force=True)
                return {"unfit": lacking}
        answer: dict[str, Any] = ray.get(task)
        return answer

    def _start(self, message: Mapping[str, Any]) -> Any:
        import ray

        from peel_agent.records import restored

        from .ray_task import Share, peel

        options = self._options
        task = ray.remote(peel).options(**restored(Share, options["share"]).options)
        reference = task.remote(message["request"], options["share"], message["paths"], options["version"])
        with self._lock:
            self._tasks[message["id"]] = reference
            is_cancelled = message["id"] in self._cancelled
        if is_cancelled:  # meanwhile
            ray.cancel(reference, force=True)
        return reference

    def _lacking(self) -> str:
        """What no node that is up has, in words; empty when one has all of it."""
        import ray

        options = self._options
        wanted = {
            "CPU": options["num_cpus"],
            "GPU": options["num_gpus"],
            "memory": options["memory_bytes"] or 0,
            **({options["resource"]: 1} if options["resource"] else {}),
        }
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= number for name, number in wanted.items()) for node in nodes):
            return ""
        return ", ".join(f"{name} {number:g}" for name, number in wanted.items() if number)


def _first_lines(error: Exception) -> str:
    """What an error of Ray's says before it lists possible causes; of a server's traceback the end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    is_traceback = any(line.startswith("Traceback") or "Traceback (most" in line for line in lines)
    return " ".join([lines[0], lines[-1]] if is_traceback else lines[:2])


@contextmanager
def _answers_alone_on_stdout() -> Iterator[IO[str]]:
    """What Ray prints there, pages of a raylet's log when a node dies, is dropped."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers, open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        yield answers


def main(options: Mapping[str, Any]) -> None:
    """Serves until stdin ends; never returns, since Ray's threads and those that follow tasks would be waited for."""
    with _answers_alone_on_stdout() as answers:
        driver = Driver(options, answers)
        connected = threading.Event()
        threading.Thread(target=_read, args=(driver, connected), daemon=True).start()
        threading.Timer(CONNECT_SECONDS, _give_up, args=(driver, connected)).start()
        try:
            driver.connect()
        except Exception as error:  # of many kinds: no address, no answer, another version of Ray or Python
            _leave(driver, f"{type(error).__name__}: {_first_lines(error)}")
        driver.say({"connected": True})
        connected.set()
        threading.Event().wait()


def _read(driver: Driver, connected: threading.Event) -> None:
    """Reads what the agent says from the start: an agent that goes while the cluster is tried leaves nobody behind."""
    messages: SimpleQueue[str | None] = SimpleQueue()
    threading.Thread(target=_serve, args=(driver, connected, messages), daemon=True).start()
    for line in sys.stdin:
        messages.put(line)
    if not connected.is_set():
        os._exit(0)
    messages.put(None)


def _serve(driver: Driver, connected: threading.Event, messages: SimpleQueue[str | None]) -> None:
    import ray

    connected.wait()
    while (line := messages.get()) is not None:
        driver.take(json.loads(line))
    with suppress(Exception):
        ray.shutdown()  # the cluster ends the tasks of a driver that has gone
    os._exit(0)


def _give_up(driver: Driver, connected: threading.Event) -> None:
    if not connected.is_set():
        _leave(driver, f"it did not answer within {CONNECT_SECONDS:.0f} s")


def _leave(driver: Driver, why: str) -> NoReturn:
    driver.say({"away": why})
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
