"""A sidecar that runs beside a test: a real process on a directory that the test writes to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from peel_agent.errors import LedgerError
from peel_agent.ledger import open_beside
from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.command import environment_of
from tests.waiting import wait_for

CONFIGURATION = """\
[watch]
path = "{root}"
settle_seconds = 0
poll_seconds = 0.2
backlog = "all"

[probe]
path = "{probe}"

[state]
path = "{state}"

[health]
listen = ""
"""


def workers_of(agent: int) -> list[psutil.Process]:
    """The processes that peel for this agent: started by themselves, or forked from its worker server."""
    server, workers = "peel_agent.worker_server", []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(agent).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                forked = server in process.cmdline() and process.ppid() != agent
                workers += [process] if forked or "peel_agent.worker" in process.cmdline() else []
    return workers


def read_ledger(state: Path, sql: str) -> list[Any]:
    """The rows, beside whoever is at work there; none while there is no ledger."""
    try:
        database = open_beside(state)
    except LedgerError:
        return []
    try:
        return database.query(sql)
    finally:
        database.close()


class Sidecar:
    """One watched directory and the state of its agent, in `folder`.

    The agent answers at once (instant_agent.py), unless another `module` is given.
    """

    module = "tests.runs.instant_agent"

    def __init__(self, folder: Path, more: str = "", command: Sequence[str] = (), **environment: str) -> None:
        self.folder, self.root, self.state = folder, folder / "checkpoints", folder / "state"
        self.file, self.log = folder / "peel.toml", folder / "log"
        self.root.mkdir(parents=True, exist_ok=True)
        (folder / "probe.npy").touch()
        self.configure(more)
        self._command = command
        self.environment = environment_of(folder, PEELS=str(folder / "peels"), **environment)
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, more: str) -> None:
        form = CONFIGURATION.format(root=self.root, probe=self.folder / "probe.npy", state=self.state)
        self.file.write_text(form + more)

    def start(self) -> None:
        command = [*self._command, sys.executable, "-m", self.module, "watch", "-c", str(self.file)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.process = None
        return status

    @contextmanager
    def running(self) -> Iterator[Sidecar]:
        self.start()
        try:
            yield self
        finally:
            if self.process is not None:
                self.stop()

    @property
    def has_ended(self) -> bool:
        """Whether the agent is gone, by itself."""
        return self.process is not None and self.process.poll() is not None

    def write(self, *steps: int) -> None:
        for step in steps:
            write_checkpoint(self.root / f"checkpoint-{step}", step)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command, beside it."""
        return subprocess.run(
            [sys.executable, "-m", "peel_agent", *arguments, "-c", str(self.file)],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_words(self, words: str, times: int = 1) -> None:
        wait_for(lambda: self.said().count(words) >= times, 120)

    def read(self, sql: str) -> list[Any]:
        return read_ledger(self.state, sql)

    def steps(self, outcome: str = "peeled") -> list[int]:
        return [
            step for (step,) in self.read(f"SELECT step FROM checkpoints WHERE outcome = '{outcome}' ORDER BY step")
        ]

    def wait_for_steps(self, *steps: int) -> None:
        wait_for(lambda: self.steps() == list(steps), 120)

    def owed(self) -> int:
        rows = self.read("SELECT count(*) FROM deliveries WHERE dead = 0")
        return int(rows[0][0]) if rows else 0

    def peels(self) -> list[str]:
        return (self.folder / "peels").read_text().split()

    def status(self) -> dict[str, Any]:
        form: dict[str, Any] = json.loads(self.command("status", "--json").stdout)
        return form
