"""Trackers and sinks of the settings as addresses, what pins a run, and where an agent keeps its state."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from peel_agent.config import Settings, load_settings
from peel_agent.courier import Orders
from peel_agent.destinations import Address, addresses, exposed_secrets, pinned_run, sink_settings, tracker_settings
from peel_agent.errors import ConfigurationError, PluginError
from peel_agent.identity import run_key
from peel_agent.ledger import Ledger
from peel_agent.records import plain, restored
from peel_agent.state import state_dir_of
from peel_plugins.sinks.jsonl_file import JsonlSink
from peel_plugins.trackers.jsonl_file import JsonlTracker
from peel_plugins.trackers.mlflow_run import MlflowSettings, MlflowTracker


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))


def toml(folder: Path, text: str) -> Path:
    (folder / "peel.toml").write_text(text)
    return folder / "peel.toml"


def loaded(folder: Path, text: str, **flags: Any) -> Settings:
    return load_settings(toml(folder, text), {"watch.path": "/data/run", **flags})


def mlflow(settings: Settings, *, alone: bool = True) -> MlflowSettings:
    options = tracker_settings(settings.tracker, alone=alone)["mlflow"]
    assert isinstance(options, MlflowSettings)
    return options


# ---------------------------------------------------------------- a tracker's own settings


def test_tables_are_typed_by_the_plug_in(tmp_path: Path) -> None:
    """Each tracker in use has its own record; a flag goes to each tracker that has it, over the table."""
    text = '[tracker]\nuse = ["mlflow", "jsonl"]\n[tracker.jsonl]\npath = "~/p"\n'
    text += '[tracker.mlflow]\nexperiment = "e"\nrun_id = "r"\n'
    options = tracker_settings(loaded(tmp_path, text, **{"tracker.*.run_id": "flag"}).tracker, alone=True)
    assert options["mlflow"] == MlflowSettings(experiment="e", run_id="flag")
    assert options["jsonl"].path == Path.home() / "p"


def test_the_run_id_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_RUN_ID, which trainings set, names the run unless the configuration does; it cannot name several."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "from-environment")
    assert mlflow(loaded(tmp_path, "")).run_id == "from-environment"
    assert mlflow(loaded(tmp_path, "", **{"tracker.*.run_id": "from-flag"})).run_id == "from-flag"
    assert mlflow(loaded(tmp_path, '[tracker.mlflow]\nrun_id = "from-file"\n')).run_id == "from-file"
    assert mlflow(loaded(tmp_path, ""), alone=False).run_id is None
    assert set(tracker_settings(loaded(tmp_path, '[tracker]\nuse = ["jsonl"]\n').tracker, alone=True)) == {"jsonl"}


def test_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret comes from the environment or a file, when the tracker's settings are made and not before."""
    monkeypatch.setenv("MY_URI", "http://u:secret@host")
    (tmp_path / "uri").write_text("http://v:hidden@host\n")
    for text, value in (("${MY_URI}", "http://u:secret@host"), (f"file:{tmp_path}/uri", "http://v:hidden@host")):
        settings = loaded(tmp_path, f'[tracker.mlflow]\ntracking_uri = "{text}"\n')
        assert settings.tracker.options["mlflow"]["tracking_uri"] == text
        assert mlflow(settings).tracking_uri == value


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("[tracker.jsonl]\npath = 'p'", {}, r"\[tracker.jsonl\] is configured, and not in use(.|\n)*\[tracker\] use"),
        ("[tracker.mlflow]\nexperimnt = 'p'", {}, r"unknown key `tracker.mlflow.experimnt`(.|\n)*`experiment`"),
        ("[tracker]\nuse = ['mlfow']", {}, r"no plug-in `mlfow`(.|\n)*did you mean `mlflow`"),
        ("[tracker]\nuse = ['jsonl']", {"tracker.*.run_id": "r"}, r"--run-id is given, and no tracker in use has it"),
        ("[tracker]\nuse = ['jsonl']\n[tracker.jsonl]\npath = 3", {}, r"`tracker.jsonl.path` is 3(.|\n)*a path"),
        ("[tracker.mlflow]\ntracking_uri = '${NO_SUCH}'", {}, "`tracker.mlflow.tracking_uri` names .* NO_SUCH, which"),
        ("[tracker.mlflow]\ntracking_uri = 'file:/no/such'", {}, "names a file that cannot be read"),
    ],
)
def test_wrong_trackers(tmp_path: Path, text: str, flags: dict[str, Any], words: str) -> None:
    """Each mistake is named with its table and key and with what to do, and ends with exit code 2."""
    settings = loaded(tmp_path, text, **flags)
    with pytest.raises((ConfigurationError, PluginError), match=words) as caught:
        tracker_settings(settings.tracker, alone=True)
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------- addresses

