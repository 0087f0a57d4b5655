"""What the MLflow tracker says when a real server, or what is before it or behind it, refuses or fails."""

from __future__ import annotations

import dataclasses
import errno
import http.client
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Publication
from peel_agent.spi import Tracker
from peel_agent.testing.trackers import example_publication
from peel_plugins.trackers import mlflow_run
from peel_plugins.trackers.mlflow_run import MlflowSettings
from tests import servers
from tests.runs.faulty_proxy import Fault, Proxy, answering, cut_after_write, faulty_proxy

mlflow_uri = servers.mlflow_uri

SENT = example_publication(100)
NUMBERS, FILES = dataclasses.replace(SENT, files={}), dataclasses.replace(SENT, metrics={}, tags={})


@dataclass
class Place:
    """An experiment of one test alone, behind a proxy, with the connections of both lanes."""

    proxy: Proxy
    client: object
    name: str
    folder: Path
    location: str | None = None

    def __post_init__(self) -> None:
        self.experiment = self.client.create_experiment(self.name, artifact_location=self.location)  # type: ignore[attr-defined]
        self.numbers, self.files = self.connect(), self.connect()

    def connect(self, **settings: str) -> Tracker:
        options = MlflowSettings(**{"tracking_uri": self.proxy.uri, "experiment": self.name, **settings})
        return mlflow_run.PLUGIN.connect(
            options, checkpoint_dir=str(self.folder / "c"), state_dir=self.folder / "state"
        )

    def runs(self) -> list:
        return list(self.client.search_runs([self.experiment]))  # type: ignore[attr-defined]

    def points(self, step: int = 100) -> list[float]:
        (run,) = self.runs()
        history = self.client.get_metric_history(run.info.run_id, "peel/loss")  # type: ignore[attr-defined]
        return [point.value for point in history if point.step == step]

    def file_names(self) -> list[str]:
        (run,) = self.runs()
        return [file.path for file in self.client.list_artifacts(run.info.run_id, "peel/checkpoints")]  # type: ignore[attr-defined]


@pytest.fixture
def proxy(mlflow_uri: str) -> Iterator[Proxy]:
    with faulty_proxy(mlflow_uri) as proxy:
        yield proxy


