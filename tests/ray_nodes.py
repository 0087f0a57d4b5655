"""A real Ray cluster on this machine, as a process of its own: `python -m tests.ray_nodes SLOTS...`, one node for each.

The first node is the head. Each has so many processors to give away, and a small object store. The process prints a
line of JSON, the address and the process of each node's raylet, and takes the cluster down when its stdin ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.waiting import wait_for

STORE_BYTES = 100 << 20


@dataclass(frozen=True)
class Nodes:
    """A cluster that is up: its address, and the raylet of each of its nodes."""

    address: str
    raylets: tuple[psutil.Process, ...]

    def is_peeling(self, node: int) -> bool:
        """Whether a checkpoint is peeled on this node now."""
        return any(" peel_agent.worker" in f" {line}" for line in self.lines(node))

    def lines(self, node: int) -> Iterator[str]:
        """The command line, or the name, of each process of a node."""
        for process in self.raylets[node].children(recursive=True):
            with contextlib.suppress(psutil.Error):
                yield " ".join(process.cmdline())

    def kill(self, node: int) -> None:
        """The node is gone from one moment to the next, with all that runs on it."""
        doomed = [self.raylets[node], *self.raylets[node].children(recursive=True)]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def nodes(*slots: int) -> Iterator[Nodes]:
    """A cluster with a node for each number of processors; nothing of it is left afterwards."""
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's own 15 waits for whatever else this machine does
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes", *map(str, slots)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline())
        below = psutil.Process(process.pid).children(recursive=True)
        yield Nodes(said["address"], tuple(psutil.Process(pid) for pid in said["raylets"]))
        below += psutil.Process(process.pid).children(recursive=True)
    finally:
        process.stdin.close()
        process.wait(240)
        process.stdout.close()
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below))


def main(slots: list[int]) -> None:
    from ray.cluster_utils import Cluster

    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        cluster = Cluster()
        made = [
            cluster.add_node(num_cpus=own, num_gpus=0, object_store_memory=STORE_BYTES, include_dashboard=False)
            for own in slots
        ]
        raylets = [node.all_processes["raylet"][0].process.pid for node in made]
        answers.write(json.dumps({"address": cluster.address, "raylets": raylets}) + "\n")
        answers.flush()
        sys.stdin.read()
        with contextlib.suppress(Exception):  # a node that was killed cannot be taken down
            cluster.shutdown()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    main([int(one) for one in sys.argv[1:]])
