"""What runs on a node of the cluster: the local engine with one request, and what only the node can tell.

It imports ray only to hand out pieces of a checkpoint (`spread`). A worker of Ray that is asked again keeps the process
that has read in torch and transformers.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from peel_agent.errors import PeelError, WorkerError
from peel_agent.records import Request, plain, restored

from .local import LocalEngine
from .ray_pieces import Relay, given

SIGHT_SECONDS = 5.0
"""How long a network file system may take to show a node what another machine has just written."""

DISTRIBUTION = "peel-agent"


@dataclass(frozen=True)
class Share:
    """What a task has of its node: threads for the processors asked for, GPUs, and bytes of memory if they are limited.

    A task that asks for a GPU computes on the first one that Ray shows it. `pieces` of its work may be with others at a
    time, each of which has the same share, and one of the custom `resource`; one that is lost is started again
    `retries` times.
    """

    threads: int
    gpus: float
    memory_bytes: int | None
    resource: str | None = None
    pieces: int = 0
    retries: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The same in Ray's words."""
        return {
            "num_cpus": self.threads,
            "num_gpus": self.gpus,
            "memory": self.memory_bytes,
            "resources": {self.resource: 1} if self.resource else None,
            "scheduling_strategy": "SPREAD",
            "name": "peel-agent",
            "max_retries": 0,  # retries of Ray's are not told apart: one for memory that ran out would be without end
        }


def peel(request: str, share: Mapping[str, Any], paths: Sequence[str], written_by: str) -> dict[str, Any]:
    """Answers a request, which is in JSON, with `peeled` or an `error`, or the `absent` ones of the paths it needs.

    `written_by` is the version of peel-agent that asks. The answer's `node` is the name of this machine; `pieces`
    counts those that were computed for it, by Ray's names of the nodes.
    """

    def work(asked: Request, own: Share) -> dict[str, Any]:
        if not own.pieces:
            return {"peeled": plain(_engine().submit(asked).result())}
        relay = Relay(_starter(own, request, share, paths, written_by), own.retries)
        try:
            helped = replace(asked, helpers=relay.place, pieces=own.pieces)
            return {"peeled": plain(_engine().submit(helped).result()), "pieces": dict(relay.by_node)}
        finally:
            relay.close()

    return _answered(request, share, paths, written_by, work)


def compute(
    request: str, share: Mapping[str, Any], paths: Sequence[str], written_by: str, piece: bytes
) -> Iterator[Any]:
    """One piece of what `peel` does with the same request: Ray's name of this node at once, then `losses` or `lost`."""
    import ray

    yield ray.get_runtime_context().get_node_id()

    def work(asked: Request, _own: Share) -> dict[str, Any]:
        with given(piece) as place:
            return {"losses": _engine().answer(replace(asked, piece=place))["losses"]}

    answer = _answered(request, share, paths, written_by, work)
    if "losses" not in answer:
        node, error = answer["node"], answer.get("error")
        why = error["what"] if error else f"it cannot see {', '.join(answer['absent'])}"
        answer = {"lost": f"on the node {node}: {why}"}
    yield answer


def _starter(own: Share, *arguments: Any) -> Callable[[Any], Any]:
    """Starts a task for one piece, which is in the object store."""
    import ray

    task = ray.remote(compute).options(**{**own.options, "name": "peel-agent piece"}, num_returns="streaming")
    return lambda piece: task.remote(*arguments, piece)


def _answered(
    request: str,
    share: Mapping[str, Any],
    paths: Sequence[str],
    written_by: str,
    work: Callable[[Request, Share], dict[str, Any]],
) -> dict[str, Any]:
    node = socket.gethostname()
    try:
        _check_version(written_by, node)
        absent = _absent(paths)
        if absent:
            return {"absent": absent, "node": node}
        own = restored(Share, share)
        asked = _fitted(restored(Request, json.loads(request)), own, node)
        return {**work(asked, own), "node": node}
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
def _engine() -> LocalEngine:
    return LocalEngine(lambda visible: {**os.environ, "CUDA_VISIBLE_DEVICES": visible})