BOTH = """
[tracker]
use = ["mlflow", "jsonl"]
[tracker.mlflow]
tracking_uri = "http://u:secret@host"
[[sink]]
use = "stderr"
[[sink]]
use = "jsonl"
name = "mine"
path = "/notices"
"""


def test_addresses_connect_what_is_configured(tmp_path: Path) -> None:
    """Through a courier's orders too, each is a connection to its own place; a sink's state is the agent's own."""
    settings = loaded(tmp_path, BOTH)
    connected = addresses(settings.runs[0], settings, key="k", folder=tmp_path / "runs" / "k", state_dir=tmp_path)
    orders = restored(Orders, json.loads(json.dumps(plain(Orders(tmp_path, connected)))))
    assert orders == Orders(tmp_path, connected)
    to_mlflow, to_jsonl, to_stderr, to_mine = orders.addresses
    assert [(one.kind, one.name, one.plugin) for one in orders.addresses] == [
        ("tracker", "mlflow", "mlflow"),
        ("tracker", "jsonl", "jsonl"),
        ("sink", "stderr", "stderr"),
        ("sink", "mine", "jsonl"),
    ]
    assert {(one.run, one.checkpoint_dir) for one in orders.addresses} == {("k", "/data/run")}
    assert isinstance(to_mlflow.tracker(), MlflowTracker)
    assert to_mlflow.tracker().where() == "MLflow at http://host"
    assert isinstance(to_jsonl.tracker(), JsonlTracker)
    assert to_jsonl.tracker().where() == f"publications in {tmp_path}/runs/k/publications.jsonl"
    assert to_stderr.sink().where() == "stderr"
    assert isinstance(to_mine.sink(), JsonlSink)
    assert to_mine.sink().where() == "notices in /notices"
    default = Address("sink", "s", "jsonl", {}, "k", "/data/run", to_mine.state_dir)
    assert default.sink().where() == f"notices in {tmp_path}/notices.jsonl"


