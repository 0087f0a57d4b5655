"""One checkpoint of the engine `ray` spread over the nodes of a real cluster (`[engine.ray] spread`)."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from peel_agent import engines
from peel_agent.config import EngineSettings
from peel_agent.errors import GaveWay
from peel_agent.pipeline import locate
from peel_agent.records import DeviceLease, ModelSettings, Peeled, PeelSettings, ProbeSettings, Request
from peel_agent.spi import Engine
from peel_agent.testing.engines import numbers, peeled
from peel_plugins.engines import ray_cluster
from tests import zoo
from tests.ray_nodes import Nodes, nodes
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason='needs ray: pip install "peel-agent[ray]", as `make proof` does'
    ),
]

BLOCKS, SEQUENCES = 5, 160
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes some seconds to peel, and its probe."""
    made = tmp_path_factory.mktemp("spread")
    zoo.save(AutoModelForCausalLM.from_config(CONFIG), made, step=10)
    np.save(made / "probe.npy", np.random.default_rng(0).integers(0, CONFIG.vocab_size, size=(SEQUENCES, 64)))
    return made


def asked(folder: Path) -> Request:
    return Request(
        ref=locate(folder / "checkpoint-10"),
        probe=ProbeSettings(path=folder / "probe.npy"),
        peel=PeelSettings(effort="full", budget_passes=0),
        model=ModelSettings(),
        lease=DeviceLease("cpu", "", "cpu", "the test's"),
        nice=0,
        threads=1,
    )


@pytest.fixture(scope="module")
def alone(folder: Path) -> Peeled:
    engine = engines.opened(EngineSettings())
    answer = peeled(engine, asked(folder))
    engine.close(60)
    return answer


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """What the driver answered, as it came."""
    messages: list[Mapping[str, Any]] = []
    conclude = ray_cluster._conclude

    def seen(task: Any, message: Mapping[str, Any]) -> None:
        messages.append(message)
        conclude(task, message)

    monkeypatch.setattr(ray_cluster, "_conclude", seen)
    return messages


def on(cluster: Nodes, **settings: object) -> Engine:
    return engines.opened(EngineSettings("ray", {"ray": {"address": cluster.address, **settings}}))


def has(cluster: Nodes, node: int, what: str) -> bool:
    """Whether a process of a node is called so: what Ray's workers do is in their names."""
    return any(what in line for line in cluster.lines(node))


PEELING, HELPING, COMPUTING = "ray::peel-agent", "ray::peel-agent piece", " peel_agent.worker"


def test_the_same_numbers_from_one_node_and_from_two(
    folder: Path, alone: Peeled, told: list[Mapping[str, Any]]
) -> None:
    """The report is that of one process bit for bit, and with two nodes, which have room for one task each, the second
    has computed pieces of it. The times are printed.
    """
    for slots in ((1,), (1, 1)):
        with nodes(*slots) as cluster:
            engine = on(cluster, spread=2)
            for turn in ("the first", "the second"):
                told.clear()
                begun = time.perf_counter()
                answer = peeled(engine, asked(folder))
                seconds = time.perf_counter() - begun
                assert numbers(answer) == numbers(alone)
                assert (answer.memory, answer.losses) == (alone.memory, alone.losses)
                pieces = told[0]["pieces"]
                print(f"\n{len(slots)} nodes, {turn} time: {seconds:.1f} s, {sum(pieces.values())} pieces elsewhere")
                assert len(pieces) == len(slots) - 1
            engine.close(60)


@pytest.mark.parametrize(("slots", "retries"), [((1, 1), 0), ((1, 1, 1), 1)])
def test_a_node_that_dies_with_pieces(folder: Path, alone: Peeled, slots: tuple[int, ...], retries: int) -> None:
    """The checkpoint is not started again: its pieces are computed by what is left, and its numbers are the same."""
    every = range(len(slots))
    with nodes(*slots) as cluster:
        engine = on(cluster, spread=1, retries=retries)
        running = engine.submit(asked(folder))
        wait_for(lambda: any(has(cluster, node, HELPING) for node in every))
        cluster.kill(next(node for node in every if has(cluster, node, HELPING)))
        assert numbers(running.result(240)) == numbers(alone)
        engine.close(60)


def test_what_runs_gives_way_with_its_pieces(folder: Path, alone: Peeled) -> None:
    """A checkpoint that is given up leaves no piece of it at work, and the nodes go on."""
    with nodes(1, 1) as cluster:
        engine = on(cluster, spread=2)
        running = engine.submit(asked(folder))
        wait_for(lambda: any(has(cluster, node, HELPING) for node in range(2)))
        engine.give_way(asked(folder).ref.fingerprint, "somebody is there")
        with pytest.raises(GaveWay, match="somebody is there"):
            running.result(240)
        wait_for(lambda: not any(has(cluster, node, PEELING) for node in range(2)))
        assert numbers(peeled(engine, asked(folder))) == numbers(alone)
        engine.close(60)


def test_as_many_checkpoints_as_there_is_room(folder: Path, alone: Peeled) -> None:
    """Where each slot has a checkpoint, their pieces find no room, and nobody waits for anybody."""
    with nodes(1, 1) as cluster:
        engine = on(cluster, spread=2)
        other = zoo.save(AutoModelForCausalLM.from_config(CONFIG), folder, step=20)
        requests = [asked(folder), dataclasses.replace(asked(folder), ref=locate(other))]
        running = [engine.submit(request) for request in requests]
        assert numbers(running[0].result(240)) == numbers(alone)
        assert isinstance(running[1].result(240), Peeled)
        engine.close(60)
