"""The health endpoint: two threads, however many clients there are and whatever they send.

One thread holds all connections. A client has a time to send its request and a time to take the answer, so one that is
slow costs a socket and no thread; with too many of them, the one that came first goes. The other thread reads the
figures, for one request after the other. `/healthz` needs the first thread alone: neither a locked ledger nor
a crowd of idle clients makes the agent look dead.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

from peel_agent.health.listen import Place, listening, place_of, place_of_socket
from peel_agent.health.pages import Answer, Pages, Request, refusal, request_of
from peel_agent.records.figures import AgentFigures

CONNECTIONS = 128
HEAD_BYTES = 16 * 1024
"""The longest request line and headers that are read."""

PAUSE = 1.0
"""Seconds without accepting when the process has no file descriptor left."""


class HealthServer:
    """Serves `/healthz`, `/readyz` and `/metrics` at `listen` ("HOST:PORT", ":PORT", "[IPV6]:PORT"; "" serves nothing).

    `alive` must answer at once. `figures` is always called from the same thread, one call at a time, and may raise.
    `patience` is how many seconds each of these may take: a request to arrive, the figures, an answer to be taken.
    ConfigurationError when `listen` is malformed.
    """

    def __init__(
        self, listen: str, figures: Callable[[], AgentFigures], alive: Callable[[], bool], *, patience: float = 5.0
    ) -> None:
        self._place = place_of(listen)
        self._pages = Pages(figures, alive)
        self._patience = patience
        self._bound: Place | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()

    @property
    def address(self) -> str | None:
        """Where it listens, as "HOST:PORT"; None while it does not."""
        return None if self._bound is None else str(self._bound)

    def start(self) -> None:
        """Listens from now on. ConfigurationError when the port is in use or the address is not this machine's."""
        if self._place is None or self._thread is not None:
            return
        listener = listening(self._place)
        self._bound = place_of_socket(listener)
        self._stopping = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop, listener), name="peel-health", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Closes every connection and gives the port back. Does not wait for figures that are being read."""
        if self._thread is None or self._loop is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = self._loop = self._bound = None

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        figures_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="peel-health-figures")
        connections = _Connections(self._pages, figures_reader, self._patience)
        try:
            loop.run_until_complete(connections.serve(listener, self._stopping))
        finally:
            figures_reader.shutdown(wait=False, cancel_futures=True)
            loop.close()


class _Connections:
    def __init__(self, pages: Pages, figures_reader: ThreadPoolExecutor, patience: float) -> None:
        self._pages = pages
        self._figures_reader = figures_reader
        self._patience = patience
        self._open = dict[asyncio.Task[None], None]()  # the oldest first
        self._pause: asyncio.TimerHandle | None = None

    async def serve(self, listener: socket.socket, stopping: asyncio.Event) -> None:
        """Serves until `stopping` is set; then closes the listener and every connection."""
        listener.setblocking(False)
        self._accept_from(listener)
        await stopping.wait()
        if self._pause is not None:
            self._pause.cancel()
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.sleep(0)  # the loop closes the sockets of aborted connections at its next turn

    def _accept_from(self, listener: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Takes one connection a turn of the loop, so that those there are get theirs."""
        try:
            client, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # it is gone already
            return
        except OSError:  # no file descriptor or no memory is left: the listener stays readable, so look again later
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            self._pause = loop.call_later(PAUSE, self._accept_from, listener)
            return
        task = asyncio.get_running_loop().create_task(self._converse(client))
        self._open[task] = None
        task.add_done_callback(lambda ended: self._open.pop(ended, None))
        task.add_done_callback(lambda _: client.close())  # also when it was cancelled before its first step
        if len(self._open) > CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()

    async def _converse(self, client: socket.socket) -> None:
        """One request and its answer; ends quietly when the client is too slow, goes away, or is sent away."""
        try:
            reader, writer = await asyncio.open_connection(sock=client, limit=HEAD_BYTES)
        except (OSError, asyncio.CancelledError):
            return
        try:
            async with asyncio.timeout(self._patience):
                request = await _request(reader)
            if request is not None:
                answer = await self._answer(request)
                async with asyncio.timeout(self._patience):
                    await _send(answer, reader, writer)
        except (TimeoutError, OSError, asyncio.CancelledError):
            return
        finally:
            writer.transport.abort()

    async def _answer(self, request: Request | Answer) -> bytes:
        if isinstance(request, Answer):
            return request.encoded("GET")
        answer = self._pages.at_once(request) or await self._answer_from_figures(request)
        return answer.encoded(request.method)

    async def _answer_from_figures(self, request: Request) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._patience):
                return await loop.run_in_executor(self._figures_reader, self._pages.from_figures, request)
        except TimeoutError as error:
            return self._pages.without_figures(request, error)


async def _request(reader: asyncio.StreamReader) -> Request | Answer | None:
    """The request, or the answer that refuses it; None when the client went away before its end."""
    try:
        return request_of(await reader.readuntil(b"\r\n\r\n"))
    except asyncio.LimitOverrunError:
        return refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    except asyncio.IncompleteReadError:
        return None


async def _send(answer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends the answer, then reads on until the client closes: an early close could make it lose the answer."""
    writer.transport.set_write_buffer_limits(high=0)  # drain() returns when all has left
    writer.write(answer)
    await writer.drain()
    writer.write_eof()
    while await reader.read(HEAD_BYTES):
        pass
