"""Real servers that tests talk to."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

START_SECONDS = 240
_SHARED = pytest.StashKey[str]()


def mlflow_client(uri: str) -> Any:
    """MLflow's own client, to read back what was written."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # decided when mlflow is first imported
    return importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """An `mlflow server` on loopback with its sqlite store and artifacts in `folder`; yields its URI once it answers.

    One worker and no job runner: that is all a test needs, and half the time to start.
    """
    log = folder / "server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command + stores, cwd=folder, env={**os.environ, **quiet}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until_it_answers(f"{uri}/health", server, log)
        yield uri
    finally:
        server.terminate()
        server.wait(timeout=240)


def kill_mlflow_server(port: int) -> None:
    """The processes of a server that `mlflow_server` started are gone at once, whatever they were doing."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(port) in process.cmdline():
                process.kill()


def wait_until_it_answers(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once the server answers at `url`; RuntimeError with its log when it ended or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=60):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not answer at {url} (exit status {server.poll()}):\n{log.read_text()}")


@pytest.fixture(scope="session")
def mlflow_uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of one MLflow server for the whole session. Use: `mlflow_uri = servers.mlflow_uri` in the test module.

    pytest makes one fixture of every module that names it; the stash makes them share the first one's server, which
    like all session fixtures stays up to the end.
    """
    stash = request.config.stash
    if _SHARED in stash:
        yield stash[_SHARED]
        return
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), free_port()) as uri:
        stash[_SHARED] = uri
        yield uri


@contextlib.contextmanager
def silent_server(patience: float) -> Iterator[tuple[int, list[socket.socket]]]:
    """A loopback port that accepts, never answers, and hangs up after `patience` seconds; yields it and the list of
    connections it was asked for.
    """
    connections: list[socket.socket] = []
    impatient = threading.Event()

    def hang_up() -> None:
        impatient.set()
        for connection in connections:
            connection.close()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                if impatient.is_set():
                    connections[-1].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = threading.Thread(target=accept), threading.Timer(patience, hang_up)
        for thread in threads:
            thread.start()
        yield int(listener.getsockname()[1]), connections
        listener.shutdown(socket.SHUT_RDWR)
        threads[1].cancel()
        for thread in threads:
            thread.join()
        hang_up()
