"""Settings: where they come from, who wins, and what an error says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peel_agent.config import (
    EngineSettings,
    HealthSettings,
    LogSettings,
    Settings,
    SinkSettings,
    load_settings,
    see_only,
    service_manager,
    visible_gpus,
    worker_environment,
)
from peel_agent.errors import ConfigurationError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)


def toml(folder: Path, text: str) -> Path:
    (folder / "peel.toml").write_text(text)
    return folder / "peel.toml"


def test_defaults() -> None:
    """Without a file: the rules that the gallery chose and those of the watching, the default suite, MLflow."""
    settings = load_settings(None, {})
    assert settings.tracker.use == ("mlflow",)
    assert [rule.kind for rule in settings.rules] == [
        "layer_below",
        "layer_changed",
        "layer_regressed",
        "layer_dropped",
        "layer_stalled",
        "layer_flooding",
        "run_below_bound",
        "no_checkpoint",
        "agent_error",
    ]
    assert [rule.name for rule in settings.rules] == [rule.kind for rule in settings.rules]
    assert all(rule.for_checkpoints is rule.clear_checkpoints is None for rule in settings.rules)
    assert (settings.peel.maps, settings.peel.effort) == ("ends", "standard")
    assert settings == Settings()
    assert (settings.runs, settings.sinks) == ((), ())
    assert (settings.health.listen, settings.log, settings.engine.use) == (None, LogSettings("text", "info"), "local")


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of file, environment and flags decides; a flag of None was not given."""
    file = toml(tmp_path, '[peel]\neffort = "full"\n[watch]\npoll_seconds = 3\nsettle_seconds = 4\n')
    monkeypatch.setenv("PEEL__PEEL__EFFORT", "quick")
    monkeypatch.setenv("PEEL__WATCH__POLL_SECONDS", "5.5")
    settings = load_settings(file, {"peel.effort": "standard", "watch.settle_seconds": None})
    assert (settings.peel.effort, settings.watch.poll_seconds, settings.watch.settle_seconds) == ("standard", 5.5, 4.0)


def test_tracker_tables_and_rules(tmp_path: Path) -> None:
    """[tracker.NAME] tables are kept as they stand for their plug-in, [[rule]] entries become rules."""
    file = toml(
        tmp_path,
        '[tracker]\nuse = ["mlflow", "jsonl"]\n[tracker.mlflow]\nexperiment = "e"\n[tracker.jsonl]\npath = "p"\n'
        '[[rule]]\nname = "mine"\nkind = "layer_below"\nfor_checkpoints = 3\n[peel]\nmaps = [[1, 4], [2, 4]]\n',
    )
    settings = load_settings(file, {"tracker.*.run_id": "r", "tracker.*.tracking_uri": None})
    assert settings.tracker.options == {"mlflow": {"experiment": "e"}, "jsonl": {"path": "p"}}
    assert settings.tracker.flags == {"run_id": "r"}
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
        ("run_below_bound", 2),
        ("quantization_collapse", 2),
        ("no_checkpoint", 1),
        ("agent_error", 1),
        ("lag", 1),
    ],
)
def test_a_rule_without_numbers_has_its_kinds(tmp_path: Path, kind: str, checkpoints: int) -> None:
    """Every kind can be configured; what a rule leaves out is the kind's own number, what it gives counts."""
    text = f'[peel]\neffort = "full"\n[[rule]]\nname = "a"\nkind = "{kind}"\n[[rule]]\nname = "b"\nkind = "{kind}"\n'
    first, second = load_settings(toml(tmp_path, text + "for_checkpoints = 3\nclear_checkpoints = 4\n"), {}).rules
    assert (first.raised_after, first.cleared_after) == (checkpoints, checkpoints)
    assert (second.raised_after, second.cleared_after) == (3, 4)


# ---------------------------------------------------------------- runs


