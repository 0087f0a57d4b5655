"""Settings: where they come from, who wins, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peel_agent.config import default_state_dir, load_settings, worker_environment
from peel_agent.errors import ConfigurationError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


def toml(folder: Path, text: str) -> Path:
    (folder / "peel.toml").write_text(text)
    return folder / "peel.toml"


def test_defaults() -> None:
    """Without a file there is a rule for every kind but headroom's, the default suite, and MLflow."""
    settings = load_settings(None, {})
    assert settings.tracker.use == ("mlflow",)
    assert [rule.kind for rule in settings.rules] == [
        "layer_below",
        "layer_changed",
        "layer_regressed",
        "layer_dropped",
        "layer_stalled",
        "layer_flooding",
    ]
    assert [rule.name for rule in settings.rules] == [rule.kind for rule in settings.rules]
    assert all(rule.for_checkpoints is rule.clear_checkpoints is None for rule in settings.rules)
    assert (settings.peel.maps, settings.peel.effort) == ("ends", "standard")


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of file, environment and flags decides; a flag of None was not given."""
    file = toml(tmp_path, '[peel]\neffort = "full"\n[watch]\npoll_seconds = 3\nsettle_seconds = 4\n')
    monkeypatch.setenv("PEEL__PEEL__EFFORT", "quick")
    monkeypatch.setenv("PEEL__WATCH__POLL_SECONDS", "5.5")
    settings = load_settings(file, {"peel.effort": "standard", "watch.settle_seconds": None})
    assert (settings.peel.effort, settings.watch.poll_seconds, settings.watch.settle_seconds) == ("standard", 5.5, 4.0)


def test_tracker_tables_and_rules(tmp_path: Path) -> None:
    """[tracker.NAME] tables reach their plug-in as text, [[rule]] entries become rules."""
    file = toml(
        tmp_path,
        '[tracker]\nuse = ["mlflow", "jsonl"]\n[tracker.mlflow]\nexperiment = "e"\n[tracker.jsonl]\npath = "p"\n'
        '[[rule]]\nname = "mine"\nkind = "layer_below"\nfor_checkpoints = 3\n[peel]\nmaps = [[1, 4], [2, 4]]\n',
    )
    settings = load_settings(file, {"tracker.mlflow.run_id": "r"})
    assert settings.tracker.options == {"mlflow": {"experiment": "e", "run_id": "r"}, "jsonl": {"path": "p"}}
    assert [(rule.name, rule.for_checkpoints) for rule in settings.rules] == [("mine", 3)]
    assert settings.peel.maps == ((1, 4), (2, 4))


@pytest.mark.parametrize(
    ("kind", "checkpoints"),
    [
        ("layer_below", 2),
        ("layer_changed", 1),
        ("layer_regressed", 1),
        ("layer_dropped", 2),
        ("layer_stalled", 1),
        ("layer_flooding", 1),
        ("layer_improvable", 2),
    ],
)
def test_a_rule_without_numbers_has_its_kinds(tmp_path: Path, kind: str, checkpoints: int) -> None:
    """Every kind can be configured; what a rule leaves out is the kind's own number, what it gives counts."""
    text = f'[[rule]]\nname = "a"\nkind = "{kind}"\n[[rule]]\nname = "b"\nkind = "{kind}"\n'
    first, second = load_settings(toml(tmp_path, text + "for_checkpoints = 3\nclear_checkpoints = 4\n"), {}).rules
    assert (first.raised_after, first.cleared_after) == (checkpoints, checkpoints)
    assert (second.raised_after, second.cleared_after) == (3, 4)


