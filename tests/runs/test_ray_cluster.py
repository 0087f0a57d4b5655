"""The engine `ray` on a real Ray cluster of two nodes: two raylets of this machine, each with one processor to give."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from peel_agent import engines
from peel_agent.config import EngineSettings
from peel_agent.errors import GaveWay, WorkerError
from peel_agent.pipeline import locate
from peel_agent.records import DeviceLease, ModelSettings, Peeled, PeelSettings, ProbeSettings, Request
from peel_agent.spi import Engine, Leasing
from peel_agent.testing.engines import CHECKS, Open, numbers, peeled
from tests import zoo
from tests.ray_nodes import Nodes, nodes
from tests.runs.sidecar import read_ledger
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason='needs ray: pip install "peel-agent[ray]", as `make proof` does'
    ),
]

RUNS, CHECKPOINTS = 20, 12

CONFIGURATION = """\
[probe]
path = "{folder}/probe.npy"

[peel]
effort = "quick"

[device]
nice = 0

[tracker]
use = ["jsonl"]

[health]
listen = ""

[state]
path = "{state}"

[engine]
use = "ray"
[engine.ray]
address = "{address}"
at_once = 2
"""

RUN = """
[[run]]
name = "{name}"
[run.watch]
path = "{folder}/{name}"
settle_seconds = 0
poll_seconds = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe, and a checkpoint of a small decoder for each of several runs."""
    made = tmp_path_factory.mktemp("runs")
    np.save(made / "probe.npy", zoo.token_ids(400, 1))
    model = zoo.build("llama", steps=5)
    for run in range(RUNS):
        zoo.save(model, made / f"run-{run:02}", step=10 * (run + 1))
    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(1, 1) as made:
        yield made


def asked(folder: Path, run: int, effort: str = "quick") -> Request:
    """With as many threads as a task on the cluster has."""
    return Request(
        ref=locate(folder / f"run-{run:02}" / f"checkpoint-{10 * (run + 1)}"),
        probe=ProbeSettings(path=folder / "probe.npy"),
        peel=PeelSettings(effort=effort),
        model=ModelSettings(),
        lease=DeviceLease("cpu", "", "cpu", "the test's"),
        nice=0,
        threads=1,
    )


def on(nodes: Nodes, **settings: object) -> Engine:
    return engines.opened(EngineSettings("ray", {"ray": {"address": nodes.address, **settings}}))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ray(check: Callable[[Open, Request], None], cluster: Nodes, folder: Path) -> None:
    """The engine of a cluster passes every check of the kit."""
    check(lambda: on(cluster), asked(folder, 0))


def test_the_same_numbers_as_here(cluster: Nodes, folder: Path) -> None:
    """Margins, bounds, headroom and what is kept for the next checkpoint are those of the local engine, bit for bit."""
    answers = []
    for engine in (engines.opened(EngineSettings()), on(cluster)):
        answers.append(peeled(engine, asked(folder, 0, effort="full")))
        engine.close(60)
    here, there = answers
    assert numbers(here) == numbers(there)
    assert (here.memory, here.sketches, here.losses) == (there.memory, there.sketches, there.losses)
    assert here.memory is not None


def all_of(engine: Engine, requests: list[Request]) -> tuple[list[Peeled], float]:
    """The answers to all, each as soon as the engine has a device for it; and the seconds that it took."""
    assert isinstance(engine, Leasing)
    begun = time.perf_counter()
    waiting = list(reversed(requests))
    at_work: dict[str, tuple[DeviceLease, Future[Peeled]]] = {}
    answers: dict[str, Peeled] = {}
    while waiting or at_work:
        while waiting and (lease := engine.acquire()) is not None:
            request = dataclasses.replace(waiting.pop(), lease=lease)
            at_work[request.ref.fingerprint] = (lease, engine.submit(request))
        for fingerprint, (lease, answer) in list(at_work.items()):
            if answer.done():
                engine.release(lease)
                del at_work[fingerprint]
                answers[fingerprint] = answer.result()
        time.sleep(0.02)
    return [answers[request.ref.fingerprint] for request in requests], time.perf_counter() - begun


def test_twelve_checkpoints_on_one_and_on_two_workers(cluster: Nodes, folder: Path) -> None:
    """Each comes back once with the numbers of the local engine; the times of both are printed."""
    requests = [asked(folder, run) for run in range(CHECKPOINTS)]
    local = engines.opened(EngineSettings())
    peeled(local, requests[0])  # it reads in what it needs
    begun = time.perf_counter()
    here = [peeled(local, request) for request in requests]
    seconds = {"local": time.perf_counter() - begun}
    local.close(60)
    for workers in (1, 2):
        engine = on(cluster, at_once=workers)
        all_of(engine, requests[:2])  # each node reads in what it needs
        there, seconds[f"ray, {workers} at once"] = all_of(engine, requests)
        engine.close(60)
        assert [numbers(one) for one in there] == [numbers(one) for one in here]
    overhead = (seconds["ray, 1 at once"] - seconds["local"]) / CHECKPOINTS
    told = ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items())
    print(f"\n{CHECKPOINTS} checkpoints: {told}; a task takes {1000 * overhead:.0f} ms more than a child of the agent")


def test_a_cluster_without_what_is_asked_for(cluster: Nodes, folder: Path) -> None:
    """It is said what no node has, and the checkpoint is not blamed for it."""
    engine = on(cluster, num_gpus=1)
    error = engine.submit(asked(folder, 0)).exception(240)
    engine.close(60)
    assert isinstance(error, GaveWay)
    assert "no node of the Ray cluster has CPU 1, GPU 1" in error.what


def test_a_checkpoint_that_kills_its_process(cluster: Nodes, folder: Path) -> None:
    """It counts as a death and names the node, and the node goes on."""
    engine = on(cluster)
    doomed = dataclasses.replace(asked(folder, 0), memory_fraction=1e-6)
    error = engine.submit(doomed).exception(240)
    assert isinstance(error, WorkerError)
    assert not isinstance(error, GaveWay)
    assert "on the node" in error.what
    assert isinstance(peeled(engine, asked(folder, 0)), Peeled)
    engine.close(60)


def test_twenty_runs_of_one_agent(cluster: Nodes, folder: Path, tmp_path: Path) -> None:
    """One agent with two places on the cluster peels the checkpoint of each of twenty runs, each exactly once."""
    text = CONFIGURATION.format(folder=folder, address=cluster.address, state=tmp_path / "state")
    text += "".join(RUN.format(name=f"run-{run:02}", folder=folder) for run in range(RUNS))
    (tmp_path / "peel.toml").write_text(text)
    command = [sys.executable, "-m", "peel_agent", "watch", "--once", "-c", str(tmp_path / "peel.toml")]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    lines = [
        json.loads(line)
        for file in (tmp_path / "state").rglob("publications.jsonl")
        for line in file.read_text().splitlines()
    ]
    steps = Counter(line["step"] for line in lines if line.get("metrics"))
    assert steps == Counter(10 * (run + 1) for run in range(RUNS))
    events = read_ledger(tmp_path / "state", "SELECT kind, step FROM events WHERE kind IN ('peeling', 'measured')")
    assert Counter(events) == Counter((kind, step) for kind in ("peeling", "measured") for step in steps)


def test_a_node_that_dies(folder: Path) -> None:
    """What ran on it is peeled on another one, with the same numbers, and nothing is blamed. Then the driver dies: what
    runs gives way, and the engine is connected anew.
    """
    with nodes(1, 1) as made:
        engine = on(made)
        requests = [asked(folder, run, effort="full") for run in range(2)]
        alone = [numbers(peeled(engine, request)) for request in requests]
        running = [engine.submit(request) for request in requests]
        wait_for(lambda: made.is_peeling(1))
        made.kill(1)
        assert [numbers(answer.result(240)) for answer in running] == alone
        last = engine.submit(requests[0])
        wait_for(lambda: made.is_peeling(0))
        engine._driver.process.kill()  # type: ignore[attr-defined]
        assert isinstance(last.exception(240), GaveWay)
        wait_for(lambda: not made.is_peeling(0))
        assert numbers(peeled(engine, requests[0])) == alone[0]
        engine.close(60)
