"""Engines against their conformance kit, and what the one for a Ray cluster makes of what a cluster and a node say.

A real cluster is in tests/runs/test_ray_cluster.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peel_agent import engines, registry
from peel_agent.config import EngineSettings, worker_environment
from peel_agent.errors import (
    CheckpointError,
    ConfigurationError,
    DeviceUnavailable,
    GaveWay,
    PeelError,
    TornCheckpoint,
    WorkerError,
)
from peel_agent.pipeline import locate
from peel_agent.records import DeviceLease, ModelSettings, Peeled, PeelSettings, ProbeSettings, Request, plain, restored
from peel_agent.testing.engines import CHECKS, Open
from peel_plugins.engines import ray_cluster, ray_task
from peel_plugins.engines.ray_cluster import RayEngine, RaySettings
from peel_plugins.engines.ray_task import Share
from tests import zoo
from tests.rooms.test_publish_form import FULL
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def request_of_a_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("engines")
    np.save(folder / "probe.npy", zoo.token_ids(400, 1))
    path = zoo.save(zoo.build("llama", steps=5), folder / "run", step=10)
    return Request(
        ref=locate(path),
        probe=ProbeSettings(path=folder / "probe.npy"),
        peel=PeelSettings(effort="quick"),
        model=ModelSettings(),
        lease=DeviceLease("cpu", "", "cpu", "the only one"),
        nice=0,
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_local(check: Callable[[Open, Request], None], request_of_a_checkpoint: Request) -> None:
    """The engine of one machine passes every check of the kit."""
    check(lambda: engines.opened(EngineSettings()), request_of_a_checkpoint)


# ---------------------------------------------------------------- its settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            EngineSettings("local", {"ray": {"num_cpus": 2}}),
            r"\[engine.ray\] is configured, and \[engine\] use is `loc",
        ),
        (EngineSettings("ray", {"ray": {"num_cpu": 2}}), r"unknown key `engine.ray.num_cpu`(.|\n)*`num_cpus`"),
        (EngineSettings("ray", {"ray": {"num_gpus": "one"}}), r"`engine.ray.num_gpus` is 'one'(.|\n)*a number"),
        (EngineSettings("ray", {"ray": {"num_gpus": 2}}), r"`engine.ray.num_gpus` is 2(.|\n)*one GPU"),
        (EngineSettings("ray", {"ray": {"at_once": 0}}), r"`engine.ray.at_once` is 0(.|\n)*at least 1"),
        (EngineSettings("ray", {"ray": {"spread": -1}}), r"`engine.ray.spread` is -1(.|\n)*at least 0"),
        (EngineSettings("ray", {"ray": {"memory_bytes": -5}}), r"`engine.ray.memory_bytes` is -5"),
    ],
)
def test_settings_that_cannot_be(settings: EngineSettings, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused by name before anything starts."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    with pytest.raises(ConfigurationError, match=words):
        engines.opened(settings)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is refused with the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"ray is not installed(.|\n)*pip install \"peel-agent\[ray\]\""):
        engines.opened(EngineSettings("ray"))


def test_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS is used where the configuration names none."""
    seen: list[RaySettings] = []
    plugin = registry.engine("ray")
    monkeypatch.setattr(type(plugin), "open", lambda _self, _environment, settings: seen.append(settings))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    engines.opened(EngineSettings("ray"))
    engines.opened(EngineSettings("ray", {"ray": {"address": "ray://other:10001", "num_gpus": 0.5}}))
    assert [one.address for one in seen] == ["head:6379", "ray://other:10001"]
    assert seen[1] == RaySettings(address="ray://other:10001", num_gpus=0.5)


# ---------------------------------------------------------------- the agent's end


