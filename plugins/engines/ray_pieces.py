"""Between a worker that peels a checkpoint on a node and the cluster: its pieces become tasks, wherever there is room.

The worker is no process of Ray: it is connected to the task that it works for by a socket (see peel_agent.elsewhere for
what is said there). A piece in the object store is bytes: no process of Ray reads in torch.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peel_agent.errors import WorkerError


class Doorway:
    """A socket for one connection, in a folder that nobody else can enter. WorkerError where there can be none."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="peel-")
        self.place = Path(self._folder.name) / "pieces"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(str(self.place))
        except OSError as error:  # a path may have 107 bytes
            self._socket.close()
            self._folder.cleanup()
            raise WorkerError(
                f"there can be no socket at {self.place}: {error}",
                remedy="start Ray on that node with a shorter TMPDIR, or set spread = 0 in [engine.ray]",
            ) from error
        self._socket.listen(1)

    def connection(self) -> Connection[bytes, bytes]:
        """Waits for it. OSError when the doorway is closed first. The folder is needed no longer: a task that is killed
        leaves nothing behind.
        """
        accepted, _ = self._socket.accept()
        self._folder.cleanup()
        return Connection(accepted.detach())

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends the waiting too
        self._socket.close()
        self._folder.cleanup()


@contextmanager
def given(piece: bytes) -> Iterator[Path]:
    """A socket at which a worker gets the piece that it is to compute."""
    doorway = Doorway()

    def give() -> None:
        with suppress(OSError), doorway.connection() as connection:
            connection.send_bytes(piece)

    threading.Thread(target=give, name="a piece", daemon=True).start()
    try:
        yield doorway.place
    finally:
        doorway.close()


class Relay:
    """Makes tasks of the pieces that come from one worker.

    `start` starts one: a generator of Ray's, whose first item is the node that has begun it and whose second is the
    answer, with `losses` or with `lost`. A task that is lost with its node or its worker of Ray is started again
    `retries` times. `by_node` counts the answers.
    """

    def __init__(self, start: Callable[[Any], Any], retries: int) -> None:
        self._start = start
        self._retries = retries
        self.by_node: Counter[str] = Counter()
        self._doorway = Doorway()
        self.place = self._doorway.place
        self._connection: Connection[bytes, bytes] | None = None
        self._tasks: dict[int, Any] = {}
        """By the piece's number; None for one that is about to be started. One that nobody wants any more is gone."""
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, name="pieces", daemon=True).start()

    def close(self) -> None:
        """Nobody wants any of them any more."""
        self._doorway.close()
        with self._lock:
            numbers = list(self._tasks)
        for number in numbers:
            self._drop(number)

    def _serve(self) -> None:
        with suppress(OSError, EOFError), self._doorway.connection() as connection:
            self._connection = connection
            while True:
                message = json.loads(connection.recv_bytes())
                if "drop" in message:
                    self._drop(message["drop"])
                    continue
                with self._lock:
                    self._tasks[message["id"]] = None
                piece = connection.recv_bytes()
                threading.Thread(target=self._follow, args=(message["id"], piece), daemon=True).start()
        self.close()

    def _say(self, message: Mapping[str, Any]) -> None:
        with self._lock, suppress(OSError):  # the worker has gone
            assert self._connection is not None
            self._connection.send_bytes(json.dumps(message).encode())

    def _drop(self, number: int) -> None:
        import ray

        with self._lock:
            task = self._tasks.pop(number, None)
        if task is not None:
            ray.cancel(task, force=True)

    def _follow(self, number: int, piece: bytes) -> None:
        import ray
        from ray.exceptions import RayError

        kept = ray.put(piece)
        why = ""
        for _ in range(self._retries + 1):
            try:
                answer = self._answer(number, kept)
            except (RayError, StopIteration) as error:
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                self._say({"id": number, "waiting": True})
                continue
            if answer is None:
                return
            if "losses" in answer:
                self._say({"id": number, "losses": answer["losses"]})
                return
            why = answer["lost"]
            break
        with self._lock:
            is_wanted = self._tasks.pop(number, self) is not self
        if is_wanted:
            self._say({"id": number, "lost": why})

    def _answer(self, number: int, kept: Any) -> Mapping[str, Any] | None:
        """What a task answers; None when it is not wanted any more."""
        import ray

        task = self._start(kept)
        with self._lock:
            is_wanted = number in self._tasks
            if is_wanted:
                self._tasks[number] = task
        if not is_wanted:
            ray.cancel(task, force=True)
            return None
        node = ray.get(next(task))
        self._say({"id": number, "begun": node})
        answer: Mapping[str, Any] = ray.get(next(task))
        with self._lock:
            if "losses" in answer and self._tasks.pop(number, None) is not None:
                self.by_node[node] += 1
        return answer
