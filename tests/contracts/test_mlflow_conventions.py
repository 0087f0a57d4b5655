"""MLflow's own conventions: which experiment its variables name, and what is no MLflow at all."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from peel_agent.config import load_settings
from peel_agent.destinations import notes, tracker_settings
from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Check
from peel_agent.testing.trackers import example_publication
from peel_plugins.trackers import mlflow_run
from peel_plugins.trackers.mlflow_run import MlflowSettings, MlflowTracker
from tests import servers

mlflow_uri = servers.mlflow_uri

VARIABLES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def settings_of(text: str, folder: Path, *, alone: bool = True) -> MlflowSettings:
    (folder / "peel.toml").write_text(text)
    tracking = load_settings(folder / "peel.toml", {}).tracker
    mlflow: MlflowSettings = tracker_settings(tracking, alone=alone)["mlflow"]
    return mlflow


def connect(folder: Path, uri: str, **options: str | None) -> MlflowTracker:
    settings = MlflowSettings(tracking_uri=uri, **options)
    return mlflow_run.PLUGIN.connect(settings, checkpoint_dir=str(folder / "c"), state_dir=folder / "state")  # type: ignore[return-value]


def looked(tracker: MlflowTracker) -> dict[str, Check]:
    return {check.what: check for check in tracker.look()}


# ---------------------------------------------------------------- which experiment

TABLE = "[tracker.mlflow]\n"
WHICH: dict[str, tuple[str, dict[str, str], tuple[str | None, str | None]]] = {
    "nothing": ("", {}, (None, None)),
    "the name": ("", {"NAME": "a"}, ("a", None)),
    "the id": ("", {"ID": "7"}, (None, "7")),
    "both, which the tracker compares": ("", {"NAME": "a", "ID": "7"}, ("a", "7")),
    "white space around": ("", {"NAME": " a\n", "ID": "\t7 "}, ("a", "7")),
    "nothing but white space": ("", {"NAME": " \n", "ID": ""}, (None, None)),
    "a name in the file": (TABLE + 'experiment = "f"', {"NAME": "a", "ID": "7"}, ("f", None)),
    "an id in the file": (TABLE + "experiment_id = 8", {"NAME": "a", "ID": "7"}, (None, "8")),
}


@pytest.mark.parametrize("case", WHICH)
def test_the_experiment_of_the_environment(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's variables name it unless the configuration does, by its name or by its id."""
    text, variables, expected = WHICH[case]
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_EXPERIMENT_{name}", value)
    settings = settings_of(text, tmp_path)
    assert (settings.experiment, settings.experiment_id) == expected
    assert settings_of(text, tmp_path, alone=False) == settings