class Cluster:
    """The engine with a child that answers each request as the test says, instead of one that knows a cluster."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program, self.seen = folder / "driver.py", folder / "seen"
        monkeypatch.setattr(ray_cluster, "command", lambda _: [sys.executable, str(self.program)])
        self.engine = RayEngine(worker_environment, RaySettings(at_once=2))

    def answers(self, answer: dict[str, Any] | None, first: str = '{"connected": true}', *, ends: bool = False) -> None:
        """None: it is silent until it is told to cancel. It `ends` instead of going on."""
        self.program.write_text(
            "import json, sys\n"
            f"print({first!r}, flush=True)\n"
            "for line in sys.stdin:\n"
            "    message = json.loads(line)\n"
            f"    open({str(self.seen)!r}, 'a').write(line)\n"
            f"    answer = {{'cancelled': True}} if 'cancel' in message else {answer!r}\n"
            f"    if {ends!r}: break\n"
            "    if answer: print(json.dumps({'id': message.get('id', message.get('cancel')), **answer}), flush=True)\n"
        )

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.seen.read_text().splitlines()] if self.seen.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Cluster(tmp_path, monkeypatch)
    yield made
    made.engine.close(240)


def error_of(answer: Future[Peeled]) -> PeelError:
    error = answer.exception(240)
    assert isinstance(error, PeelError)
    return error


def died(what: str, kind: str = "WorkerError") -> dict[str, Any]:
    return {"error": {"kind": kind, "what": what, "remedy": "its output stands above"}, "node": "n7"}


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (
            {"lost": "lost 4 times with its node"},
            WorkerError,
            "failed on the Ray cluster: lost 4 times(.|\n)*ray status",
        ),
        ({"unfit": "CPU 1, GPU 1"}, GaveWay, "no node of the Ray cluster has CPU 1, GPU 1"),
        (died("signal SIGKILL"), WorkerError, r"SIGKILL \(on the node n7\)(.|\n)*logs of Ray on that node"),
        (died("NaN", "CheckpointError"), CheckpointError, "NaN"),
        (died("odd", "OfAPlugIn"), CheckpointError, "odd"),
        ({"peeled": {"nonsense": 1}}, WorkerError, "please report it"),
        ({"absent": [str(Path(__file__))], "node": "n7"}, WorkerError, "n7 cannot see .*test_engines(.|\n)*mount it"),
        ({"absent": ["/no/such/save"], "node": "n7"}, TornCheckpoint, "/no/such/save is gone"),
    ],
)
def test_what_became_of_a_task(
    cluster: Cluster, request_of_a_checkpoint: Request, answer: dict[str, Any], kind: type[PeelError], words: str
) -> None:
    """A death counts, a checkpoint's own error is raised as what it was, and what is not its fault is not blamed on it.

    A path that the agent sees and a node does not is named; one that is gone for both was rotated away.
    """
    cluster.answers(answer)
    error = error_of(cluster.engine.submit(request_of_a_checkpoint))
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


def test_a_request_and_its_answer(cluster: Cluster, request_of_a_checkpoint: Request, tmp_path: Path) -> None:
    """The node gets the request with absolute paths and the files that it must see; the answer comes back whole."""
    peeled = Peeled(FULL, None)
    cluster.answers({"peeled": plain(peeled)})
    relative = dataclasses.replace(request_of_a_checkpoint.probe, path=Path("pyproject.toml"))
    asked = dataclasses.replace(request_of_a_checkpoint, probe=relative)
    assert cluster.engine.submit(asked).result(240) == peeled
    (told,) = cluster.told()
    sent = restored(Request, json.loads(told["request"]))
    assert sent.probe.path == Path("pyproject.toml").absolute()
    assert sent.ref == request_of_a_checkpoint.ref
    assert told["paths"] == [str(sent.ref.path), str(sent.probe.path)]
    assert cluster.engine.memory_bytes() is None


def test_a_task_gives_way(cluster: Cluster, request_of_a_checkpoint: Request) -> None:
    """The one that is meant is cancelled, and says why; the engine's end is no fault of the other."""
    cluster.answers(None)
    other = dataclasses.replace(
        request_of_a_checkpoint, ref=dataclasses.replace(request_of_a_checkpoint.ref, fingerprint="other")
    )
    meant, goes_on = (cluster.engine.submit(one) for one in (request_of_a_checkpoint, other))
    cluster.engine.give_way("another", "not meant")
    cluster.engine.give_way(request_of_a_checkpoint.ref.fingerprint, "its run was ended")
    assert error_of(meant).what == "its run was ended"
    assert [message["cancel"] for message in cluster.told() if "cancel" in message] == ["0"]
    assert not goes_on.done()
    cluster.engine.close(240)
    for answer in (goes_on, cluster.engine.submit(other)):
        error = error_of(answer)
        assert (type(error), error.what) == (GaveWay, "the agent ends")


