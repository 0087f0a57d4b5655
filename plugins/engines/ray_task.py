"""What runs on a node of the cluster: the local engine with one request, and what only the node can tell.

It imports no ray. A worker of Ray that is asked again keeps the process that has read in torch and transformers.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from peel_agent.errors import PeelError, WorkerError
from peel_agent.records import Request, plain, restored
from peel_agent.spi import Engine

from .local import LocalEngine

SIGHT_SECONDS = 5.0
"""How long a network file system may take to show a node what another machine has just written."""

DISTRIBUTION = "peel-agent"


@dataclass(frozen=True)
class Share:
    """What a task has of its node: threads for the processors asked for, GPUs, and bytes of memory if they are limited.

    A task that asks for a GPU computes on the first one that Ray shows it.
    """

    threads: int
    gpus: float
    memory_bytes: int | None


def peel(request: str, share: Mapping[str, Any], paths: Sequence[str], written_by: str) -> dict[str, Any]:
    """Answers a request, which is in JSON, with `peeled` or an `error`, or the `absent` ones of the paths it needs.

    `written_by` is the version of peel-agent that asks. The answer's `node` is the name of this machine.
    """
    node = socket.gethostname()
    try:
        _check_version(written_by, node)
        absent = _absent(paths)
        if absent:
            return {"absent": absent, "node": node}
        asked = _fitted(restored(Request, json.loads(request)), restored(Share, share), node)
        return {"peeled": plain(_engine().submit(asked).result()), "node": node}
    except PeelError as error:
        told = {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy}
        return {"error": told, "node": node}


def _check_version(written_by: str, node: str) -> None:
    here = version(DISTRIBUTION)
    if here != written_by:
        raise WorkerError(
            f"the node {node} has peel-agent {here}, and the agent is {written_by}",
            remedy=f"install the same on each node: pip install peel-agent=={written_by}",
        )


def _absent(paths: Sequence[str]) -> list[str]:
    deadline = time.monotonic() + SIGHT_SECONDS
    while (absent := [path for path in paths if not Path(path).exists()]) and time.monotonic() < deadline:
        time.sleep(SIGHT_SECONDS / 10)
    return absent


def _fitted(request: Request, share: Share, node: str) -> Request:
    """The request for what Ray gave this task of its node."""
    request = replace(request, threads=share.threads)
    if not share.gpus:
        fraction = request.memory_fraction
        if share.memory_bytes is not None:
            fraction = min(fraction, share.memory_bytes / psutil.virtual_memory().total)
        return replace(request, memory_fraction=fraction)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if not visible:
        raise WorkerError(
            f"Ray gave this task num_gpus = {share.gpus:g}, and no GPU can be seen in it on the node {node}: "
            "CUDA_VISIBLE_DEVICES is empty",
            remedy="unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES there, start the node with the GPUs that it has "
            "(ray start --num-gpus), or set num_gpus = 0 in [engine.ray]",
        )
    fraction = min(request.memory_fraction, share.gpus)
    return replace(request, lease=replace(request.lease, visible=visible), memory_fraction=fraction)


@cache
def _engine() -> Engine:
    return LocalEngine(lambda visible: {**os.environ, "CUDA_VISIBLE_DEVICES": visible})
