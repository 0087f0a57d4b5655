"""Pieces of a checkpoint on their way between a worker and the engine that has other processes for them.

A connection is a socket in a folder that only this user can enter. Of a worker it gets a line of JSON, {"id"} with the
piece behind it or {"drop": id}; the worker gets {"id", ...} with `begun`, with `waiting` (whoever had begun it is lost,
and another will), with the `losses`, or with `lost`: why nobody will. Numbers are text in base 16: they lose no bit.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING

from peel_agent.records import HandedOut, Piece, packed, unpacked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


LOST = "the connection to the helpers was lost"


def received(place: Path) -> Piece:
    """The piece that is given away at a socket."""
    with Client(str(place), family="AF_UNIX") as connection:
        return unpacked(connection.recv_bytes())


class _Out:
    """See records.HandedOut; who hands it out has the lock."""

    def __init__(self, number: int, piece: Piece, elsewhere: Elsewhere) -> None:
        self.piece = piece
        self.number = number
        self.is_begun = False
        self.answer: NDArray[np.float64] | None = None
        self._elsewhere = elsewhere

    def losses(self) -> NDArray[np.float64] | None:
        return self.answer

    def withdraw(self) -> bool:
        return self._elsewhere.withdraw(self)


class Elsewhere:
    """Helpers (records.Helpers) at the other end of a connection, `most` pieces of work with them at a time.

    Once they have lost a piece for good, or the connection, everything is computed here. `alive` is called now and then
    while pieces are waited for.
    """

    def __init__(self, place: Path, most: int, alive: Callable[[], object] = lambda: None) -> None:
        self._connection: Connection[bytes, bytes] = Client(str(place), family="AF_UNIX")
        self._most = most
        self._alive = alive
        self._changed = threading.Condition()
        self._news = False
        self._out: dict[int, _Out] = {}
        self._made = 0
        self._closed = False
        threading.Thread(target=self._listen, name="helpers", daemon=True).start()

    def hand_out(self, make: Callable[[], Piece]) -> HandedOut | None:
        with self._changed:
            if self._closed or len(self._out) >= self._most:
                return None
            self._made += 1
            out = self._out[self._made] = _Out(self._made, make(), self)
        if not self._say({"id": out.number}, packed(out.piece)):
            self._stop(LOST)
        return out

    def wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._news, seconds)
            self._news = False
        self._alive()

    def withdraw(self, out: _Out) -> bool:
        with self._changed:
            if out.is_begun or out.answer is not None:
                return False
            self._out.pop(out.number, None)
        self._say({"drop": out.number})
        return True

    def close(self) -> None:
        """Nothing is computed for this process any more."""
        with self._changed:
            self._closed = True
        self._hang_up()

    def _hang_up(self) -> None:
        """Wakes the thread that listens, and the other end, too."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def _say(self, message: dict[str, int], *data: bytes) -> bool:
        try:
            for part in (json.dumps(message).encode(), *data):
                self._connection.send_bytes(part)
        except OSError:
            return False
        return True

    def _listen(self) -> None:
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                if "lost" in message:
                    self._stop(message["lost"])
                else:
                    self._learn(message["id"], message.get("losses"), is_begun="begun" in message)
        except (OSError, EOFError):
            self._stop(LOST)

    def _learn(self, number: int, losses: Sequence[str] | None, *, is_begun: bool) -> None:
        import numpy as np

        with self._changed:
            out = self._out.get(number)
            if out is None:  # it was taken back meanwhile
                return
            out.is_begun = is_begun
            if losses is not None:
                out.answer = np.array([float.fromhex(loss) for loss in losses])
                del self._out[number]
            self._news = True
            self._changed.notify_all()

    def _stop(self, why: str) -> None:
        """Nobody answers any more: what is out is taken back."""
        with self._changed:
            if self._closed:
                return
            self._closed = self._news = True
            for out in self._out.values():
                out.is_begun = False
            self._out = {}
            self._changed.notify_all()
        self._hang_up()
        sys.stderr.write(f"peel-agent: pieces of this checkpoint are computed here from now on: {why}\n")