def test_mlflow_run_id_from_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_RUN_ID, which trainings set, names the run unless the configuration does."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "from-environment")
    assert load_settings(None, {}).tracker.options["mlflow"]["run_id"] == "from-environment"
    flags = {"tracker.mlflow.run_id": "from-flag"}
    assert load_settings(None, flags).tracker.options["mlflow"]["run_id"] == "from-flag"
    assert "mlflow" not in load_settings(None, {"tracker.use": ["jsonl"]}).tracker.options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[watch]\nsetle_seconds = 1", r"unknown key `watch.setle_seconds`(.|\n)*did you mean `settle_seconds`"),
        ("[wacth]\npath = 'x'", r"unknown key `wacth`(.|\n)*did you mean `watch`"),
        ("[health]\nlisten = ''", "`health` is not available in this version"),
        ("[engine]\nuse = 'ray'", "`engine` is not available in this version"),
        ("[watch]\nbacklog = 'every:0'", "latest, all, or every:N"),
        ("[device]\nmemory_fraction = 1.5", "above 0, at most 1"),
        ("[watch]\npoll_seconds = 'soon'", "`watch.poll_seconds` is 'soon'"),
        ("[probe]\nfit_tokens = 1.5", "`probe.fit_tokens` is 1.5"),
        ("[probe]\nfit_tokens = true", "`probe.fit_tokens` is True"),
        ("[peel]\neffort = 'all'", r"`peel.effort` is `all`(.|\n)*quick, standard, full"),
        ("[peel]\nquantities = ['headrom']", "`peel.quantities` is `headrom`"),
        ("[model.precision]\n'*.weight' = 'int1'", r"`model.precision`(.|\n)*sets like none, sign"),
        ("[model]\nprecision = 'ternary'", r"`model.precision` is 'ternary'(.|\n)*a table"),
        ("[model]\nfactory = 'a b'", "auto, or package.module:callable"),
        ("[peel]\nmaps = [['a']]", "`peel.maps`"),
        ("watch = 3", "`watch` is 3, not a table"),
        ("[[rule]]\nname = 'x'", r"\[\[rule\]\] is not complete: .*kind"),
        ("[[rule]]\nname = 'x'\nkind = 'metric'", "`rule.kind` is `metric`"),
        ("[watch", "is not valid TOML"),
        ("[rule]\nname = 'x'", r"write each rule as \[\[rule\]\]"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_below'\nfor_checkpoints = 0", r"`rule.x.for_checkpoints` is 0"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_changed'\nclear_checkpoints = -1", r"`rule.x.clear_checkpoints` is -1"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_below'\n" * 2, "two rules are called `x`"),
        ("[[rule]]\nname = 'a b(c)'\nkind = 'layer_below'", r"a rule is called `a b\(c\)`"),
        ("[tracker]\nmax_series = -1", "`tracker.max_series` is -1"),
        ("[probe]\nfit_tokens = inf", "`probe.fit_tokens` is inf"),
        ("[watch]\npoll_seconds = nan", "`watch.poll_seconds` is nan"),
        ("[device]\nselect = 'cuda'", "`device.select` is 'cuda'"),
        ("[tracker.mlflow]\ntracking_uri = '${NO_SUCH_VARIABLE}'", "NO_SUCH_VARIABLE, which is not set"),
        ("[tracker.mlflow]\ntracking_uri = 'file:/no/such/file'", "names a file that cannot be read"),
    ],
)
def test_wrong_configuration(tmp_path: Path, text: str, words: str) -> None:
    """Each mistake is named with its key and value, with what to do, and ends with exit code 2."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_settings(toml(tmp_path, text), {})
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_missing_file(tmp_path: Path) -> None:
    """A configuration file that is not there is named."""
    with pytest.raises(ConfigurationError, match=r"cannot read the configuration .*nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml", {})


def test_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret comes from the environment or a file."""
    monkeypatch.setenv("MY_URI", "http://u:secret@host")
    (tmp_path / "uri").write_text("http://v:hidden@host\n")
    for text, value in (("${MY_URI}", "http://u:secret@host"), (f"file:{tmp_path}/uri", "http://v:hidden@host")):
        settings = load_settings(None, {"tracker.mlflow.tracking_uri": text})
        assert settings.tracker.options["mlflow"]["tracking_uri"] == value


@pytest.mark.parametrize(
    ("device", "visible", "inside"),
    [("auto", "", "cpu"), ("cpu", "", "cpu"), ("cuda:2", "2", "cuda:0"), ("GPU-1b2c", "GPU-1b2c", "cuda:0")],
)
def test_worker_sees_one_device(device: str, visible: str, inside: str) -> None:
    """The child sees the named GPU and no other; on the CPU, none."""
    environment, name = worker_environment(device)
    assert (environment["CUDA_VISIBLE_DEVICES"], name) == (visible, inside)


def test_a_gpu_is_counted_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda:1` is the second of the GPUs this process may see, never one that it was not given."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert worker_environment("cuda:1")[0]["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(ConfigurationError, match="leaves 2 GPUs here"):
        worker_environment("cuda:2")


def test_tracker_options_from_the_environment_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment called 1.10 is not 1.1."""
    monkeypatch.setenv("PEEL__TRACKER__MLFLOW__EXPERIMENT", "1.10")
    assert load_settings(None, {}).tracker.options["mlflow"]["experiment"] == "1.10"


def test_state_folders_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each watched path and each destination has a state of its own: no run inherits another one's alerts or bounds."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first, second = (load_settings(None, {"tracker.mlflow.run_id": run}).tracker for run in ("r1", "r2"))
    folders: set[Any] = {
        default_state_dir(path, tracker) for path in ("/a/checkpoints", "/b/checkpoints") for tracker in (first, second)
    }
    assert len(folders) == 4
    assert all(folder.is_relative_to(tmp_path) for folder in folders)
