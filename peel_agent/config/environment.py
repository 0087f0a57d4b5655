"""What follows from the settings and the environment: where the state is kept, and what a worker may see."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from peel_agent.config.sections import TrackerSettings
from peel_agent.errors import ConfigurationError


def default_state_dir(watched: str, tracker: TrackerSettings) -> Path:
    """One folder for each watched path and destination, beneath $XDG_STATE_HOME (or ~/.local/state).

    The destination counts, so that a new run in an old directory neither inherits the old one's alerts and bounds nor
    is sent what waits for it, and a back-fill into another run sends everything.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    identity = json.dumps([watched, sorted(tracker.use), tracker.options, uri], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return base / "peel-agent" / f"{watched.rstrip('/').rpartition('/')[2]}-{digest}"


def worker_environment(device: str) -> tuple[dict[str, str], str]:
    """The environment of the child that peels on `device`, and the device's name inside it.

    Only the GPU that was named is visible there; with the CPU, none is.
    """
    environment = dict(os.environ)
    if device in ("auto", "cpu"):
        environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment, "cpu"
    inherited = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = device.removeprefix("cuda:")
    if inherited and device.startswith("cuda:"):  # N counts what this process may see, as it does for torch
        if int(number) >= len(inherited):
            raise ConfigurationError(
                f"`device.select` is `{device}`; CUDA_VISIBLE_DEVICES leaves {len(inherited)} GPUs here",
                remedy=f"use cuda:0 to cuda:{len(inherited) - 1}, a GPU's uuid, or cpu",
            )
        number = inherited[int(number)]
    environment["CUDA_VISIBLE_DEVICES"] = number
    return environment, "cuda:0"
