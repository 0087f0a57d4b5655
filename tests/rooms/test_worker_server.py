"""Workers that are forked from one process are as those that are started by themselves, and sooner."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from peel_agent.errors import CheckpointError, GaveWay, PeelError, WorkerError
from peel_agent.records import Peeled, plain
from peel_plugins.engines import forked
from peel_plugins.engines.forked import ForkedWorker, WorkerServers
from peel_plugins.engines.local import LocalEngine
from tests.rooms.test_publish_form import FULL
from tests.rooms.test_worker import REQUEST
from tests.waiting import wait_for

SERVER = (
    "import json, os, signal, sys, time; from peel_agent import worker_server as server; server.read_in = lambda: 0; "
)


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; who should reap it may have ended before it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def processes() -> list[psutil.Process]:
    """The servers and workers that run, the server first."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            running += [process] if any("worker_server" in word for word in process.cmdline()) else []
    return running


class Servers:
    """A local engine whose worker server forks workers that run these Python statements instead of a peel.

    They need little memory: a server is kept however little is free.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forked, "ROOM_BYTES", 0)
        self._monkeypatch = monkeypatch
        self.environment = dict(os.environ)
        self.engine = LocalEngine(lambda _: self.environment)
        self.started = 0
        self.does("raise SystemExit(7)")

    def does(self, worker: str, server: str = "") -> None:
        """For servers that are started from now on."""
        lines = "\n".join(f"    {line}" for line in worker.splitlines())
        program = f"{SERVER}{server}\ndef main():\n{lines}\nserver.main = main\nraise SystemExit(server.run(0))"

        def command(_: int) -> list[str]:
            self.started += 1
            return [sys.executable, "-P", "-c", program]

        self._monkeypatch.setattr(forked, "command", command)

    def error(self) -> PeelError:
        """What becomes of a request."""
        error = self.engine.submit(REQUEST).exception(240)
        assert isinstance(error, PeelError)
        return error


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    servers = Servers(monkeypatch)
    yield servers
    servers.engine.close(240)


ANSWERS = [
    ("os.kill(os.getpid(), signal.SIGALRM)", WorkerError, "no progress for too long"),
    ("os.kill(os.getpid(), signal.SIGKILL)", WorkerError, "signal SIGKILL"),
    ("raise SystemExit(7)", WorkerError, "exit status 7"),
    ("return 7", WorkerError, "exit status 7"),
    ("raise KeyError('x')", WorkerError, "exit status 1"),
    ("raise KeyboardInterrupt", WorkerError, "exit status 1"),
    ("return 0", WorkerError, "IndexError"),
    ("print('no answer'); return 0", WorkerError, "JSONDecodeError"),
    ("sys.stdin.close(); return 3", WorkerError, "exit status 3"),
    ("os.close(0); os._exit(4)", WorkerError, "exit status 4"),
    (
        """print('{"error": {"kind": "CheckpointError", "what": "NaN", "remedy": "r"}}'); return 0""",
        CheckpointError,
        "NaN",
    ),
]


@pytest.mark.parametrize(("worker", "kind", "words"), ANSWERS)
def test_what_became_of_a_forked_worker(servers: Servers, worker: str, kind: type[PeelError], words: str) -> None:
    """Its death is told in the words that a worker by itself has, and the server forks the next one."""
    servers.does(worker)
    for _ in range(2):
        error = servers.error()
        assert type(error) is kind
        assert words in error.what
    assert servers.started == 1


def test_a_forked_worker_is_a_process_of_its_own(servers: Servers, tmp_path: Path) -> None:
    """It has the request, the environment that it was given, a session of its own, and none of the other's files."""
    answer, seen = tmp_path / "answer", tmp_path / "seen"
    peeled = Peeled(FULL, None)
    answer.write_text(json.dumps({"peeled": plain(peeled)}))
    servers.does(
        "request = sys.stdin.read()\n"
        f"open({str(seen)!r}, 'w').write(json.dumps([json.loads(request), os.environ.get('A_NAME'), os.getsid(0) ==\n"
        "    os.getpid(), len(os.listdir('/proc/self/fd'))]))\n"
        f"print('a warning'); print(open({str(answer)!r}).read())\n"
        "return 0"
    )
    for value in ("one", "two", None):
        servers.environment = {**os.environ} | ({"A_NAME": value} if value else {})
        assert servers.engine.submit(REQUEST).result(240) == peeled
        request, name, leads_its_session, files = json.loads(seen.read_text())
        assert (request, name, leads_its_session) == (plain(REQUEST), value, True)
        assert files == 6  # stdin, stdout, stderr, what tells that it lives; this file and the listing