def test_secrets_of_sinks_and_what_the_environment_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret may stand in a list; a field that names a variable is taken from it when the table leaves it out."""
    monkeypatch.setenv("ONE", "json://one,a")
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    (tmp_path / "two").write_text("json://two\n")
    text = f"[[sink]]\nuse = 'apprise'\nurls = ['${{ONE}}', 'file:{tmp_path}/two', 'json://three']\n"
    text += "[[sink]]\nuse = 'stderr'\n[[sink]]\nuse = 'stderr'\nname = 'plain'\njournal_stream = ''\n"
    apprise, journal, plainly = (sink_settings(sink) for sink in loaded(tmp_path, text).sinks)
    assert apprise.urls == ("json://one,a", "json://two", "json://three")
    assert (journal.journal_stream, plainly.journal_stream) == ("8:1", "")
    assert "json" not in repr(apprise)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[sink]]\nuse = 'pagr'", r"no plug-in `pagr` of kind sinks"),
        ("[[sink]]\nuse = 'jsonl'\nname = 'x'\npaht = 'p'", r"unknown key `sink.x.paht`(.|\n)*did you mean `path`"),
        ("[[sink]]\nuse = 'email'\nhost = 'h'", r"\[\[sink.email\]\] is not complete: it lacks `sender`, `to`"),
        ("[[sink]]\nuse = 'slack'\nurl = 'file:/bin/sh'", "`sink.slack.url` names a file that is not text"),
        ("[[sink]]\nuse = 'apprise'\nurls = ['${NO_SUCH}']", "`sink.apprise.urls` names .* NO_SUCH"),
        (
            "[[sink]]\nuse = 'webhook'\nurl = 'https://10.0.0.1/'",
            r"\[\[sink.webhook\]\]: 10\.0\.0\.1 is an address of a private",
        ),
        ("[[sink]]\nuse = 'stderr'\npath = 'p'", r"unknown key `sink.stderr.path`(.|\n)*known here: journal"),
    ],
)
def test_wrong_sinks(tmp_path: Path, text: str, words: str) -> None:
    """A sink's mistakes are named like a tracker's."""
    settings = loaded(tmp_path, text)
    with pytest.raises((ConfigurationError, PluginError), match=words):
        addresses(settings.runs[0], settings, key="k", folder=tmp_path, state_dir=tmp_path)


# ---------------------------------------------------------------- who is who

BASE = '[tracker]\nuse = ["mlflow"]\n[tracker.mlflow]\ntracking_uri = "http://u:old@host"\nexperiment = "e"\n'
CHANGES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a rotated password": (BASE.replace("old", "new"), {}, True),
    "another server": (BASE.replace("u:old@host", "elsewhere:5000"), {}, True),
    "a second tracker": (BASE.replace('["mlflow"]', '["mlflow", "jsonl"]'), {}, True),
    "another tracker": ('[tracker]\nuse = ["jsonl"]\n', {}, True),
    "another experiment": (BASE.replace('"e"', '"f"'), {}, True),
    "another effort": (BASE + '[peel]\neffort = "full"\n', {}, True),
    "a sink": (BASE + '[[sink]]\nuse = "stderr"\n', {}, True),
    "another run id": (BASE, {"tracker.*.run_id": "r2"}, False),
    "another place": (BASE, {"watch.path": "/data/other"}, False),
    "another place of the same name": (BASE, {"watch.path": "/elsewhere/run"}, False),
    "another name": (BASE + '[[run]]\nname = "again"\n[run.watch]\npath = "/data/run"\n', {}, False),
}


def identity(settings: Settings, file: Path | None) -> tuple[str, Path]:
    (run,) = settings.runs
    key = run_key(run.name, str(run.watch.path), pinned_run(tracker_settings(run.tracker, alone=True)))
    return key, state_dir_of(settings, file)


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_a_run_another(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password, an address, trackers and sinks may change; a place, a name and a pinned run may not.

    So it is for the key of the run in the ledger and for the folder of an agent that was given none.
    """
    text, flags, is_same = CHANGES[change]
    before = identity(loaded(tmp_path, BASE), None)
    after = identity(loaded(tmp_path, text, **flags), tmp_path / "peel.toml")
    assert (before[0] == after[0], before[1] == after[1]) == (is_same, is_same)
    assert "old" not in "".join(map(str, before))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another")
    assert identity(loaded(tmp_path, BASE), None) == before


def test_keys_are_names_of_folders() -> None:
    """Whatever a run is called, its key is one short name, and two runs have two."""
    names = ["plain", "with blank", "../../etc", "höhe/日本", "x" * 500, "", "."]
    keys = [run_key(name, place, pin) for name, place, pin in itertools.product(names, ["/a", "/b"], ["", "m.r=1"])]
    assert len(set(keys)) == len(keys)
    assert all(Path(key).name == key and len(key) < 80 and key not in (".", "..") for key in keys)


# ---------------------------------------------------------------- the state folder


def test_a_folder_that_is_named_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First what the user names, then what systemd gives, then one of our own beneath the user's."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/peel:/var/lib/other")
    assert state_dir_of(loaded(tmp_path, f'[state]\npath = "{tmp_path}/mine"\n'), None) == tmp_path / "mine"
    assert state_dir_of(loaded(tmp_path, ""), None) == Path("/var/lib/peel")
    monkeypatch.delenv("STATE_DIRECTORY")
    folder = state_dir_of(loaded(tmp_path, ""), None)
    assert folder.parent == tmp_path / "home" / "peel-agent"
    assert folder.name.startswith("run-")


