"""The commands that are shipped in deploy/ start within the limits that are shipped with them."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import servers
from tests.runs.deployment import AS_ROOT, BIN, NOBODY, SERVICES, confined, keys, started_by


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that an unprivileged user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="peel-deploy-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


LIMITS_SEEN = """
import json, os, pathlib, sys
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
def writable(folder):
    try:
        pathlib.Path(folder, "written").touch()
    except OSError:
        return False
    return True
seen = {name: status[name].strip() for name in ("NoNewPrivs", "CapEff", "CapBnd", "Umask")}
seen |= {"nice": os.nice(0), "user": os.geteuid(), "python": sys.base_prefix}
print(json.dumps(seen | {"writable": [writable(folder) for folder in sys.argv[1:]]}))
"""


def test_the_limits_are_in_force(place: Path) -> None:
    """What the next test runs under really is confined: otherwise it would show nothing."""
    shown = confined(place, {}, sys.executable, "-c", LIMITS_SEEN, place / "state", place, sys.prefix, "/var/tmp")
    seen = json.loads(shown.communicate()[0])
    assert (seen["NoNewPrivs"], seen["Umask"], seen["python"]) == ("1", keys()["UMask"], sys.base_prefix)
    assert seen["nice"] >= int(keys()["Nice"])
    assert seen["writable"][0]
    if AS_ROOT:
        assert (seen["user"], int(seen["CapEff"], 16), int(seen["CapBnd"], 16)) == (NOBODY, 0, 0)
        assert seen["writable"][1:] == [False, False, False]


@pytest.mark.parametrize("what", ["unit", "compose", "Deployment"])
def test_it_starts_within_its_limits(what: str, place: Path) -> None:
    """Over an empty directory the command that is shipped gets as far as `nothing readable`, and keeps its state."""
    (place / "runs").mkdir()
    np.save(place / "probe.npy", np.zeros((400, 32), dtype=np.int64))
    paths = {"watch": {"path": place / "runs"}, "probe": {"path": place / "probe.npy"}}
    text = "".join(f'[{table}]\npath = "{values["path"]}"\n' for table, values in paths.items())
    (place / "peel.toml").write_text(f'{text}[tracker]\nuse = ["jsonl"]\n')
    for path in place.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    environment, arguments = started_by(what, place)
    agent = confined(place, environment, BIN / "peel-agent", *arguments, "--once")
    printed, told = agent.communicate()[0], (place / "log").read_text()
    assert (agent.returncode, printed) == (3, b""), told
    assert f"nothing readable in {place / 'runs'}" in told
    assert [path for path in (place / "state").rglob("*") if path.is_file()]


def test_the_mlflow_server_answers_to_its_names(place: Path) -> None:
    """With compose.yaml's arguments, confined: the agent's address is answered, another name is refused with 403."""
    service, port = SERVICES["mlflow"], servers.free_port()
    asked = SERVICES["agent"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    arguments = [re.sub(r"\$\{\w+:-(.*)\}$", r"\1", part) for part in service["command"]]
    arguments = [part.replace("/var/lib/peel-agent", str(place / "state")) for part in arguments]
    address = ["--host=127.0.0.1", f"--port={port}", "--workers=1"]  # instead of the address and port of a container
    environment = started_by("compose", place)[0] | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with confined(place, environment, BIN / service["entrypoint"][0], *arguments, *address) as server:
        try:
            servers.wait_until_it_answers(f"http://127.0.0.1:{port}/health", server, place / "log")
            answers = {host: status(port, host) for host in (asked, "elsewhere:5000")}
        finally:
            server.terminate()
    assert answers == {asked: 200, "elsewhere:5000": 403}


def status(port: int, host: str) -> int:
    """The HTTP status of a look at the experiments, asked for by this name."""
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