def test_a_path_at_the_top_level_is_one_run(tmp_path: Path) -> None:
    """Its name is the folder's, and everything else that of the top level; without a path there is none."""
    text = '[watch]\npath = "/data/my run/"\npoll_seconds = 3\n[peel]\neffort = "quick"\n[tracker]\nuse = ["jsonl"]\n'
    settings = load_settings(toml(tmp_path, text), {})
    (run,) = settings.runs
    assert (run.name, run.watch, run.peel, run.tracker) == ("my run", settings.watch, settings.peel, settings.tracker)
    assert run.rules == settings.rules
    assert load_settings(None, {"watch.path": "s3://bucket/run"}).runs[0].name == "run"
    assert load_settings(None, {}).runs == ()


RUNS = """
[watch]
poll_seconds = 3
ready_markers = ["done"]
[peel]
effort = "quick"
[tracker]
use = ["jsonl"]
max_series = 50
[tracker.jsonl]
path = "shared"
[[rule]]
name = "general"
kind = "layer_below"

[[run]]
name = "own"
[run.watch]
path = "/a"
poll_seconds = 5
[run.peel]
maps = "direct"
[run.tracker.jsonl]
path = "own"
[[run.rule]]
name = "mine"
kind = "layer_changed"

[[run]]
[run.watch]
path = "/b/plain"
"""


def test_runs_have_what_is_theirs_over_what_is_common(tmp_path: Path) -> None:
    """A [[run]] is laid over the top level key by key; rules, a list, as a whole; what it leaves out is common."""
    special, plain = load_settings(toml(tmp_path, RUNS), {}).runs
    assert (special.name, plain.name) == ("own", "plain")
    assert [(run.watch.path, run.watch.poll_seconds, run.watch.ready_markers) for run in (special, plain)] == [
        ("/a", 5.0, ("done",)),
        ("/b/plain", 3.0, ("done",)),
    ]
    assert [(run.peel.effort, run.peel.maps) for run in (special, plain)] == [("quick", "direct"), ("quick", "ends")]
    assert [run.tracker.options["jsonl"]["path"] for run in (special, plain)] == ["own", "shared"]
    assert [run.tracker.max_series for run in (special, plain)] == [50, 50]
    assert [[rule.name for rule in run.rules] for run in (special, plain)] == [["mine"], ["general"]]