@pytest.fixture
def place(proxy: Proxy, mlflow_uri: str, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(proxy, servers.mlflow_client(mlflow_uri), request.node.name, tmp_path)


def refused(tracker: Tracker, sent: Publication) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        tracker.publish(sent)
    return caught.value


def called(host: str) -> Fault:
    """The real server is asked by another name than it allows."""

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        target = handler.upstream  # type: ignore[attr-defined]
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        server = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
        server.request(handler.command, handler.path, body, {"Host": host, "Content-Type": "application/json"})
        answer = server.getresponse()
        content = answer.read()
        server.close()
        handler.send_response(answer.status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        return True

    return fault


SERVER: dict[str, tuple[Fault, type[DeliveryError], list[str]]] = {
    "401": (answering(401, "who are you"), DestinationDenied, ["refused the results", "401", "who are you"]),
    "403": (answering(403, "not yours"), DestinationDenied, ["refused the results", "403", "not yours"]),
    "403 of its own to a name it does not allow": (
        called("mlflow.example:5000"),
        DestinationDenied,
        ["refused the results", "Invalid Host header"],
    ),
    "500": (answering(500, "database is locked"), DestinationUnavailable, ["cannot be reached"]),
    "502": (answering(502, "<html>bad gateway"), DestinationUnavailable, ["cannot be reached"]),
    "429": (answering(429, "slow down"), DestinationUnavailable, ["cannot be reached"]),
    "no JSON": (answering(200, "<html>log in here"), DestinationUnavailable, ["cannot be reached", "log in here"]),
}


@pytest.mark.parametrize("fault", SERVER)
@pytest.mark.parametrize("lane", ["numbers", "files"])
def test_a_server_that_refuses_is_not_its_artifact_store(place: Place, fault: str, lane: str) -> None:
    """The error says whether to try again soon or slowly, its cause, and that it is the server; then all arrives."""
    place.proxy.fault, kind, words = SERVER[fault]
    tracker, sent = (place.numbers, NUMBERS) if lane == "numbers" else (place.files, FILES)
    error = refused(tracker, sent)
    assert type(error) is kind
    for word in (*words, f"MLflow at {place.proxy.uri}"):
        assert word in error.what
    assert "artifact store" not in error.what
    assert "it is tried again" in error.remedy
    place.proxy.fault = None
    place.numbers.publish(NUMBERS)
    place.files.publish(FILES)
    assert place.points() == [SENT.metrics["peel/loss"]]
    assert place.file_names() == ["peel/checkpoints/step-000000100.json"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, DestinationDenied), (403, DestinationDenied), (404, DestinationDenied), (500, DestinationUnavailable)],
)
def test_an_artifact_store_behind_the_server_that_refuses(place: Place, status: int, kind: type[DeliveryError]) -> None:
    """The error names the store and where it is; metrics and tags go on, and the files come later, once."""
    place.numbers.publish(NUMBERS)
    place.proxy.fault = answering(status, "no", only="/mlflow-artifacts/")
    error = refused(place.files, FILES)
    assert type(error) is kind
    assert "the artifact store of MLflow run" in error.what
    (run,) = place.runs()
    assert f"({run.info.artifact_uri})" in error.what
    assert "metrics and tags are written all the same" in error.what + error.remedy
    later = example_publication(200)
    place.numbers.publish(dataclasses.replace(later, files={}))
    assert place.points(200) == [later.metrics["peel/loss"]]
    place.proxy.fault = None
    place.files.publish(FILES)
    assert place.file_names() == ["peel/checkpoints/step-000000100.json"]
    assert place.points() == [SENT.metrics["peel/loss"]]