def test_an_agent_of_several_runs_is_its_files(tmp_path: Path) -> None:
    """Runs come and go in a configuration file, and the folder stays; another file is another agent."""
    two = "".join(f'[[run]]\n[run.watch]\npath = "/data/{name}"\n' for name in ("a", "b"))
    three = two + '[[run]]\n[run.watch]\npath = "/data/c"\n'
    folders = set()
    for text in (two, three):
        file = toml(tmp_path, text)
        folders.add(state_dir_of(load_settings(file, {}), file))
    assert len(folders) == 1
    (folder,) = folders
    assert folder.name.startswith("peel-")
    (tmp_path / "other").mkdir()
    file = toml(tmp_path / "other", two)
    assert state_dir_of(load_settings(file, {}), file) != folder


def test_nobody_says_whose_state_is_meant() -> None:
    """`status` without a folder, a file or a directory names all three."""
    with pytest.raises(ConfigurationError, match="which agent is meant") as caught:
        state_dir_of(load_settings(None, {}), None)
    assert all(word in caught.value.remedy for word in ("--state", "-c", "directory"))


def folder_of_0_1(watched: str, use: list[str], options: dict[str, dict[str, str]], uri: str, home: Path) -> Path:
    """As version 0.1 computed it, word for word but for its names."""
    identity = json.dumps([watched, sorted(use), options, uri], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return home / "peel-agent" / f"{watched.rstrip('/').rpartition('/')[2]}-{digest}"


OF_0_1: dict[str, tuple[str, dict[str, Any], list[str], dict[str, dict[str, str]], str]] = {
    "without a file": ("", {}, ["mlflow"], {}, ""),
    "with a server": (
        BASE,
        {},
        ["mlflow"],
        {"mlflow": {"tracking_uri": "http://u:old@host", "experiment": "e"}},
        "",
    ),
    "with a run": ("", {"tracker.*.run_id": "r"}, ["mlflow"], {"mlflow": {"run_id": "r"}}, ""),
    "with MLflow's own default": ("", {}, ["mlflow"], {}, "http://default"),
    "with two trackers": (
        '[tracker]\nuse = ["mlflow", "jsonl"]\n[tracker.jsonl]\npath = "/p"\n',
        {},
        ["mlflow", "jsonl"],
        {"jsonl": {"path": "/p"}},
        "",
    ),
}


@pytest.mark.parametrize("case", OF_0_1)
def test_the_folder_of_version_0_1_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Where version 0.1 kept a state under its own name, that is used, until there is one of this version."""
    text, flags, use, options, uri = OF_0_1[case]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    settings = loaded(tmp_path, text, **flags)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "which version 0.1 did not know")
    folder = state_dir_of(settings, None)
    earlier = folder_of_0_1("/data/run", use, options, uri, tmp_path / "home")
    assert folder != earlier
    Ledger(earlier).close()
    assert state_dir_of(settings, None) == earlier
    Ledger(folder).close()
    assert state_dir_of(settings, None) == folder


SECRET_FILE = """
[tracker]
use = ["mlflow"]
[tracker.mlflow]
tracking_uri = "https://me:canary@mlflow"
[[sink]]
use = "slack"
url = "https://hooks.example/canary"
[[sink]]
use = "webhook"
url = "https://hooks.example/canary"
signing_secret = "${NAMED}"
token = "file:/run/token"
[[sink]]
use = "alertmanager"
url = "http://alertmanager.example:9093/"
[[sink]]
name = "behind a proxy"
use = "alertmanager"
url = "http://alertmanager.example:9093/canary"
"""


def test_secrets_in_a_file_that_others_may_read_are_named(tmp_path: Path) -> None:
    """Each by its key, never by its value; one that is only named is none, nor is a host and its port, nor any in one's
    own file.
    """
    file = tmp_path / "peel.toml"
    file.write_text(SECRET_FILE)
    settings = load_settings(file, {"watch.path": "/runs/mine"})
    file.chmod(0o644)
    exposed = exposed_secrets(settings, file)
    assert [words.split("`")[1] for words in exposed] == [
        "tracker.mlflow.tracking_uri",
        "sink.slack.url",
        "sink.webhook.url",
        "sink.behind a proxy.url",
    ]
    assert all("canary" not in words and "chmod 600" in words for words in exposed)
    file.chmod(0o600)
    assert exposed_secrets(settings, file) == ()
    assert exposed_secrets(settings, None) == exposed_secrets(settings, tmp_path / "gone") == ()