def test_a_cluster_that_is_away(
    cluster: Cluster, request_of_a_checkpoint: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is blamed for it, and no device is had until it answers; then all is as before."""
    cluster.answers(None, '{"away": "nobody listens there"}', ends=True)
    error = error_of(cluster.engine.submit(request_of_a_checkpoint))
    assert type(error) is GaveWay
    assert "cannot be used: nobody listens there" in error.what
    for _ in range(3):
        with pytest.raises(DeviceUnavailable, match=r"nobody listens there(.|\n)*ray start"):
            cluster.engine.acquire()
    cluster.answers({"peeled": plain(Peeled(FULL, None))})
    monkeypatch.setattr(ray_cluster, "RETRY_SECONDS", 0.0)
    cluster.engine._not_before = 0.0

    def is_back() -> bool:
        try:
            return cluster.engine.acquire() is not None
        except DeviceUnavailable:
            return False

    wait_for(is_back)
    assert cluster.engine.submit(request_of_a_checkpoint).result(240) == Peeled(FULL, None)


def test_places_are_those_of_the_settings(cluster: Cluster) -> None:
    """As many as `at_once`, each with a name, without asking the cluster."""
    first, second = cluster.engine.acquire(), cluster.engine.acquire()
    assert first is not None
    assert second is not None
    assert cluster.engine.acquire() is None
    assert first.key != second.key
    assert (first.name, first.label) == ("cpu", "the Ray cluster")
    assert "1 CPU for each checkpoint, 2 at once" in first.reason
    cluster.engine.release(second)
    cluster.engine.release(second)
    assert cluster.engine.acquire() == second
    assert cluster.engine.acquire() is None


# ---------------------------------------------------------------- the node's end


class Asked:
    """The node's own engine, which keeps what it was asked."""

    def __init__(self) -> None:
        self.request: Request | None = None

    def submit(self, request: Request) -> Future[Peeled]:
        self.request = request
        answer: Future[Peeled] = Future()
        answer.set_result(Peeled(FULL, None))
        return answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()
    monkeypatch.setattr(ray_task, "_engine", lambda: made)
    monkeypatch.setattr(ray_task, "SIGHT_SECONDS", 0.0)
    monkeypatch.setattr(ray_task, "version", lambda _: "1.2.3")
    return made


def on_node(request: Request, share: Share, paths: tuple[str, ...] = (), version: str = "1.2.3") -> dict[str, Any]:
    return ray_task.peel(json.dumps(plain(request)), plain(share), paths, version)


def test_a_node_peels_with_what_it_was_given(
    asked: Asked, request_of_a_checkpoint: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many threads as processors asked for, the memory asked for, and the first GPU that Ray shows it."""
    answer = on_node(request_of_a_checkpoint, Share(threads=3, gpus=0, memory_bytes=1 << 20))
    assert restored(Peeled, answer["peeled"]) == Peeled(FULL, None)
    assert asked.request is not None
    assert asked.request.threads == 3
    assert 0 < asked.request.memory_fraction < 0.01
    assert asked.request.lease.visible == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    on_node(request_of_a_checkpoint, Share(threads=1, gpus=0.25, memory_bytes=1 << 20))
    assert asked.request.lease.visible == "3"
    assert asked.request.memory_fraction == 0.25


@pytest.mark.parametrize("visible", [None, "", " "])
def test_a_gpu_that_cannot_be_seen(
    asked: Asked, request_of_a_checkpoint: Request, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    """A task that was given a GPU and sees none says so, with what to do; it does not fall back to the CPU."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    error = on_node(request_of_a_checkpoint, Share(threads=1, gpus=1, memory_bytes=None))["error"]
    assert asked.request is None
    assert error["kind"] == "WorkerError"
    assert "num_gpus = 1, and no GPU can be seen" in error["what"]
    assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES" in error["remedy"]
    assert "num_gpus = 0" in error["remedy"]


def test_what_a_node_cannot_do(asked: Asked, request_of_a_checkpoint: Request, tmp_path: Path) -> None:
    """Files that it does not see, and another version of peel-agent, are told before anything is computed."""
    share = Share(threads=1, gpus=0, memory_bytes=None)
    missing = str(tmp_path / "not mounted")
    assert on_node(request_of_a_checkpoint, share, (str(tmp_path), missing))["absent"] == [missing]
    error = on_node(request_of_a_checkpoint, share, version="1.2.4")["error"]
    assert "has peel-agent 1.2.3, and the agent is 1.2.4" in error["what"]
    assert "pip install peel-agent==1.2.4" in error["remedy"]
    assert asked.request is None