@pytest.mark.parametrize("text", ["margin,bounds", "margin, bounds", " margin , bounds "])
def test_a_list_in_one_text_may_have_spaces(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are parted by commas, with spaces or without, in a flag and in the environment."""
    assert load_settings(None, {"peel.quantities": text}).peel.quantities == ("margin", "bounds")
    monkeypatch.setenv("PEEL__PEEL__QUANTITIES", text)
    assert load_settings(None, {}).peel.quantities == ("margin", "bounds")


def test_a_mistyped_variable_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sees the message looks in the environment, not in a file that has no such key."""
    monkeypatch.setenv("PEEL__WATCH__POL_SECONDS", "7")
    with pytest.raises(ConfigurationError, match="environment variable PEEL__WATCH__POL_SECONDS") as caught:
        load_settings(None, {})
    assert "did you mean PEEL__WATCH__POLL_SECONDS?" in str(caught.value.remedy)


def test_flags_and_the_environment_are_common_to_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change the top level; a run that says otherwise keeps its own."""
    monkeypatch.setenv("PEEL__WATCH__POLL_SECONDS", "7")
    runs = load_settings(toml(tmp_path, RUNS), {"peel.effort": "full"}).runs
    assert [run.watch.poll_seconds for run in runs] == [5.0, 7.0]
    assert [run.peel.effort for run in runs] == ["full", "full"]


@pytest.mark.parametrize(
    ("common", "own", "variable", "kept"),
    [
        (None, None, None, (None, None)),
        (0, None, None, (0.0, 0.0)),
        (20, 1.5, None, (1.5, 20.0)),
        (20, None, "0", (0.0, 0.0)),
        (20, 3, "1000000", (3.0, 1e6)),
    ],
)
def test_what_stays_free_of_a_disk(
    common: float | None,
    own: float | None,
    variable: str | None,
    kept: tuple[float | None, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each run has its own, or what is common to all; the environment changes what is common, beside [[run]] too."""
    lines = ["" if gib is None else f"keep_free_gb = {gib}\n" for gib in (common, own)]
    text = f"[watch]\n{lines[0]}[[run]]\n[run.watch]\npath = '/a'\n{lines[1]}[[run]]\n[run.watch]\npath = '/b'\n"
    if variable is not None:
        monkeypatch.setenv("PEEL__WATCH__KEEP_FREE_GB", variable)
    assert tuple(run.watch.keep_free_gb for run in load_settings(toml(tmp_path, text), {}).runs) == kept


# ---------------------------------------------------------------- sinks, health, log, engine


def test_sinks_keep_their_own_keys(tmp_path: Path) -> None:
    """`use` names the plug-in, `name` tells two of one kind apart, everything else is the plug-in's."""
    text = '[[sink]]\nuse = "stderr"\n[[sink]]\nuse = "jsonl"\nname = "mine"\npath = "p"\nevery = 3\n'
    assert load_settings(toml(tmp_path, text), {}).sinks == (
        SinkSettings("stderr", "stderr", {}),
        SinkSettings("jsonl", "mine", {"path": "p", "every": 3}),
    )


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ('[health]\nlisten = "0.0.0.0:9000"', "health", HealthSettings("0.0.0.0:9000")),
        ('[health]\nlisten = ""', "health", HealthSettings("")),
        ('[log]\nformat = "json"\nlevel = "error"', "log", LogSettings("json", "error")),
        ('[engine]\nuse = "ray"', "engine", EngineSettings("ray")),
    ],
)
def test_sections_of_the_agent(tmp_path: Path, text: str, name: str, expected: object) -> None:
    """What concerns the agent as a whole is read as it is written."""
    assert getattr(load_settings(toml(tmp_path, text), {}), name) == expected


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[watch]\nsetle_seconds = 1", r"unknown key `watch.setle_seconds`(.|\n)*did you mean `settle_seconds`"),
        ("[wacth]\npath = 'x'", r"unknown key `wacth`(.|\n)*did you mean `watch`"),
        ("[health]\nlisten_on = ''", r"unknown key `health.listen_on`(.|\n)*did you mean `listen`"),
        ("[log]\nformat = 'xml'", r"`log.format` is `xml`(.|\n)*text, json"),
        ("[log]\nlevel = 'debug'", r"`log.level` is `debug`(.|\n)*info, warning, error"),
        ("[[sink]]\nname = 'x'", r"a \[\[sink\]\] does not say what it is(.|\n)*use ="),
        ("[sink]\nuse = 'stderr'", r"write each sink as \[\[sink\]\]"),
        ("[[sink]]\nuse = 'stderr'\n" * 2, r"two sinks are called `stderr`(.|\n)*a name of its own"),
        ("[run]\nname = 'x'", r"write each run as \[\[run\]\]"),
        ("[[run]]\nname = 'x'", r"\[\[run\]\] x names no directory(.|\n)*\[run.watch\] path"),
        ("[[run]]\n[run.device]\nnice = 3", r"unknown key `run.device`"),
        ("[[run]]\nnam = 'x'", r"unknown key `run.nam`(.|\n)*did you mean `name`"),
        ("[[run]]\n[run.watch]\npath = '/a/x'\n[[run]]\n[run.watch]\npath = '/b/x'", "two runs are called `x`"),
        ("[[run]]\n[run.watch]\npath = 'x'\npoll_seconds = -1", "`watch.poll_seconds` is -1"),
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
        ("[[rule]]\nname = 'x'\nkind = 'metrics'", "`rule.kind` is `metrics`"),
        ("[watch", "is not valid TOML"),
        ("[rule]\nname = 'x'", r"write each rule as \[\[rule\]\]"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_below'\nfor_checkpoints = 0", r"`rule.x.for_checkpoints` is 0"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_changed'\nclear_checkpoints = -1", r"`rule.x.clear_checkpoints` is -1"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_below'\n" * 2, "two rules are called `x`"),
        ("[[rule]]\nname = 'x'\nkind = 'lag'\nrepeat_checkpoints = 0", r"`rule.x.repeat_checkpoints` is 0"),
        ("[[rule]]\nname = 'x'\nkind = 'metric'\nmetric = 'peel/loss'", r"has no threshold(.|\n)*compared with"),
        ("[[rule]]\nname = 'x'\nkind = 'metric'\nthreshold = 1", "does not say which metric"),
        ("[[rule]]\nname = 'x'\nkind = 'lag'\nmetric = 'peel/loss'", "of kind lag names a metric"),
        (
            "[[rule]]\nname = 'x'\nkind = 'metric'\nthreshold = 1\nmetric = 'peel/los'",
            r"metric `peel/los`, which no checkpoint has(.|\n)*did you mean `peel/loss`",
        ),
        (
            "[[rule]]\nname = 'x'\nkind = 'metric'\nthreshold = 1\nmetric = 'peel/margin/L3'",
            r"`peel/margin/L3`(.|\n)*did you mean `peel/margin/L003`",
        ),
        (
            "[[rule]]\nname = 'x'\nkind = 'metric'\nthreshold = 1\nmetric = 'peel/alerts_firing'",
            r"`peel/alerts_firing`, which no checkpoint has",
        ),
        (
            "[peel]\neffort = 'quick'\n[[rule]]\nname = 'x'\nkind = 'metric'\nthreshold = 1\nmetric = 'peel/gap'",
            r"reads bounds, and only margin is(.|\n)*effort = \"standard\"",
        ),
        (
            "[[rule]]\nname = 'x'\nkind = 'metric'\nthreshold = 1\nmetric = 'peel/headroom/L012'",
            r"reads headroom, and only margin, bounds(.|\n)*effort = \"full\"",
        ),
        ("[[rule]]\nname = 'x'\nkind = 'metric'\nop = '='", r"`rule.op` is `=`(.|\n)*<, <=, >, >="),
        ("[[rule]]\nname = 'x'\nkind = 'no_checkpoint'\nthreshold = -5", r"threshold` is -5(.|\n)*0 or more: seconds"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_changed'\nthreshold = 0.5", r"threshold` is 0.5(.|\n)*1 or more"),
        ("[[rule]]\nname = 'x'\nkind = 'layer_flooding'\nthreshold = 2", r"threshold` is 2(.|\n)*0 to 1"),
        ("[[rule]]\nname = 'x'\nkind = 'lag'\nsinks = ['mail']", r"told to a sink `mail`(.|\n)*there is none"),
        (
            "[[sink]]\nuse = 'stderr'\n[[rule]]\nname = 'x'\nkind = 'lag'\nsinks = ['mail']",
            r"told to a sink `mail`(.|\n)*there are: stderr",
        ),
        (
            "[[sink]]\nuse = 'stderr'\n[[rule]]\nname = 'x'\nkind = 'lag'\nsinks = []",
            "no rule tells the sink `stderr` anything",
        ),
        (
            "[[rule]]\nname = 'x'\nkind = 'layer_improvable'",
            r"reads headroom, and only margin, bounds(.|\n)*effort = \"full\"",
        ),
        (
            "[peel]\neffort = 'quick'\n[[rule]]\nname = 'x'\nkind = 'run_below_bound'",
            r"reads bounds, and only margin is(.|\n)*effort = \"standard\"",
        ),
        ("[[rule]]\nname = 'a b(c)'\nkind = 'layer_below'", r"a rule is called `a b\(c\)`"),
        ("[tracker]\nmax_series = -1", "`tracker.max_series` is -1"),
        ("[probe]\nfit_tokens = inf", "`probe.fit_tokens` is inf"),
        ("[watch]\npoll_seconds = nan", "`watch.poll_seconds` is nan"),
        ("[watch]\nkeep_free_gb = -1", r"`watch.keep_free_gb` is -1(.|\n)*0 or more"),
        ("[watch]\nkeep_free_gb = inf", "`watch.keep_free_gb` is inf"),
        ("[[run]]\n[run.watch]\npath = 'x'\nkeep_free_gb = -0.5", "`watch.keep_free_gb` is -0.5"),
        ("[device]\nselect = 'cuda'", "`device.select` is 'cuda'"),
    ],
)
def test_wrong_configuration(tmp_path: Path, text: str, words: str) -> None:
    """Each mistake is named with its key and value, with what to do, and ends with exit code 2."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_settings(toml(tmp_path, text), {})
    assert caught.value.exit_code == 2
    assert caught.value.remedy


WRONG_TYPES = {
    "watch.path": [True, ["a"], {"a": 1}],
    "watch.format": [True, ["torch"]],
    "watch.settle_seconds": [True, "soon", ["1"]],
    "watch.keep_free_gb": [True, "a tenth", ["1"]],
    "watch.ready_markers": [True, {"a": 1}, [True], [["a"]]],
    "model.factory": [True],
    "probe.path": [True, 3, ["a"]],
    "probe.fit_tokens": [True, 1.5, "many"],
    "peel.effort": [True],
    "peel.quantities": [True, [True]],
    "peel.maps": [True, [[True]]],
    "peel.time_budget_seconds": [True, "long"],
    "peel.budget_passes": [True, "many"],
    "device.memory_fraction": [True, "half"],
    "device.nice": [True, 0.5],
    "tracker.max_series": [True],
    "state.path": [True, 3],
    "health.listen": [False, ["127.0.0.1:1"]],
    "log.format": [True],
}


@pytest.mark.parametrize("key", WRONG_TYPES)
def test_a_value_of_another_type(key: str) -> None:
    """No key takes a truth value for a number or for text, nor a list or a table for either: it is named."""
    for value in WRONG_TYPES[key]:
        with pytest.raises(ConfigurationError, match=f"`{key}` is ") as caught:
            load_settings(None, {key: value})
        assert caught.value.remedy.startswith("it must be ")


def test_a_name_of_digits_is_text(tmp_path: Path) -> None:
    """An id or a name may be all digits, and nobody quotes those."""
    text = '[tracker.mlflow]\nrun_id = 7\n[[run]]\nname = 3\n[run.watch]\npath = "/data"\n'
    (run,) = load_settings(toml(tmp_path, text), {}).runs
    assert run.name == "3"


def test_missing_file(tmp_path: Path) -> None:
    """A configuration file that is not there is named."""
    with pytest.raises(ConfigurationError, match=r"cannot read the configuration .*nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml", {})


# ---------------------------------------------------------------- the environment


def test_a_worker_sees_the_devices_of_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's environment is ours but for the GPUs, whatever this process may see; ours stays."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("OF_THE_USER", "kept")
    for visible in ("", "GPU-1b2c", "MIG-3d"):
        environment = worker_environment(visible)
        assert environment == {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus() == "4,5"
    see_only("GPU-1b2c")
    assert visible_gpus() == "GPU-1b2c"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() is None


def test_what_systemd_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it wants to be told, and how often; nothing where nobody asks."""
    assert service_manager() == (None, None)
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert service_manager() == ("/run/notify", "30000000")


def test_tracker_options_from_the_environment_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment called 1.10 is not 1.1."""
    monkeypatch.setenv("PEEL__TRACKER__MLFLOW__EXPERIMENT", "1.10")
    assert load_settings(None, {}).tracker.options["mlflow"]["experiment"] == "1.10"
