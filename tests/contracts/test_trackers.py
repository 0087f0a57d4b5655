"""Both tracker plug-ins against the conformance kit, and the MLflow one against a real server."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Publication
from peel_agent.spi import Tracker
from peel_agent.testing.trackers import CHECKS, Connect, ReadMetrics, example_publication, foreign_values_stay
from peel_plugins.trackers import jsonl_file, mlflow_run
from peel_plugins.trackers.jsonl_file import JsonlSettings
from peel_plugins.trackers.mlflow_run import MlflowSettings
from tests import servers

mlflow_uri = servers.mlflow_uri

NOW = 1_700_000_000_000

# What MLflow's own store uses of SQLAlchemy is deprecated in SQLAlchemy 2.1; only a process that opens a store sees it.
opens_a_store = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


class Run:
    """An experiment of this test alone, seen through MLflow's own client."""

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        self.uri, self.name, self.folder = uri, name, folder
        self.client = servers.mlflow_client(uri)
        self.checkpoints = folder / "it's a run" / "checkpoints"

    def experiment(self) -> str:
        existing = self.client.get_experiment_by_name(self.name)
        return self.client.create_experiment(self.name) if existing is None else existing.experiment_id

    def connect(self, **options: str) -> Tracker:
        return mlflow_run.PLUGIN.connect(
            MlflowSettings(**{"tracking_uri": self.uri, "experiment": self.name, **options}),
            checkpoint_dir=str(self.checkpoints),
            state_dir=self.folder / "state",
        )

    def ids(self) -> list[str]:
        return [run.info.run_id for run in self.client.search_runs([self.experiment()])]

    def read_metrics(self, step: int) -> dict[str, list[float]]:
        (run_id,) = self.ids()
        return {key: v for key in self.keys(run_id) if (v := [p.value for p in self.points(run_id, key, step)])}

    def keys(self, run_id: str) -> list[str]:
        return [key for key in self.client.get_run(run_id).data.metrics if key.startswith("peel/")]

    def points(self, run_id: str, key: str, step: int) -> list:
        return [point for point in self.client.get_metric_history(run_id, key) if point.step == step]

    def text(self, run_id: str, path: str) -> str:
        return Path(self.client.download_artifacts(run_id, path, str(self.folder))).read_text()

    def foreign(self, run_id: str) -> dict[str, object]:
        """Everything of the run that is not peel's."""
        run = self.client.get_run(run_id)
        keys = [key for key in run.data.metrics if not key.startswith("peel/")]
        return {
            "status": run.info.status,
            "end_time": run.info.end_time,
            "name": run.info.run_name,
            "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("peel.")},
            "params": run.data.params,
            "metrics": {key: [(p.value, p.step) for p in self.client.get_metric_history(run_id, key)] for key in keys},
        }