@pytest.mark.parametrize("below", ["a file", "/proc"])
def test_an_artifact_store_that_this_machine_may_not_write_to(
    proxy: Proxy, mlflow_uri: str, request: pytest.FixtureRequest, tmp_path: Path, below: str
) -> None:
    """A folder that is not served by the server, and that nobody, not even root, can write here, is a denial."""
    (tmp_path / "a file").write_text("")
    folder = tmp_path / "a file" if below == "a file" else Path("/proc")
    place = Place(proxy, servers.mlflow_client(mlflow_uri), request.node.name, tmp_path, f"{folder}/artifacts")
    place.numbers.publish(NUMBERS)
    error = refused(place.files, FILES)
    assert type(error) is DestinationDenied
    assert f"{folder}/artifacts" in error.what
    assert "the artifact store of MLflow run" in error.what
    assert "while metrics and tags are written all the same" in error.what
    assert "serve artifacts through the tracking server" in error.remedy
    later = example_publication(200)
    place.numbers.publish(dataclasses.replace(later, files={}))
    assert place.points(200) == [later.metrics["peel/loss"]]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, DestinationDenied),
        (errno.EPERM, DestinationDenied),
        (errno.EROFS, DestinationDenied),
        (errno.ENOSPC, DestinationUnavailable),
        (errno.EIO, DestinationUnavailable),
    ],
    ids=lambda one: errno.errorcode[one] if isinstance(one, int) else one.__name__,
)
def test_faults_of_a_folder_of_artifacts(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[DeliveryError]
) -> None:
    """What a file system answers is a denial where somebody must change something, and else may pass."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/artifacts/peel")

    place.numbers.publish(NUMBERS)
    monkeypatch.setattr(type(place.client), "log_text", fail)
    error = refused(place.files, FILES)
    assert type(error) is kind
    assert "the artifact store of MLflow run" in error.what
    assert os.strerror(number) in error.what
    assert "metrics and tags are written all the same" in error.what + error.remedy
    assert "tracking_uri" not in error.remedy


class NoCredentialsError(Exception):
    """As botocore has one: no MlflowException, and no OSError."""


def test_an_error_of_the_artifact_stores_own_library(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its library raises is told as the store's, with its kind and what to do; metrics are there."""

    def fail(*_: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    place.numbers.publish(NUMBERS)
    with monkeypatch.context() as fault:
        fault.setattr(type(place.client), "log_text", fail)
        error = refused(place.files, FILES)
    assert type(error) is DestinationDenied
    assert "the artifact store of MLflow run" in error.what
    assert "NoCredentialsError: Unable to locate credentials" in error.what
    assert "serve artifacts through the tracking server" in error.remedy
    place.files.publish(FILES)
    assert place.file_names() == ["peel/checkpoints/step-000000100.json"]


def test_a_run_that_is_deleted_and_restored(place: Place) -> None:
    """Both lanes wait while the run is deleted, told the command that restores it; then all arrives, once."""
    client = place.client
    run_id = client.create_run(place.experiment).info.run_id  # type: ignore[attr-defined]
    numbers, files = place.connect(run_id=run_id), place.connect(run_id=run_id)
    numbers.publish(NUMBERS)
    client.delete_run(run_id)  # type: ignore[attr-defined]
    for tracker, sent in ((numbers, NUMBERS), (files, FILES), (place.connect(run_id=run_id), NUMBERS)):
        error = refused(tracker, sent)
        assert type(error) is DestinationDenied
        assert f"MLflow run {run_id} at {place.proxy.uri} is deleted" in error.what
        assert f"mlflow runs restore --run-id {run_id}" in error.remedy
    client.restore_run(run_id)  # type: ignore[attr-defined]
    assert client.list_artifacts(run_id) == []  # type: ignore[attr-defined]
    numbers.publish(NUMBERS)
    files.publish(FILES)
    assert place.points() == [SENT.metrics["peel/loss"]]
    assert place.file_names() == ["peel/checkpoints/step-000000100.json"]


def test_metrics_that_no_server_takes_are_given_up(place: Place) -> None:
    """What the server calls invalid will be so for ever: it must not hold back what comes after it."""
    error = refused(place.numbers, dataclasses.replace(NUMBERS, metrics={"peel/not allowed: *?": 1.0}))
    assert type(error) is DeliveryError
    assert "will never take these metrics" in error.what
    place.numbers.publish(NUMBERS)
    assert place.points() == [SENT.metrics["peel/loss"]]


@pytest.mark.parametrize("lane", ["numbers", "files"])
def test_an_answer_that_was_lost_doubles_nothing(place: Place, lane: str) -> None:
    """The server wrote, and nobody heard: sent again, each point and each file is there once."""
    place.numbers.publish(dataclasses.replace(NUMBERS, step=50, timestamp_ms=NUMBERS.timestamp_ms - 50))
    tracker, sent = (place.numbers, NUMBERS) if lane == "numbers" else (place.files, FILES)
    place.proxy.fault = cut_after_write()
    assert type(refused(tracker, sent)) is DestinationUnavailable
    place.proxy.fault = None
    place.numbers.publish(NUMBERS)
    place.files.publish(FILES)
    assert place.points() == [SENT.metrics["peel/loss"]]
    assert place.file_names() == ["peel/checkpoints/step-000000100.json"]


def test_both_lanes_make_one_run(place: Place) -> None:
    """Two connections that begin at once, where no run is there yet, write to the same new one."""
    import threading

    begin = threading.Barrier(2)

    def send(tracker: Tracker, sent: Publication) -> Callable[[], None]:
        def publish() -> None:
            begin.wait()
            tracker.publish(sent)

        return publish

    threads = [
        threading.Thread(target=send(tracker, sent))
        for tracker, sent in ((place.numbers, NUMBERS), (place.files, FILES))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(place.runs()) == 1
    assert place.numbers.where() == place.files.where()
