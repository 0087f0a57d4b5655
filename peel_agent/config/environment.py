"""What the environment says: where the state is kept, and what a worker may see."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def state_home() -> Path:
    """The folder beneath which agents keep their state: $XDG_STATE_HOME, or ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "peel-agent"


def given_state_dir() -> Path | None:
    """What the service manager gives as state folder: systemd's $STATE_DIRECTORY, None without one."""
    given = os.environ.get("STATE_DIRECTORY")
    return Path(given.partition(":")[0]) if given else None


def default_state_dir(identity: Sequence[str], name: str) -> Path:
    """The state folder of an agent that was not given one.

    `identity` is what makes it the same agent at its next start: its configuration file, or its one run's place, name
    and pinned tracker run. Passwords, trackers and their addresses are no part of it: they may change.
    """
    digest = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()[:8]
    return state_home() / f"{name}-{digest}"


def state_dir_of_0_1(watched: str, use: Sequence[str], options: Mapping[str, Mapping[str, str]]) -> Path:
    """Where version 0.1 kept the state of one watched place; its address had every option of every tracker in it."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    digest = hashlib.sha256(json.dumps([watched, sorted(use), options, uri], sort_keys=True).encode()).hexdigest()[:8]
    return state_home() / f"{watched.rstrip('/').rpartition('/')[2]}-{digest}"


def variable_of(name: str) -> str | None:
    """What a variable of the environment holds, without white space around it; None when that is nothing."""
    return os.environ.get(name, "").strip() or None


def visible_gpus() -> str | None:
    """The GPUs that a scheduler or a person gave this process, as CUDA_VISIBLE_DEVICES has them; None for all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def service_manager() -> tuple[str | None, str | None]:
    """Where systemd wants to be told of our state, and the microseconds within which it wants to hear of us."""
    is_ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return os.environ.get("NOTIFY_SOCKET"), os.environ.get("WATCHDOG_USEC") if is_ours else None


_OF_THE_SERVICE = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
"""What systemd says to the agent, and to none of its children."""


def worker_environment(visible: str) -> dict[str, str]:
    """The environment of a child that may see these GPUs ("" for none), by CUDA_VISIBLE_DEVICES."""
    inherited = {name: text for name, text in os.environ.items() if name not in _OF_THE_SERVICE}
    return {**inherited, "CUDA_VISIBLE_DEVICES": visible}


def see_only(visible: str) -> None:
    """The process sees these GPUs and no others ("" for none): to be called before CUDA is initialised."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
