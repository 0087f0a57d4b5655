"""What is shipped in deploy/, read; and the limits that it sets, had here as far as they can be."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "peel-agent@.service"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE = sorted(DOCKERFILE.parent.glob("*.yaml"))
SERVICES: dict[str, Any] = yaml.safe_load((DOCKERFILE.parent / "compose.yaml").read_text())["services"]
BIN = Path(sys.executable).parent
MANIFESTS = ROOT / "deploy" / "kubernetes"


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, **options)


def linter(name: str, distribution: str) -> Path:
    assert (BIN / name).exists(), f"{name} is missing: pip install -c constraints.txt {distribution}"
    return BIN / name


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


def pod_specs() -> dict[str, dict[str, Any]]:
    """The pods of the manifests as they lie there, by the kind of what makes them."""
    documents = [yaml.safe_load((MANIFESTS / name).read_text()) for name in POD_MAKERS]
    return {document["kind"]: document["spec"]["template"]["spec"] for document in documents}


POD_MAKERS = ("base/deployment.yaml", "overlays/sidecar/job.yaml")


def agent_container(pod: dict[str, Any]) -> dict[str, Any]:
    """The agent among a pod's containers, sidecars included."""
    every = [*pod.get("initContainers", ()), *pod["containers"]]
    (agent,) = [container for container in every if container["name"] == "peel-agent"]
    return dict(agent)


def command_lines() -> dict[str, list[str]]:
    """Every command of peel-agent that is started, by where it stands."""
    (healthcheck,) = instructions("HEALTHCHECK")
    (shown,) = instructions("CMD")
    return {
        "unit": shlex.split(keys()["ExecStart"])[1:],
        "image": json.loads(shown),
        "health": json.loads(healthcheck.partition("CMD ")[2])[1:],
        "compose": SERVICES["agent"]["command"],
    } | {kind: agent_container(pod)["args"] for kind, pod in pod_specs().items()}


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
    """The environment and the arguments with which the unit, compose.yaml or a manifest starts the agent."""
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