@pytest.fixture
def run(mlflow_uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    return Run(mlflow_uri, request.node.name, tmp_path)


def trainers_run(run: Run, **tags: str) -> str:
    """A run as a trainer leaves it while training: a metric, a parameter, a note."""
    made = run.client.create_run(run.experiment(), run_name="trainer", tags={"mlflow.note.content": "my note", **tags})
    run.client.log_metric(made.info.run_id, "loss", 2.5, timestamp=NOW, step=100)
    run.client.log_param(made.info.run_id, "lr", "0.001")
    return made.info.run_id


# ---------------------------------------------------------------- the kit


def jsonl_place(run: None, folder: Path) -> tuple[Connect, ReadMetrics]:
    def read(step: int) -> Mapping[str, Sequence[float]]:
        values_by_key: dict[str, list[float]] = {}
        for line in (folder / "state" / "publications.jsonl").read_text().splitlines():
            form = json.loads(line)
            for key, value in form["metrics"].items() if form["step"] == step else ():
                values_by_key.setdefault(key, []).append(value)
        return values_by_key

    return lambda: jsonl_file.PLUGIN.connect(
        JsonlSettings(), checkpoint_dir=str(folder), state_dir=folder / "state"
    ), read


def created_run(run: Run, folder: Path) -> tuple[Connect, ReadMetrics]:
    return run.connect, run.read_metrics


def run_named_by_id(run: Run, folder: Path) -> tuple[Connect, ReadMetrics]:
    run_id = trainers_run(run)
    return lambda: run.connect(run_id=run_id), run.read_metrics


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
class TestConformance:
    """Every tracker passes every check of the kit."""

    def test_jsonl(self, check: Callable[[Connect, ReadMetrics], None], tmp_path: Path) -> None:
        """The file tracker."""
        check(*jsonl_place(None, tmp_path))

    @pytest.mark.parametrize("place", [created_run, run_named_by_id])
    def test_mlflow(self, check: Callable, place: Callable, run: Run, tmp_path: Path) -> None:
        """The MLflow tracker, in a run of its own and in a trainer's run."""
        check(*place(run, tmp_path))


def test_the_kit_refuses_a_tracker_that_repeats() -> None:
    """A tracker that appends what it already has fails the kit, so the kit can fail."""
    kept: list[Publication] = []

    class Repeating:
        def prepare(self) -> None:
            pass

        def publish(self, publication: Publication) -> None:
            kept.append(publication)

        def where(self) -> str:
            return "here"

        def close(self) -> None:
            pass

    def read(step: int) -> dict[str, list[float]]:
        values_by_key: dict[str, list[float]] = {}
        for publication in kept:
            for key, value in publication.metrics.items() if publication.step == step else ():
                values_by_key.setdefault(key, []).append(value)
        return values_by_key

    with pytest.raises(AssertionError, match="step 100 holds"):
        CHECKS[1](Repeating, read)


# ---------------------------------------------------------------- jsonl


class TestJsonl:
    def connect(self, folder: Path) -> Tracker:
        return jsonl_file.PLUGIN.connect(
            JsonlSettings(folder / "new" / "p.jsonl"), checkpoint_dir=str(folder), state_dir=folder
        )

    def test_a_line_holds_the_whole_publication(self, tmp_path: Path) -> None:
        """Everything of a publication can be read back from its line, at the path that the option names."""
        self.connect(tmp_path).publish(example_publication(100))
        (line,) = (tmp_path / "new" / "p.jsonl").read_text().splitlines()
        assert Publication(**json.loads(line)) == example_publication(100)
        assert str(tmp_path / "new" / "p.jsonl") in self.connect(tmp_path).where()

    @pytest.mark.parametrize("cut", [1, 40, -1])
    def test_a_torn_last_line_is_repaired(self, tmp_path: Path, cut: int) -> None:
        """After a crash in the middle of a line, the line is written whole and those before it are kept."""
        tracker = self.connect(tmp_path)
        tracker.publish(example_publication(100))
        file = tmp_path / "new" / "p.jsonl"
        first = file.read_bytes()
        tracker.publish(example_publication(200))
        whole = file.read_bytes()
        file.write_bytes(first + whole[len(first) :][:cut])
        self.connect(tmp_path).publish(example_publication(200))
        assert file.read_bytes() == whole

    def test_a_failed_append_is_tried_again_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the disk fails after the bytes went out, the same publication sent again is there once."""
        tracker = self.connect(tmp_path)
        tracker.publish(example_publication(100))

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as fault:
            fault.setattr(os, "fsync", full)
            with pytest.raises(DestinationUnavailable, match="No space left on device"):
                tracker.publish(example_publication(200))
        tracker.publish(example_publication(200))
        steps = [json.loads(line)["step"] for line in (tmp_path / "new" / "p.jsonl").read_text().splitlines()]
        assert steps == [100, 200]

    def test_a_path_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        """A folder in the file's place is an error that names it and can be tried again."""
        tracker = jsonl_file.PLUGIN.connect(JsonlSettings(tmp_path), checkpoint_dir=str(tmp_path), state_dir=tmp_path)
        with pytest.raises(DestinationUnavailable, match="Is a directory") as caught:
            tracker.publish(example_publication(100))
        assert str(tmp_path) in str(caught.value)


# ---------------------------------------------------------------- MLflow: what is written


class TestMlflowWrites:
    def test_a_publication_arrives_whole(self, run: Run) -> None:
        """Metrics carry the publication's step and timestamp, tags and artifacts its text."""
        tracker = run.connect()
        sent = example_publication(800)
        tracker.publish(sent)
        (run_id,) = run.ids()
        assert {key: run.points(run_id, key, 800)[0].value for key in run.keys(run_id)} == sent.metrics
        assert {point.timestamp for key in sent.metrics for point in run.points(run_id, key, 800)} == {NOW + 800}
        tags = run.client.get_run(run_id).data.tags
        assert tags.items() >= {**sent.tags, "peel.committed_ms": str(sent.timestamp_ms)}.items()
        assert {path: run.text(run_id, path) for path in sent.files} == sent.files
        assert tracker.where() == f"MLflow run {run_id} at {run.uri}"

    def test_more_metrics_than_a_request_takes(self, run: Run) -> None:
        """2,500 metrics, over the 1,000 of a request, all arrive; sent again they are still there once."""
        metrics = {f"peel/margin/L{index:03d}": float(index) for index in range(2_500)}
        for _ in range(2):
            run.connect().publish(Publication(1, NOW, metrics, {}))
        (run_id,) = run.ids()
        assert run.client.get_run(run_id).data.metrics == metrics
        assert len(run.points(run_id, "peel/margin/L2499", 1)) == 1

    def test_an_earlier_step_sent_late_leaves_the_runs_tags_and_shared_files(self, run: Run) -> None:
        """Tags and alerts.jsonl speak for the newest step; a late one adds its metrics and its own file only."""
        tracker = run.connect()
        tracker.publish(example_publication(200))
        tracker.publish(example_publication(100))
        (run_id,) = run.ids()
        tags = run.client.get_run(run_id).data.tags
        assert (tags["peel.committed_ms"], tags["peel.alert.layer_below"]) == ("1700000000200", "firing at 200")
        assert run.text(run_id, "peel/alerts.jsonl") == "[200]\n"
        assert run.text(run_id, "peel/checkpoints/step-000000100.json") == '{"step": 100}'

    def test_files_that_were_held_back_arrive_after_later_numbers(self, run: Run) -> None:
        """While the artifact store was away the metrics went on: the log of alerts of then is no late one."""
        numbers, files = run.connect(), run.connect()
        for step in (100, 200):
            numbers.publish(dataclasses.replace(example_publication(step), files={}))
        files.publish(dataclasses.replace(example_publication(100), metrics={}, tags={}))
        (run_id,) = run.ids()
        assert run.text(run_id, "peel/alerts.jsonl") == "[100]\n"
        files.publish(dataclasses.replace(example_publication(200), metrics={}, tags={}))
        files.publish(dataclasses.replace(example_publication(100), metrics={}, tags={}))
        assert run.text(run_id, "peel/alerts.jsonl") == "[200]\n"
        assert run.client.get_run(run_id).data.tags["peel.alert.layer_below"] == "firing at 200"

    def test_a_training_that_went_back_still_speaks(self, run: Run) -> None:
        """After a roll-back a lower step is the newer checkpoint: its tags and alerts count."""
        tracker = run.connect()
        tracker.publish(dataclasses.replace(example_publication(1000), timestamp_ms=NOW))
        tracker.publish(dataclasses.replace(example_publication(600), timestamp_ms=NOW + 1))
        (run_id,) = run.ids()
        assert run.client.get_run(run_id).data.tags["peel.alert.layer_below"] == "firing at 600"
        assert run.text(run_id, "peel/alerts.jsonl") == "[600]\n"

    @pytest.mark.parametrize("status", ["RUNNING", "FINISHED", "FAILED", "KILLED"])
    def test_a_trainers_run_keeps_what_is_its_own(self, run: Run, status: str) -> None:
        """Status, end time, note, parameters, metrics and name of a run named by id stay as the trainer left them."""
        run_id = trainers_run(run)
        if status != "RUNNING":
            run.client.set_terminated(run_id, status)
        before = run.foreign(run_id)
        assert (before["status"], before["tags"]["mlflow.note.content"]) == (status, "my note")
        foreign_values_stay(lambda: run.connect(run_id=run_id), lambda: run.foreign(run_id))
        assert run.read_metrics(100) == {key: [v] for key, v in example_publication(100).metrics.items()}

    def test_a_created_run_says_whose_it_is_and_stays_running(self, run: Run) -> None:
        """A new run is tagged with the directory, named after it, and still RUNNING after close and reconnection."""
        run.connect().publish(example_publication(100))
        (run_id,) = run.ids()
        for _ in range(2):
            made = run.client.get_run(run_id)
            assert made.data.tags["peel.checkpoint_dir"] == str(run.checkpoints)
            assert (made.info.run_name, made.info.status) == ("checkpoints", "RUNNING")
            again = run.connect()
            again.publish(example_publication(200))
            again.close()
        assert json.loads((run.folder / "state" / "mlflow-run.json").read_text())["run_id"] == run_id

    def test_an_interrupted_publication_is_completed(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files that were refused after the metrics went in are there after sending again, and no second point is."""

        def broken(*args: object) -> None:
            raise OSError("connection reset")

        tracker = run.connect()
        with monkeypatch.context() as fault:
            fault.setattr(type(run.client), "log_text", broken)
            with pytest.raises(DestinationUnavailable, match="connection reset"):
                tracker.publish(example_publication(100))
        tracker.publish(example_publication(100))
        (run_id,) = run.ids()
        assert run.read_metrics(100) == {key: [v] for key, v in example_publication(100).metrics.items()}
        assert run.text(run_id, "peel/alerts.jsonl") == "[100]\n"


# ---------------------------------------------------------------- MLflow: which run


class TestMlflowFindsTheRun:
    def publish(self, run: Run, **options: str) -> str:
        """The id of the run that a new connection wrote to."""
        tracker = run.connect(**options)
        tracker.publish(example_publication(100))
        return tracker.where().split()[2]

    def test_an_id_goes_before_a_tag(self, run: Run) -> None:
        """`run_id` is used even when another run carries the directory's tag."""
        named = trainers_run(run)
        trainers_run(run, **{"peel.checkpoint_dir": str(run.checkpoints)})
        assert self.publish(run, run_id=named) == named

    def test_the_newest_run_with_the_directorys_tag(self, run: Run) -> None:
        """Among runs tagged with just this directory the newest is used, and none is created."""
        trainers_run(run, **{"peel.checkpoint_dir": str(run.checkpoints)})
        tagged = trainers_run(run, **{"peel.checkpoint_dir": str(run.checkpoints)})
        trainers_run(run, **{"peel.checkpoint_dir": str(run.checkpoints).replace("'", "x")})
        assert self.publish(run) == tagged
        assert len(run.ids()) == 3

    @pytest.mark.parametrize("name", ["plain", "it's", 'say "x"', 'it\'s "both"', "100%_\\done", "`tick`", "höhe"])
    def test_any_directory_name_is_found_again(self, run: Run, name: str) -> None:
        """Quotes, wildcards and backslashes in a directory's name neither break the search nor find another run."""
        run.checkpoints = run.folder / name
        first = self.publish(run)
        (run.folder / "state" / "mlflow-run.json").unlink()
        assert self.publish(run) == first

    def test_a_run_created_before_is_remembered_without_its_tag(self, run: Run) -> None:
        """The id in the state folder finds the run when the tag is gone, and a tag goes before it."""
        created = self.publish(run)
        run.client.delete_tag(created, "peel.checkpoint_dir")
        assert self.publish(run) == created
        tagged = trainers_run(run, **{"peel.checkpoint_dir": str(run.checkpoints)})
        assert self.publish(run) == tagged

    @pytest.mark.parametrize("key", ["tracking_uri", "experiment", "checkpoint_dir"])
    def test_a_run_created_for_another_place_is_not_used(self, run: Run, key: str) -> None:
        """The remembered run is used only for the server, experiment and directory that it was created for."""
        self.publish(run)
        state = run.folder / "state" / "mlflow-run.json"
        kept = json.loads(state.read_text())
        run.client.delete_tag(kept["run_id"], "peel.checkpoint_dir")
        state.write_text(json.dumps({**kept, key: "another"}))
        assert self.publish(run) != kept["run_id"]

    def test_a_run_that_is_gone_is_replaced(self, run: Run) -> None:
        """A remembered run that the server no longer knows (its database was set up anew) leads to a new one."""
        first = self.publish(run)
        state = run.folder / "state" / "mlflow-run.json"
        run.client.delete_tag(first, "peel.checkpoint_dir")
        state.write_text(state.read_text().replace(first, "0" * 32))
        assert self.publish(run) not in (first, "0" * 32)

    def test_a_deleted_created_run_is_replaced(self, run: Run) -> None:
        """A run created here and deleted by the user is not written to: the next start opens another."""
        created = self.publish(run)
        run.client.delete_run(created)
        assert self.publish(run) not in (created, "")
        assert len(run.ids()) == 1

    def test_the_name_can_be_chosen(self, run: Run) -> None:
        """`run_name` names a created run."""
        assert run.client.get_run(self.publish(run, run_name="peel of 7B")).info.run_name == "peel of 7B"


# ---------------------------------------------------------------- MLflow: what goes wrong


class TestMlflowRefusals:
    def refused(self, tracker: Tracker) -> DestinationDenied:
        with pytest.raises(DestinationDenied) as caught:
            tracker.publish(example_publication(100))
        return caught.value

    def test_a_deleted_run(self, run: Run) -> None:
        """A deleted run named by id is refused before anything is written, with the command that restores it."""
        run_id = trainers_run(run)
        tracker = run.connect(run_id=run_id)
        run.client.delete_run(run_id)
        error = self.refused(tracker)
        assert f"MLflow run {run_id} at {run.uri} is deleted" in error.what
        assert f"mlflow runs restore --run-id {run_id}" in error.remedy
        run.client.restore_run(run_id)
        assert run.client.list_artifacts(run_id) == []
        tracker.publish(example_publication(100))

    def test_a_run_deleted_while_we_write(self, run: Run) -> None:
        """A run deleted between two publications is noticed at the second."""
        tracker = run.connect()
        tracker.publish(example_publication(100))
        run.client.delete_run(run.ids()[0])
        assert "is deleted" in self.refused(tracker).what

    @pytest.mark.parametrize("run_id", ["0" * 32, "../../etc"])
    def test_a_run_that_is_not_there(self, run: Run, run_id: str) -> None:
        """A wrong id is named together with the option to correct."""
        error = self.refused(run.connect(run_id=run_id))
        assert run_id in error.what
        assert "[tracker.mlflow]" in error.remedy

    def test_a_deleted_experiment(self, run: Run) -> None:
        """A deleted experiment is neither written to nor created again, since its name is taken."""
        experiment_id = run.experiment()
        run.client.delete_experiment(experiment_id)
        error = self.refused(run.connect())
        assert run.name in error.what
        assert f"mlflow experiments restore -x {experiment_id}" in error.remedy

    @opens_a_store
    @pytest.mark.parametrize("uri", ["nonsense://x", "postgresql+nosuchdriver://user:hunter2@127.0.0.1/db"])
    def test_a_store_that_this_mlflow_cannot_open(self, tmp_path: Path, uri: str) -> None:
        """An unknown scheme or a driver that is not installed will not work later either."""
        tracker = mlflow_run.PLUGIN.connect(
            MlflowSettings(tracking_uri=uri), checkpoint_dir=str(tmp_path), state_dir=tmp_path
        )
        assert "hunter2" not in str(self.refused(tracker))


def connect_to(uri: str, folder: Path, **options: str) -> Tracker:
    return mlflow_run.PLUGIN.connect(
        MlflowSettings(tracking_uri=uri, **options),
        checkpoint_dir=str(folder / "checkpoints"),
        state_dir=folder / "state",
    )


def test_a_server_away_then_back(tmp_path: Path) -> None:
    """With nobody listening a publication is refused as unavailable; once the server is up, the same lands once."""
    port = servers.free_port()
    tracker = connect_to(f"http://127.0.0.1:{port}", tmp_path)
    for _ in range(2):
        with pytest.raises(
            DestinationUnavailable, match=f"MLflow at http://127.0.0.1:{port} cannot be reached"
        ) as caught:
            tracker.publish(example_publication(100))
        assert caught.value.retryable
        assert "tracking_uri" in caught.value.remedy
    with servers.mlflow_server(tmp_path, port) as uri:
        for _ in range(2):
            tracker.publish(example_publication(100))
        run = Run(uri, "Default", tmp_path)
        assert run.read_metrics(100) == {key: [v] for key, v in example_publication(100).metrics.items()}


class _Failing(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status`, asking to come back in an hour; counts the requests."""

    status = 503
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(self.status)
        self.send_header("Retry-After", "3600")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def failing_server() -> Iterator[tuple[str, type[_Failing]]]:
    handler = type("Failing", (_Failing,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def test_an_overloaded_server_is_given_up_at_once(
    failing_server: tuple[str, type[_Failing]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 with `Retry-After: 3600` ends as DestinationUnavailable after one retry, and nobody sleeps for an hour."""
    address, handler = failing_server
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    with pytest.raises(DestinationUnavailable):
        connect_to(f"http://{address}", tmp_path).publish(example_publication(100))
    assert handler.requests == 2
    assert sum(naps) < 10


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that accepts and stays silent costs one timeout and one retry, whatever MLflow's own defaults are."""
    assert mlflow_run.REQUEST_TIMEOUT_SECONDS * (1 + mlflow_run.REQUEST_RETRIES) <= 30
    monkeypatch.setattr(mlflow_run, "REQUEST_TIMEOUT_SECONDS", 1)
    with servers.silent_server(patience=240) as (port, connections):
        with pytest.raises(DestinationUnavailable, match="timed out"):
            connect_to(f"http://127.0.0.1:{port}", tmp_path).publish(example_publication(100))
        assert len(connections) == 2


@pytest.mark.parametrize("user", ["trainer:hunter2", "trainer:hun@ter2", "hunter2", "trainer:hun%2Fter2"])
@pytest.mark.parametrize("status", [None, 401, 403, 404, 500])
def test_no_secret_leaves_in_a_message(
    user: str, status: int | None, failing_server: tuple[str, type[_Failing]], tmp_path: Path
) -> None:
    """User and password of a tracking URI appear in no message, traceback or state, whatever the server answers."""
    address, handler = failing_server
    handler.status = status or 200
    address = address if status else f"127.0.0.1:{servers.free_port()}"
    tracker = connect_to(f"http://{user}@{address}/", tmp_path)
    with pytest.raises(DeliveryError) as caught:
        tracker.publish(example_publication(100))
    shown = "".join(traceback.format_exception(caught.value)) + tracker.where()
    assert address in shown
    assert type(caught.value) is (DestinationUnavailable if status in (None, 500) else DestinationDenied)
    assert "ter2" not in shown
    assert "trainer" not in shown


@pytest.mark.parametrize("password", ["hun ter2", "hun/ter2", "hun?ter2", "hun#ter2"])
def test_no_secret_leaves_of_a_malformed_uri(password: str, tmp_path: Path) -> None:
    """A password that should have been percent-encoded is cut out all the same."""
    tracker = connect_to(f"http://trainer:{password}@127.0.0.1:{servers.free_port()}", tmp_path)
    with pytest.raises(DeliveryError) as caught:
        tracker.publish(example_publication(100))
    shown = "".join(traceback.format_exception(caught.value)) + tracker.where()
    assert "http://127.0.0.1" in shown
    assert not any(secret in shown for secret in ("ter2", "hun", "trainer"))


def test_no_secret_is_kept_in_the_state(run: Run) -> None:
    """The state file names the server without user and password."""
    tracker = connect_to(run.uri.replace("://", "://trainer:hunter2@"), run.folder, experiment=run.name)
    tracker.publish(example_publication(100))
    assert json.loads((run.folder / "state" / "mlflow-run.json").read_text())["tracking_uri"] == run.uri


# ---------------------------------------------------------------- MLflow without a server, and the library itself

ALONE = """
import sys
from pathlib import Path
from peel_agent.testing.trackers import example_publication
from peel_plugins.trackers.mlflow_run import PLUGIN, MlflowSettings

tracker = PLUGIN.connect(MlflowSettings(), checkpoint_dir="checkpoints", state_dir=Path("state"))
print(tracker.where())
assert "mlflow" not in sys.modules, "connecting imported mlflow"
tracker.publish(example_publication(100))
tracker.publish(example_publication(100))
print(tracker.where())
import mlflow.telemetry
assert mlflow.telemetry.get_telemetry_client() is None, "telemetry is on"
"""


@opens_a_store
def test_mlflows_own_default_uri_and_a_sqlite_store(tmp_path: Path) -> None:
    """Without `tracking_uri` MLFLOW_TRACKING_URI counts; mlflow is imported late, telemetry is off, sqlite works."""
    uri = f"sqlite:///{tmp_path}/me@here.db"
    # Inside CI or pytest MLflow is silent anyway: the process must not know that it is in a test.
    hidden = ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=tmp_path,
        env={**environment, "MLFLOW_TRACKING_URI": uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    run = Run(uri, "Default", tmp_path)
    assert run.read_metrics(100) == {key: [v] for key, v in example_publication(100).metrics.items()}
    assert before == "MLflow at its default tracking URI"
    assert after == f"MLflow run {run.ids()[0]} at {uri}"