def test_what_comes_from_the_environment_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variable that counts is named with its value, and one that cannot count is named too."""
    for name, value in {"MLFLOW_EXPERIMENT_NAME": "mine", "MLFLOW_RUN_ID": " r1 "}.items():
        monkeypatch.setenv(name, value)
    tracking = load_settings(None, {}).tracker
    assert notes(tracking, alone=True) == (
        "mlflow: run_id is r1, from MLFLOW_RUN_ID",
        "mlflow: experiment is mine, from MLFLOW_EXPERIMENT_NAME",
    )
    assert "MLFLOW_RUN_ID is not used" in notes(tracking, alone=False)[0]
    flags = load_settings(None, {"tracker.*.run_id": "other"}).tracker
    assert notes(flags, alone=True) == ("mlflow: experiment is mine, from MLFLOW_EXPERIMENT_NAME",)


@pytest.mark.parametrize("key", ["tracking_uri", "run_id", "experiment", "experiment_id", "run_name"])
def test_white_space_around_is_no_part_of_it(key: str, tmp_path: Path) -> None:
    """A text that was copied with a blank, or read from a file with its newline, is what it is without."""
    (tmp_path / "secret").write_text(" x \n")
    for text in ('" x\\t"', f'"file:{tmp_path}/secret"', f'" file:{tmp_path}/secret "'):
        assert getattr(settings_of(f"{TABLE}{key} = {text}", tmp_path), key) == "x"


def test_an_experiment_by_its_id(mlflow_uri: str, tmp_path: Path) -> None:
    """The run is made in it, and found in it again."""
    client = servers.mlflow_client(mlflow_uri)
    wanted = client.create_experiment(f"by id {tmp_path.name}")
    tracker = connect(tmp_path, f" {mlflow_uri}".strip(), experiment_id=wanted)
    assert looked(tracker)["run"].ok is None
    assert f"of id {wanted}" in looked(tracker)["run"].words
    tracker.publish(example_publication(100))
    (run,) = client.search_runs([wanted])
    again = connect(tmp_path, mlflow_uri, experiment_id=wanted)
    assert (looked(again)["run"].ok, run.info.run_id in looked(again)["run"].words) == (True, True)


def test_two_experiments_at_once(mlflow_uri: str, tmp_path: Path) -> None:
    """A name and an id of one experiment agree; of two they are refused by both, as MLflow does."""
    client = servers.mlflow_client(mlflow_uri)
    name = f"both {tmp_path.name}"
    wanted = client.create_experiment(name)
    assert looked(connect(tmp_path, mlflow_uri, experiment=name, experiment_id=wanted))["run"].ok is None
    for other in ("0", "987654321"):
        tracker = connect(tmp_path, mlflow_uri, experiment=name, experiment_id=other)
        check = looked(tracker)["run"]
        assert check.ok is False
        assert name in check.words
        assert f"the id {other}" in check.words
        with pytest.raises(DestinationDenied, match="two experiments"):
            tracker.publish(example_publication(100))


@pytest.mark.parametrize("wanted", ["987654321", "no number"])
def test_an_experiment_that_is_not_there(mlflow_uri: str, tmp_path: Path, wanted: str) -> None:
    """An id that nobody has is told with the variable and the key; none is made instead."""
    tracker = connect(tmp_path, mlflow_uri, experiment_id=wanted)
    check = looked(tracker)["run"]
    assert (check.ok, wanted in check.words) == (False, True)
    assert "MLFLOW_EXPERIMENT_ID" in str(check.remedy)
    with pytest.raises(DestinationDenied, match="no MLflow experiment"):
        tracker.publish(example_publication(100))


def test_looking_writes_nothing(mlflow_uri: str, tmp_path: Path) -> None:
    """Neither a tag nor a file nor a run nor an experiment comes of it; a mistyped run id is told by itself."""
    client = servers.mlflow_client(mlflow_uri)
    name = f"look {tmp_path.name}"
    assert looked(connect(tmp_path, mlflow_uri, experiment=name))["run"].ok is None
    assert client.get_experiment_by_name(name) is None
    run = client.create_run("0")
    assert looked(connect(tmp_path, mlflow_uri, run_id=run.info.run_id))["run"].ok is True
    assert client.get_run(run.info.run_id).data.tags == run.data.tags
    assert client.list_artifacts(run.info.run_id) == []
    check = looked(connect(tmp_path, mlflow_uri, run_id="f" * 32))["run"]
    assert (check.ok, "f" * 32 in check.words, "MLFLOW_RUN_ID" in str(check.remedy)) == (False, True, True)


# ---------------------------------------------------------------- no MLflow

Answer = tuple[int, str, dict[str, str]]
HTML = "<!doctype html><html><head><title>Sign in</title><style>b{}</style></head><body>to Example</body></html>"
NAMES_NO_RUN = {"run": {"info": {"lifecycle_stage": "active"}, "data": {}}}

STRANGE: dict[str, tuple[Answer, type[DeliveryError], tuple[str, ...]]] = {
    "a page": ((200, HTML, {}), DestinationUnavailable, ("a web page", "Sign in", "another service")),
    "nothing": ((200, "", {}), DestinationUnavailable, ("with nothing", "tracking_uri")),
    "a word": ((200, "OK", {}), DestinationUnavailable, ("with text", "OK")),
    "JSON of another service": ((200, '{"status": "up"}', {}), DestinationUnavailable, ("JSON of another", "up")),
    "a list": ((200, "[1, 2]", {}), DestinationUnavailable, ("JSON of another", "[1, 2]")),
    "JSON of the right keys and other types": ((200, '{"run": [], "experiments": 3}', {}), DestinationUnavailable, ()),
    "a run without an id": ((200, json.dumps(NAMES_NO_RUN), {}), DestinationUnavailable, ("no MLflow answers",)),
    "a page that is not found": ((404, HTML, {}), DestinationDenied, ("404", "Sign in", "tracking_uri")),
    "JSON that is not found": ((404, '{"detail": "Not Found"}', {}), DestinationDenied, ("404", "Not Found")),
    "a method that is not allowed": ((405, "no", {}), DestinationDenied, ("405",)),
    "JSON of a gateway that wants a login": (
        (401, '{"message": "who?"}', {}),
        DestinationDenied,
        ("401", "who?", "MLFLOW_TRACKING_TOKEN"),
    ),
}


@dataclass
class Strange:
    uri: str
    answer: Answer
    asked: list[tuple[str, str]] = field(default_factory=list)
    elsewhere: Answer = (200, HTML, {})
    """What is answered below /login."""


@pytest.fixture
def strange() -> Iterator[Strange]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server_state.asked.append((self.command, self.path))
            status, text, headers = server_state.elsewhere if self.path.startswith("/login") else server_state.answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(text.encode())

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server_state = Strange(f"http://127.0.0.1:{server.server_port}", (200, "", {}))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server_state
        server.shutdown()
        thread.join()


def refusals(tracker: MlflowTracker) -> list[tuple[str, str, Any]]:
    """What a publication and a look say: words, remedy, kind."""
    with pytest.raises(DeliveryError) as caught:
        tracker.publish(example_publication(100))
    (check,) = [check for check in tracker.look() if check.ok is False]
    return [(caught.value.what, caught.value.remedy, type(caught.value)), (check.words, str(check.remedy), None)]


@pytest.mark.parametrize("options", [{"run_id": "a" * 32}, {"experiment": "e"}, {"experiment_id": "7"}], ids=str)
@pytest.mark.parametrize("case", STRANGE)
def test_something_else_answers(case: str, options: dict[str, str], strange: Strange, tmp_path: Path) -> None:
    """Nothing is taken for sent, and no run is remembered; what answers is told, with what to change."""
    strange.answer, kind, words = STRANGE[case]
    tracker = connect(tmp_path, strange.uri, **options)
    for what, remedy, answered in refusals(tracker):
        assert answered in (kind, None)
        assert strange.uri in what
        assert "it is tried again" in remedy
        assert all(word in what + remedy for word in words), (what, remedy)
    assert not (tmp_path / "state").exists()
    assert not any(path.endswith("log-batch") for _, path in strange.asked)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_it_sends_on(status: int, strange: Strange, tmp_path: Path) -> None:
    """Whereto is told without its query: the server's new address to be named, or a login to be given."""
    strange.answer = (status, "", {"Location": f"{strange.uri}/login?next=token-of-mine"})
    for what, remedy, _ in refusals(connect(tmp_path, strange.uri, run_id="a" * 32)):
        assert f"it sends on to {strange.uri}/login ({status})" in what
        assert "tracking_uri" in remedy
        assert "MLFLOW_TRACKING_USERNAME" in remedy
        assert "token-of-mine" not in what + remedy


@pytest.mark.parametrize("uri", ["localhost:5000", "127.0.0.1:5000", "mlflow.example:80/path"])
def test_an_address_without_its_scheme(uri: str, tmp_path: Path) -> None:
    """MLflow takes it for a folder or for a kind of store: the address that was meant is given."""
    for what, remedy, _ in refusals(connect(tmp_path, uri)):
        assert uri in what
        assert f"http://{uri}" in remedy
    assert list(tmp_path.iterdir()) == []
