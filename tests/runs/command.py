"""The command as a user runs it: a process with arguments, stdout, stderr and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.runs.warm import run_warm

WARM = ("scan", "witness", "compare")
"""Commands that import torch themselves: they run in a child of a process that has imported it."""


def peel_agent(
    *arguments: object, home: Path, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `peel-agent` to its end; `home` holds its state, so that tests do not meet."""
    if arguments[0] in WARM:
        return run_warm([str(argument) for argument in arguments], environment_of(home, **environment))
    return subprocess.run(
        [sys.executable, "-m", "peel_agent", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment_of(home, **environment),
    )


def environment_of(home: Path, **more: str) -> dict[str, str]:
    """This process's environment with a state folder of its own and no tracker but the one given.

    What peels has the priority of the tests: it must not wait for whatever else this machine does. Checkpoints are held
    and copied however little of its disk is free.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PEEL__"))}
    fixed = {
        "XDG_STATE_HOME": str(home),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PEEL__DEVICE__NICE": "0",
        "PEEL__WATCH__KEEP_FREE_GB": "0",
    }
    return inherited | fixed | more


def reports_of(state: Path) -> tuple[Path, ...]:
    """The report files in an agent's state folder, of all its runs, by name."""
    return tuple(sorted(state.glob("runs/*/reports/*.json"), key=lambda path: path.name))


def published(state: Path) -> list[str]:
    """What the tracker `jsonl` was sent, one line a publication, of all runs of an agent."""
    return [line for log in sorted(state.glob("runs/*/publications.jsonl")) for line in log.read_text().splitlines()]