def test_a_large_request_and_a_large_answer_pass(servers: Servers) -> None:
    """Neither has to fit in a pipe."""
    servers.does("text = sys.stdin.read(); print(len(text)); print('x' * 500_000); return 0")
    asked = WorkerServers()
    worker = asked.start(dict(os.environ), 0)
    assert isinstance(worker, ForkedWorker)
    told, _ = worker.communicate("y" * 500_000)
    assert told.split() == ["500000", "x" * 500_000]
    assert worker.wait(240) == 0
    asked.close()


def test_many_forked_workers_at_once(servers: Servers) -> None:
    """Each has its own answer, and one that gives way is the one that was meant."""
    servers.does("import time\nsys.stdin.read()\ntime.sleep(600)")
    answers = {}
    for name in "abc":
        ref = dataclasses.replace(REQUEST.ref, fingerprint=name)
        answers[name] = servers.engine.submit(dataclasses.replace(REQUEST, ref=ref))
    wait_for(lambda: len(processes()) == 4)
    assert servers.started == 1
    servers.engine.give_way("b", "somebody is on the GPU")
    error = answers["b"].exception(240)
    assert isinstance(error, GaveWay)
    assert error.what == "somebody is on the GPU"
    assert not answers["a"].done()
    assert not answers["c"].done()
    assert (servers.engine.memory_bytes() or 0) > 0
    servers.engine.close(240)
    assert all(isinstance(answers[name].exception(240), GaveWay) for name in "ac")
    assert processes() == []


def test_a_server_that_dies(servers: Servers) -> None:
    """Its workers count as dead, end within moments, and the next request starts another server."""
    servers.does("sys.stdin.read()\nfrom peel_agent.worker import end_with_parent\nend_with_parent()\ntime.sleep(600)")
    answer = servers.engine.submit(REQUEST)
    wait_for(lambda: len(processes()) == 2)
    server, worker = processes()
    wait_for(lambda: worker.num_threads() == 2)  # it watches its parent
    server.kill()
    error = answer.exception(240)
    assert isinstance(error, WorkerError)
    assert "SIGKILL" in error.what
    wait_for(lambda: has_ended(worker))
    servers.does("return 7")
    assert "exit status 7" in servers.error().what
    assert servers.started == 2


@pytest.mark.parametrize("server", ["raise SystemExit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os.close(0)"])
def test_a_server_that_cannot_begin(servers: Servers, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """The worker is started by itself, and tells what is wrong."""
    monkeypatch.setattr("peel_plugins.engines.local.command", lambda: ["/bin/sh", "-c", "exit 9"])
    servers.does("return 7", server)
    assert "exit status 9" in servers.error().what


def test_memory_that_is_short_keeps_no_server(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below ROOM_BYTES each worker is started by itself."""
    monkeypatch.setattr("peel_plugins.engines.local.command", lambda: ["/bin/sh", "-c", "exit 9"])
    monkeypatch.setattr(forked, "ROOM_BYTES", psutil.virtual_memory().total + 1)
    assert "exit status 9" in servers.error().what
    assert servers.started == 0


def test_a_server_that_nobody_asks_ends(servers: Servers) -> None:
    """Its memory is given back, and the next request starts another."""
    servers.does("return 7", "server.KEEP_SECONDS = 0.2")
    assert "exit status 7" in servers.error().what
    wait_for(lambda: processes() == [])
    assert "exit status 7" in servers.error().what
    assert servers.started == 2


def test_an_engine_is_closed_while_its_server_begins(servers: Servers) -> None:
    """Closing waits for nothing, and no worker is started afterwards."""
    servers.does("return 7", "time.sleep(600)")
    answer = servers.engine.submit(REQUEST)
    wait_for(lambda: servers.started == 1)
    servers.engine.close(240)
    assert isinstance(answer.exception(240), GaveWay)
    assert processes() == []
    assert servers.started == 1


def test_a_worker_with_more_priority_is_started_by_itself(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was forked from a process with less priority could not have more."""
    asked = WorkerServers()
    worker = asked.start(dict(os.environ), 5)
    assert worker is not None
    assert worker.communicate("")[0] == ""
    assert asked.start(dict(os.environ), 4) is None
    asked.close()


def test_the_server_and_its_workers_end_with_the_agent() -> None:
    """When the agent is killed neither goes on."""
    program = (
        "import os, sys, time\n"
        "from peel_plugins.engines import forked\n"
        "forked.ROOM_BYTES = 0  # however little memory this machine has free\n"
        "servers = forked.WorkerServers()\n"
        "worker = servers.start(dict(os.environ), 0)\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    agent = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    worker = psutil.Process(int(agent.stdout.readline()))
    server = worker.parent()
    assert server is not None
    assert "peel_agent.worker_server" in server.cmdline()
    agent.kill()
    agent.communicate()
    wait_for(lambda: has_ended(worker) and has_ended(server))
