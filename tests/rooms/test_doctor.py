"""What `peel-agent doctor` looks at: real folders, real servers, a small model."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peel_agent import registry
from peel_agent.config import (
    DeviceSettings,
    EngineSettings,
    HealthSettings,
    RunSettings,
    SinkSettings,
    TrackerSettings,
    WatchSettings,
    load_settings,
)
from peel_agent.doctor import configuration_text, examination, examine, machine, watched_place
from peel_agent.doctor import folder as folder_module
from peel_agent.doctor.configuration import read_configuration
from peel_agent.doctor.destinations import check_sinks, check_trackers
from peel_agent.doctor.folder import WatchedPlace
from peel_agent.doctor.model_child import answered
from peel_agent.doctor.places import check_pins, check_place, check_state
from peel_agent.errors import ConfigurationError
from peel_agent.ledger import Ledger
from peel_agent.pipeline import locate
from peel_agent.records import Check, Claim, Listing, ModelSettings, ProbeSettings
from peel_agent.testing import trackers as kit
from peel_agent.watch import Reserve
from peel_agent.watch.nearby import nearby, of_folder
from peel_plugins.sinks.jsonl_file import JsonlSink
from peel_plugins.trackers import jsonl_file, mlflow_run
from tests import nvml, servers, zoo
from tests.nvml import Gpu
from tests.receivers import http_receiver
from tests.rooms.test_watch_scan import Renamed, write_checkpoint

mlflow_uri = servers.mlflow_uri
FORMATS = registry.formats()
opens_a_store = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama as a Trainer's checkpoint, not to be written to."""
    return zoo.save(zoo.build("llama", steps=1), tmp_path_factory.mktemp("saved"), step=10)


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A run's folder with that checkpoint, and a probe beside it."""
    shutil.copytree(saved, tmp_path / "run" / saved.name)
    np.save(tmp_path / "probe.npy", zoo.token_ids(400, 1))
    return tmp_path / "run"


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    """The checks by what they are of; one that is wrong, or could not be told, has a remedy."""
    by_what = {}
    for check in checks:
        assert check.words
        assert check.ok or check.remedy, check
        by_what[check.what] = check
    return by_what


# ---------------------------------------------------------------- what is nearby


def too_high(root: Path) -> None:
    for step in (5, 10):
        write_checkpoint(root / "exp1" / "checkpoints" / f"checkpoint-{step}", step)
    write_checkpoint(root / "exp2" / "checkpoint-7", 7)


def adapter(root: Path) -> None:
    (root / "checkpoint-5").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "checkpoint-5" / name).write_text("{}")


def adapter_below(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    adapter(root / "a" / "b")


def linked(root: Path) -> None:
    write_checkpoint(root.parent / "outside" / "checkpoint-3", 3)
    (root.parent / "current").symlink_to(root.parent / "outside")
    (root / "all").symlink_to(root.parent / "outside")
    (root / "latest").symlink_to(root.parent / "current")
    (root / "last.pt").symlink_to(root.parent / "outside" / "checkpoint-3" / "model.safetensors")


def staged(root: Path) -> None:
    write_checkpoint(root / "tmp-checkpoint-5")


def others(root: Path) -> None:
    (root / "logs").mkdir()
    (root / "notes\x1b[31m.txt").write_text("x")


class TestNearby:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (too_high, ["exp1/checkpoints there are 2 checkpoints (checkpoint-10, checkpoint-5)", "exp2 there is a"]),
            (adapter_below, ["a/b there is a checkpoint (checkpoint-5)"]),
            (
                linked,
                [
                    "outside, which is no checkpoint: give that folder",
                    "latest is a link to",
                    "which is itself a link, and one step is followed: give the folder that it names",
                    "which is no folder, and only those to folders are followed",
                ],
            ),
            (staged, ["tmp-checkpoint-5 has the name of a checkpoint that is still being put together"]),
            (others, ["holds 2 entries (logs/, notes\\x1b[31m.txt), and no checkpoint", "transformers"]),
            (lambda root: None, []),
        ],
        ids=["too high", "adapter below", "link", "staged", "others", "empty"],
    )
    def test_it_says_what_is_there(self, make: Callable[[Path], None], said: list[str], tmp_path: Path) -> None:
        """Each mistake has a sentence that names the place; an empty folder has none."""
        (tmp_path / "run").mkdir()
        make(tmp_path / "run")
        sentences = nearby(of_folder(tmp_path / "run"), str(tmp_path / "run"), FORMATS)
        assert bool(sentences) == bool(said)
        for part in said:
            assert part in " | ".join(sentences)
        assert all(sentence.isprintable() for sentence in sentences)

    def test_a_checkpoint_in_the_making_is_no_mistake(self, tmp_path: Path) -> None:
        """A folder with checkpoint-5, empty as yet, is not called one without checkpoints."""
        (tmp_path / "checkpoint-5").mkdir()
        assert nearby(of_folder(tmp_path), str(tmp_path), FORMATS) == ()

    def test_it_looks_nowhere_outside(self, tmp_path: Path) -> None:
        """Links are named, and nothing behind them is looked at; a link to itself ends nothing."""
        looked: list[Path] = []

        class Spy(Renamed):
            def claim(self, listing: Listing) -> Claim | None:
                looked.append(listing.path)  # type: ignore[attr-defined]
                return None

        too_high(tmp_path / "outside")
        root = tmp_path / "run"
        (root / "a" / "b").mkdir(parents=True)
        (root / "a" / "b" / "out").symlink_to(tmp_path / "outside")
        (root / "loop").symlink_to(root)
        assert any("loop is a link" in sentence for sentence in nearby(of_folder(root), str(root), [Spy()]))
        assert {path.relative_to(root).as_posix() for path in looked} == {".", "a", "a/b"} - {"."}

    def test_it_is_bounded(self, tmp_path: Path) -> None:
        """Of many mistakes six sentences are said, and a large tree is not looked through to its end."""
        for number in range(30):
            write_checkpoint(tmp_path / f"run{number:03}" / "checkpoint-5", 5)
        sentences = nearby(of_folder(tmp_path), str(tmp_path), FORMATS)
        assert (len(sentences), sentences[-1]) == (6, "and 25 more such places")
        wide = tmp_path / "run000" / "wide"
        wide.mkdir()
        for number in range(3000):
            (wide / f"{number}.txt").touch()
        asked: list[Listing] = []

        class Counting(Renamed):
            def claim(self, listing: Listing) -> Claim | None:
                asked.append(listing)
                return None

        nearby(of_folder(tmp_path), str(tmp_path), [Counting()])
        assert len(asked) < 2 * 2000 + 100

    def test_a_folder_that_is_gone(self, tmp_path: Path) -> None:
        """Nothing is said of it, and nothing raised."""
        assert nearby(of_folder(tmp_path / "gone"), str(tmp_path / "gone"), FORMATS) == ()


# ---------------------------------------------------------------- the configuration


class TestConfiguration:
    @pytest.mark.parametrize(
        ("text", "fault", "place"),
        [
            ('[watch]\npath = "{root}"\npoll_secnds = 5', "unknown key `watch.poll_secnds`", True),
            ('[watch]\npath = "{root}"\n[probe]\nfit_tokens = "many"', "`probe.fit_tokens` is 'many'", True),
            ('[watch]\npath = "{root}"\n[[rule]]\nname = "a"\nkind = "no_such"', "`rule.kind` is `no_such`", True),
            ('[watch]\npath = "{root}"\n[wach]\npath = "x"', "unknown key `wach`", True),
            ('[[run]]\nname = "a"\n[run.watch]\npath = "{root}"\n[[run]]\nname = "b"', "names no directory", True),
            ('[watch]\npath = "{root}"\nsettle_seconds = -1', "`watch.settle_seconds` is -1", True),
            ('[watch\npath = "{root}"', "not valid TOML", False),
            ("\x00\xff", "not valid TOML", False),
        ],
    )
    def test_a_fault_is_named_and_the_rest_is_used(self, text: str, fault: str, place: bool, tmp_path: Path) -> None:
        """Each fault has its check with a remedy; what is right in the same file is looked at all the same."""
        file = tmp_path / "peel.toml"
        file.write_text(text.replace("{root}", str(tmp_path)), encoding="latin-1")
        settings, checks = read_configuration(file, {"probe.path": "p.npy"})
        (check,) = checks
        assert (check.ok, bool(check.remedy)) == (False, True)
        assert fault in check.words
        assert [run.watch.path for run in settings.runs] == ([str(tmp_path)] if place else [])
        assert settings.probe.path == Path("p.npy")

    def test_two_faults_are_both_named(self, tmp_path: Path) -> None:
        """One fault does not hide another, of a flag and of the environment too."""
        (tmp_path / "peel.toml").write_text('[peel]\neffort = "more"\n[log]\nlevel = "loud"')
        settings, checks = read_configuration(tmp_path / "peel.toml", {"device.select": "gpu", "watch.path": "."})
        assert [check.words.split("`")[1] for check in checks] == ["peel.effort", "log.level", "device.select"]
        assert [run.watch.path for run in settings.runs] == [str(Path.cwd())]

    def test_a_fault_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A variable that names no key is told, once."""
        monkeypatch.setenv("PEEL__WATCH__PACE", "5")
        _, checks = read_configuration(None, {"watch.path": "."})
        assert [("PEEL__WATCH__PACE" in check.words, check.ok) for check in checks] == [(True, False)]

    def test_the_environment_counts_beside_a_fault(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As without one it is over the file and under the flags, also in a table that the file has."""
        (tmp_path / "peel.toml").write_text(
            f'[watch]\npath = "{tmp_path}"\npoll_seconds = 3\nsettle_seconds = 4\n[peel]\neffrt = "quick"\n'
        )
        for key, value in (("KEEP_FREE_GB", "0"), ("POLL_SECONDS", "5"), ("SETTLE_SECONDS", "6")):
            monkeypatch.setenv(f"PEEL__WATCH__{key}", value)
        settings, checks = read_configuration(tmp_path / "peel.toml", {"watch.settle_seconds": 7})
        (run,) = settings.runs
        assert [check.ok for check in checks] == [False]
        assert (run.watch.keep_free_gb, run.watch.poll_seconds, run.watch.settle_seconds) == (0.0, 5.0, 7.0)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        """The path is named, and flags count."""
        settings, checks = read_configuration(tmp_path / "no.toml", {"watch.path": str(tmp_path)})
        assert [check.ok for check in checks] == [False]
        assert "no.toml" in checks[0].words
        assert len(settings.runs) == 1

    def test_nothing_to_watch(self) -> None:
        """Settings without a directory are wrong: there is nothing to do."""
        _, (check,) = read_configuration(None, {})
        assert check.ok is False
        assert "no directory to watch" in check.words


# ---------------------------------------------------------------- the machine


class TestMachine:
    @pytest.mark.parametrize(
        ("requirement", "words"),
        [
            ("torch>=99.1", "older than 99.1"),
            ("no-such-package>=1", "no-such-package is not installed"),
            ("torch>=2.10", None),
            ("numpy", None),
        ],
    )
    def test_versions(self, requirement: str, words: str | None) -> None:
        """A library that is missing or too old is named, with the command that mends it."""
        check = machine._fault_of(requirement)
        assert (check is None) == (words is None)
        if check is not None and words is not None:
            assert words in check.words
            assert check.remedy == f'pip install "{requirement}"'

    def test_libraries(self) -> None:
        """Here all is as needed, and torch was imported: by a child."""
        (check,) = machine.check_libraries()
        assert check.ok
        assert "torch 2.13.0" in check.words

    @pytest.mark.parametrize(
        ("watches", "instances", "low"), [(65536, 128, []), (100, 128, ["max_user_watches"]), (65536, 1, ["instances"])]
    )
    def test_inotify(self, watches: int, instances: int, low: list[str], tmp_path: Path) -> None:
        """A limit that is low is named with the command that raises it."""
        (tmp_path / "max_user_watches").write_text(f"{watches}\n")
        (tmp_path / "max_user_instances").write_text(f"{instances}\n")
        check = by_name(machine.check_limits(DeviceSettings(), tmp_path))["inotify"]
        assert check.ok == (not low)
        for name in low:
            assert name in str(check.remedy)
        unknown = by_name(machine.check_limits(DeviceSettings(), tmp_path / "none"))["inotify"]
        assert unknown.ok is None

    def test_memory(self) -> None:
        """A share that no worker can live on is wrong."""
        assert machine._memory(0.5, 64 * 2**30, 60 * 2**30).ok
        check = machine._memory(0.01, 64 * 2**30, 60 * 2**30)
        assert check.ok is False
        assert "memory_fraction" in str(check.remedy)

    def test_health_endpoint(self, tmp_path: Path) -> None:
        """A port in use is wrong, unless it is the running agent's; an address that is none is named."""
        with servers.silent_server(60) as (port, _):
            with pytest.raises(ConfigurationError, match="in use by another process"):
                list(machine.check_health(HealthSettings(f"127.0.0.1:{port}"), tmp_path))
            ledger = Ledger(tmp_path)
            (check,) = machine.check_health(HealthSettings(f"127.0.0.1:{port}"), tmp_path)
            ledger.close()
        assert (check.ok, "running agent" in check.words) == (None, True)
        (check,) = machine.check_health(HealthSettings(f"127.0.0.1:{servers.free_port()}"), tmp_path)
        assert check.ok
        assert list(machine.check_health(HealthSettings(), None)) == []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


class TestDevice:
    @pytest.fixture
    def gpus(self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nvml.Machine:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return nvml.machine(library, tmp_path, monkeypatch)

    @pytest.mark.parametrize(
        ("select", "ok", "words"),
        [
            ("cpu", True, "the CPU, as [device] select says"),
            ("auto", True, "GPU 0 (H100, GPU-busy): process 77 computes on it; GPU 1 (H100, GPU-free): free"),
            ("cuda:1", True, "GPU 1 (H100, GPU-free), as [device] select says, is free"),
            ("cuda:0", False, "is not free: process 77 computes on it"),
            ("cuda:7", False, "cuda:7"),
        ],
    )
    def test_two_gpus(self, select: str, ok: bool, words: str, gpus: nvml.Machine) -> None:
        """What is chosen, and why the others are not; a GPU that is named and busy, or not there, is wrong."""
        gpus.write(Gpu("GPU-busy", bus=1, pids=(77,)), Gpu("GPU-free", bus=2))
        check = by_name(machine.check_device(DeviceSettings(select)))["device"]
        assert check.ok is ok
        assert words in check.words

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without NVIDIA's library `auto` is the CPU, and it says why."""
        nvml.without_library(monkeypatch)
        check = by_name(machine.check_device(DeviceSettings()))["device"]
        assert check.ok
        assert "no NVIDIA driver" in check.words

    def test_a_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With an engine that leases its own devices it says what is asked of it; settings that cannot be are wrong."""
        monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
        check = by_name(machine.check_device(DeviceSettings("cuda:7"), EngineSettings("ray")))["device"]
        assert check.ok
        assert "the Ray cluster, not asked from here: [engine.ray] asks for 1 CPU" in check.words
        with pytest.raises(ConfigurationError, match="at least 1"):
            list(machine.check_device(DeviceSettings(), EngineSettings("ray", {"ray": {"at_once": 0}})))


# ---------------------------------------------------------------- places


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's work is done here: this process has imported torch, which takes a child seconds."""
    monkeypatch.setattr(folder_module, "ask_child", lambda request: answered(json.loads(json.dumps(request))))


def run_of(root: Path | str, **more: Any) -> RunSettings:
    return RunSettings("run", WatchSettings(path=str(root), **more.pop("watch", {})), **more)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


class TestPlace:
    def test_all_is_well(self, root: Path, tmp_path: Path) -> None:
        """A run with a whole checkpoint and a probe that suits it passes, and nothing is left behind."""
        before = snapshot(tmp_path)
        run = run_of(root, probe=ProbeSettings(path=tmp_path / "probe.npy"))
        checks = by_name(check_place(run, tmp_path / "state" / "deep", "a: ", time.time))
        assert {name: check.ok for name, check in checks.items()} == dict.fromkeys(
            [f"a: {w}" for w in ("watched place", "file system events", "clock", "model", "probe", "pins", "space")],
            True,
        )
        assert "checkpoint-10 (transformers, step 10)" in checks["a: watched place"].words
        assert "llama, 4 blocks, width 16, vocabulary 19, context 32" in checks["a: model"].words
        assert "in sequences of 12" in checks["a: probe"].words
        assert snapshot(tmp_path) == before

    @pytest.mark.usefixtures("in_process")
    @pytest.mark.parametrize(
        ("probe", "words"),
        [
            (np.full((400, 12), 19), "the model's vocabulary is 19"),
            (np.zeros((400, 64), int), "whose context is 32"),
            (np.zeros((9, 12), int), "too few for an interval"),
            (np.zeros((400, 12)), "float64"),
            (None, "no probe is named"),
        ],
        ids=["vocabulary", "context", "too few", "type", "none"],
    )
    def test_a_probe_that_does_not_suit_the_model(self, probe: Any, words: str, root: Path, tmp_path: Path) -> None:
        """What a worker would say hours later is said now, beside a model that is fine."""
        settings = ProbeSettings()
        if probe is not None:
            np.save(tmp_path / "other.npy", probe)
            settings = ProbeSettings(path=tmp_path / "other.npy")
        checks = by_name(check_place(run_of(root, probe=settings), tmp_path, "", time.time))
        assert checks["model"].ok
        assert checks["probe"].ok is False
        assert words in checks["probe"].words

    @pytest.mark.usefixtures("in_process")
    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda config: config | {"model_type": "no_such"}, "no family plug-in covers model_type `no_such`"),
            (lambda config: config | {"hidden_size": 32}, "the weights do not fit config.json"),
            (lambda config: config | {"num_hidden_layers": 10**9}, "1,000,000,000 blocks"),
        ],
        ids=["family", "width", "hostile"],
    )
    def test_a_model_that_cannot_be_opened(self, spoil: Any, words: str, root: Path, tmp_path: Path) -> None:
        """The model's own fault is told, and the probe is looked at as far as it goes."""
        config = root / "checkpoint-10" / "config.json"
        config.write_text(json.dumps(spoil(json.loads(config.read_text()))))
        run = run_of(root, probe=ProbeSettings(path=tmp_path / "probe.npy"), model=ModelSettings())
        checks = by_name(check_place(run, tmp_path, "", time.time))
        assert (checks["model"].ok, checks["probe"].ok) == (False, None)
        assert words in checks["model"].words

    @pytest.mark.parametrize(
        ("make", "ok", "words"),
        [
            (too_high, False, "too deep to be seen"),
            (adapter, False, "it is not known what adapter of PEFT this is"),
            (lambda root: None, None, "is empty as yet"),
            (others, None, "holds 2 entries"),
            (lambda root: (root / "checkpoint-5").mkdir(), None, "nothing whole"),
            (lambda root: (root / "model.gguf").write_text("x"), False, "a GGUF file of llama.cpp"),
            (lambda root: root.rmdir(), False, "is no directory"),
        ],
        ids=["too high", "adapter", "empty", "logs", "in the making", "declined", "gone"],
    )
    def test_no_checkpoint(self, make: Any, ok: bool | None, words: str, tmp_path: Path) -> None:
        """Why nothing is found is said; an empty folder, or a first checkpoint in the making, is not wrong."""
        (tmp_path / "run").mkdir()
        make(tmp_path / "run")
        check = by_name(check_place(run_of(tmp_path / "run"), tmp_path, "", time.time))["watched place"]
        assert check.ok is ok
        assert words in check.words

    def test_markers_count(self, root: Path, tmp_path: Path) -> None:
        """A checkpoint without its marker is not whole here either."""
        run = run_of(root, watch={"ready_markers": ("STABLE",)})
        check = by_name(check_place(run, tmp_path, "", time.time))["watched place"]
        assert (check.ok, "waits for STABLE" in check.words) == (None, True)

    @pytest.mark.parametrize(("skew", "words"), [(600.0, "600 s behind"), (-600.0, "600 s ahead of")])
    def test_a_clock_that_is_wrong(self, skew: float, words: str, tmp_path: Path) -> None:
        """A file system whose time is not this machine's is told, with by how much."""
        (tmp_path / "run").mkdir()
        checks = by_name(check_place(run_of(tmp_path / "run"), tmp_path, "", lambda: time.time() + skew))
        assert checks["clock"].ok is False
        assert words in checks["clock"].words

    def test_checkpoints_that_cannot_be_held(self, root: Path, tmp_path: Path) -> None:
        """Where no link can be made, a checkpoint that waits may be lost: that is wrong. Nothing is left behind."""
        (tmp_path / "elsewhere").mkdir()
        other = Path("/dev/shm")
        assert other.stat().st_dev != root.stat().st_dev
        state = other / f"doctor-test-{os.getpid()}"
        newest = locate(root / "checkpoint-10")
        assert by_name(check_pins(root, newest, state, "", Reserve()))["pins"].ok
        assert sorted(path.name for path in root.iterdir()) == ["checkpoint-10"]
        (root / "_peel_agent_pins").symlink_to(tmp_path / "elsewhere")  # which the agent does not follow
        check = by_name(check_pins(root, newest, state, "", Reserve()))["pins"]
        assert check.ok is False
        assert "cannot be held" in check.words
        assert (list((tmp_path / "elsewhere").iterdir()), state.exists()) == ([], False)

    def test_a_file_system_that_is_nearly_full(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Below what is left to the training no checkpoint is held, and the state has no room."""
        usage = shutil.disk_usage(root)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.total, 1000))
        newest = locate(root / "checkpoint-10")
        check = by_name(check_pins(root, newest, tmp_path, "", Reserve()))["space"]
        assert (check.ok, "lower [watch] keep_free_gb" in str(check.remedy)) == (False, True)
        assert by_name(check_state(tmp_path))["space for the state"].ok is False

    @pytest.mark.parametrize(
        ("keep_free_gb", "is_well", "words"),
        [
            (None, False, "5.0 GiB are free in {root}; 10.0 GiB are left to the training: no checkpoint is held"),
            (0.0, True, "; 0.0 GiB are left to the training"),
            (2.5, True, "; 2.5 GiB are left to the training"),
            (5.0, True, "; 5.0 GiB are left to the training, so that there is no room for a copy"),
            (200.0, False, "; 200.0 GiB are left to the training: no checkpoint is held"),
        ],
    )
    def test_what_stays_free_is_a_setting(
        self,
        keep_free_gb: float | None,
        is_well: bool,
        words: str,
        root: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Of a disk of 100 GiB with 5 GiB free: the run's own setting says whether that is enough."""
        monkeypatch.setattr("peel_agent.doctor.places._model_and_probe", lambda *_: ())
        usage = shutil.disk_usage(root)._replace(total=100 * 2**30, free=5 * 2**30)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        run = run_of(root, watch={"keep_free_gb": keep_free_gb})
        check = by_name(check_place(run, tmp_path, "", time.time))["space"]
        assert (check.ok, words.format(root=root) in check.words) == (is_well, True), check.words

    def test_an_object_store_that_is_none(self, tmp_path: Path) -> None:
        """A URL of no known scheme is told as a fault of the place, and the probe is looked at."""
        checks = by_name(check_place(run_of("ftp://a/b"), tmp_path, "", time.time))
        assert (checks["watched place"].ok, checks["probe"].ok) == (False, False)


class TestState:
    def test_made_or_not_yet_made(self, tmp_path: Path) -> None:
        """A folder that can be made is well, and is not made."""
        assert "can be made" in by_name(check_state(tmp_path / "a" / "b"))["state folder"].words
        assert list(tmp_path.iterdir()) == []
        assert by_name(check_state(tmp_path))["state folder"].ok

    def test_beside_a_running_agent(self, tmp_path: Path) -> None:
        """It says that an agent is at work there, and disturbs nothing."""
        ledger = Ledger(tmp_path)
        assert "an agent is at work" in by_name(check_state(tmp_path))["state folder"].words
        assert ledger.is_sound()
        ledger.close()

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        """What is no folder cannot be written to."""
        (tmp_path / "state").write_text("x")
        check = by_name(check_state(tmp_path / "state"))["state folder"]
        assert (check.ok, "--state" in str(check.remedy)) == (False, True)

    def test_another_versions_ledger(self, tmp_path: Path) -> None:
        """A ledger that this version does not read is told before the agent refuses it."""
        Ledger(tmp_path).close()
        connection = sqlite3.connect(next(tmp_path.glob("*.sqlite*")))
        connection.execute("PRAGMA user_version = 999")
        connection.close()
        check = by_name(check_state(tmp_path))["state folder"]
        assert check.ok is False
        assert "another version" in check.words


# ---------------------------------------------------------------- trackers and sinks


def tracked(uri: str, root: Path, **options: str) -> RunSettings:
    return run_of(root, tracker=TrackerSettings(options={"mlflow": {"tracking_uri": uri, **options}}))


def checked(run: RunSettings, state: Path) -> dict[str, Check]:
    prefix = "tracker mlflow, "
    checks = by_name(check_trackers(run, state, "", time.time, alone=True))
    return {name.removeprefix(prefix): check for name, check in checks.items()}


class TestMlflow:
    def test_a_run_that_is_found(self, mlflow_uri: str, tmp_path: Path) -> None:
        """The trainer's tagged run is found and tried: one tag and one small file, nothing else of it changes."""
        client = servers.mlflow_client(mlflow_uri)
        experiment = client.create_experiment(f"found-{tmp_path.name}")
        run_id = client.create_run(experiment, tags={"peel.checkpoint_dir": str(tmp_path)}).info.run_id
        before = client.get_run(run_id)
        checks = checked(tracked(mlflow_uri, tmp_path, experiment=f"found-{tmp_path.name}"), tmp_path)
        assert {name: check.ok for name, check in checks.items()} == dict.fromkeys(
            ("server", "server's clock", "run", "run is writable", "artifact store"), True
        )
        assert run_id in checks["run"].words
        after = client.get_run(run_id)
        assert dict(after.data.tags).keys() - dict(before.data.tags).keys() == {"peel.checked_ms"}
        assert (after.data.metrics, after.info.status) == (before.data.metrics, before.info.status)
        assert [file.path for file in client.list_artifacts(run_id, "peel")] == ["peel/doctor.txt"]

    def test_a_run_that_is_to_be_made(self, mlflow_uri: str, tmp_path: Path) -> None:
        """Neither the experiment nor the run is made in order to try them."""
        checks = checked(tracked(mlflow_uri, tmp_path, experiment=f"none-{tmp_path.name}"), tmp_path)
        assert (checks["server"].ok, checks["run"].ok) == (True, None)
        assert servers.mlflow_client(mlflow_uri).get_experiment_by_name(f"none-{tmp_path.name}") is None
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_is_deleted(self, mlflow_uri: str, tmp_path: Path) -> None:
        """It says how it is restored."""
        client = servers.mlflow_client(mlflow_uri)
        run_id = client.create_run("0").info.run_id
        client.delete_run(run_id)
        check = checked(tracked(mlflow_uri, tmp_path, run_id=run_id), tmp_path)["run"]
        assert check.ok is False
        assert f"mlflow runs restore --run-id {run_id}" in str(check.remedy)

    def test_a_run_that_does_not_exist(self, mlflow_uri: str, tmp_path: Path) -> None:
        """A run_id of another server is told."""
        check = checked(tracked(mlflow_uri, tmp_path, run_id="0" * 32), tmp_path)["run"]
        assert (check.ok, "run_id" in str(check.remedy)) == (False, True)

    def test_files_that_cannot_be_written(self, mlflow_uri: str, tmp_path: Path) -> None:
        """Metrics and files are told apart: the store of files is at fault, the run is well."""
        client = servers.mlflow_client(mlflow_uri)
        (tmp_path / "no_folder").write_text("x")
        experiment = client.create_experiment(
            f"files-{tmp_path.name}", artifact_location=(tmp_path / "no_folder" / "files").as_uri()
        )
        run_id = client.create_run(experiment).info.run_id
        checks = checked(tracked(mlflow_uri, tmp_path, run_id=run_id), tmp_path)
        assert (checks["run is writable"].ok, checks["artifact store"].ok) == (True, False)

    def test_a_server_that_is_away(self, tmp_path: Path) -> None:
        """It names the host and port as configured, without the password."""
        uri = f"http://me:secret@127.0.0.1:{servers.free_port()}"
        check = checked(tracked(uri, tmp_path), tmp_path)["server"]
        assert check.ok is False
        assert uri.rpartition("@")[2] in check.words
        assert "secret" not in check.words + str(check.remedy)

    def test_a_server_that_refuses_this_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The right host without its port is refused by the server: the remedy names both (mlflow#22095)."""
        monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "127.0.0.1")
        port = servers.free_port()
        with servers.mlflow_server(tmp_path, port) as uri:
            check = checked(tracked(uri, tmp_path), tmp_path)["server"]
        assert check.ok is False
        assert f'--allowed-hosts "127.0.0.1:{port}"' in str(check.remedy)

    def test_a_clock_that_is_wrong(self, mlflow_uri: str, tmp_path: Path) -> None:
        """The server's Date is held against this machine's clock."""
        tracker = mlflow_run.PLUGIN.connect(
            mlflow_run.MlflowSettings(tracking_uri=mlflow_uri), checkpoint_dir=str(tmp_path), state_dir=tmp_path
        )
        checks = {check.what: check for check in tracker.check(lambda: time.time() - 3600)}  # type: ignore[attr-defined]
        assert checks["server's clock"].ok is False
        assert "s ahead of" in checks["server's clock"].words

    def test_a_database_that_nobody_meant(self, tmp_path: Path) -> None:
        """A local database that is not there is not made."""
        check = checked(tracked(f"sqlite:///{tmp_path}/mlflow.db", tmp_path), tmp_path)["server"]
        assert (check.ok, "MLFLOW_TRACKING_URI" in str(check.remedy)) == (None, True)
        assert list(tmp_path.iterdir()) == []

    def test_the_kit(self, mlflow_uri: str, tmp_path: Path) -> None:
        """The conformance kit's check of checks holds for MLflow."""
        client = servers.mlflow_client(mlflow_uri)
        run_id = client.create_run("0").info.run_id

        def read(step: int) -> dict[str, list[float]]:
            keys = [key for key in client.get_run(run_id).data.metrics if key.startswith("peel/")]
            points = {key: client.get_metric_history(run_id, key) for key in keys}
            return {key: values for key in keys if (values := [one.value for one in points[key] if one.step == step])}

        settings = mlflow_run.MlflowSettings(tracking_uri=mlflow_uri, run_id=run_id)
        kit.a_check_changes_no_result(
            lambda: mlflow_run.PLUGIN.connect(settings, checkpoint_dir=str(tmp_path), state_dir=tmp_path), read
        )


class TestJsonl:
    def test_the_kit(self, tmp_path: Path) -> None:
        """The conformance kit's check of checks holds for the file, and it can fail."""
        file = tmp_path / "p.jsonl"

        def read(step: int) -> dict[str, list[float]]:
            forms = map(json.loads, file.read_text().splitlines())
            return {key: [value] for form in forms if form["step"] == step for key, value in form["metrics"].items()}

        def connect() -> Any:
            return jsonl_file.PLUGIN.connect(
                jsonl_file.JsonlSettings(file), checkpoint_dir=str(tmp_path), state_dir=tmp_path
            )

        kit.a_check_changes_no_result(connect, read)

        def spoiling() -> Any:
            tracker = connect()
            tracker.check = lambda now: (Check("file", False, "no"),)
            return tracker

        with pytest.raises(AssertionError, match="found well"):
            kit.a_check_changes_no_result(spoiling, read)

    @pytest.mark.parametrize("place", ["folder", "file/p.jsonl", "file/deeper/p.jsonl"])
    def test_a_place_that_cannot_be_written(self, place: str, tmp_path: Path) -> None:
        """A folder, or a file where a folder should be, is told."""
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("x")
        tracking = TrackerSettings(use=("jsonl",), options={"jsonl": {"path": str(tmp_path / place)}})
        checks = by_name(check_trackers(run_of(tmp_path, tracker=tracking), tmp_path, "", time.time, alone=True))
        assert checks["tracker jsonl, file"].ok is False

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        """A file that is not there yet can be written to, and is not made."""
        tracking = TrackerSettings(use=("jsonl",))
        checks = by_name(check_trackers(run_of(tmp_path, tracker=tracking), tmp_path, "", time.time, alone=True))
        assert checks["tracker jsonl, file"].ok
        assert list(tmp_path.iterdir()) == []


class TestDestinations:
    @pytest.mark.parametrize(
        ("tracking", "what", "words"),
        [
            (TrackerSettings(use=("no_such", "jsonl")), "tracker no_such", "no plug-in `no_such`"),
            (TrackerSettings(use=("jsonl",), options={"jsonl": {"pat": "x"}}), "tracker jsonl", "`tracker.jsonl.pat`"),
            (TrackerSettings(use=("jsonl",), options={"mlflow": {}}), "trackers", "configured, and not in use"),
            (TrackerSettings(use=("jsonl",), flags={"run_id": "x"}), "trackers", "--run-id is given"),
            (
                TrackerSettings(use=("jsonl",), options={"jsonl": {"path": "${NOT_SET_ANYWHERE}"}}),
                "tracker jsonl",
                "NOT_SET_ANYWHERE, which is not set",
            ),
        ],
    )
    def test_a_tracker_that_is_configured_wrong(
        self, tracking: TrackerSettings, what: str, words: str, tmp_path: Path
    ) -> None:
        """It is told, and the others are asked all the same."""
        checks = by_name(check_trackers(run_of(tmp_path, tracker=tracking), tmp_path, "", time.time, alone=True))
        assert checks[what].ok is False
        assert words in checks[what].words
        assert ("tracker jsonl, file" in checks) == (what != "tracker jsonl")

    def test_sinks(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Each is opened and nothing is sent; one that is wrong hides no other."""
        sinks = [
            SinkSettings("stderr", "here"),
            SinkSettings("no_such", "there"),
            SinkSettings("stderr", "odd", {"colour": "red"}),
        ]
        checks = by_name(check_sinks(sinks, tmp_path, time.time))
        assert [checks[f"sink {name}"].ok for name in ("here", "there", "odd")] == [None, False, False]
        assert capsys.readouterr().err == ""

    def test_sinks_are_tried_and_nothing_is_sent(self, tmp_path: Path) -> None:
        """A server is connected to, a program looked for; what would not arrive is told with its remedy."""
        with http_receiver() as receiver:
            there = {"url": f"http://127.0.0.1:{receiver.port}/hook", "allow_private": True}
            sinks = [
                SinkSettings("webhook", "there", there),
                SinkSettings("slack", "away", {**there, "url": f"http://127.0.0.1:{servers.free_port()}/hook"}),
                SinkSettings("webhook", "private", {"url": "https://127.0.0.1/hook"}),
                SinkSettings("exec", "off", {"command": ["true"]}),
                SinkSettings("exec", "on", {"command": ["true"], "enabled": True}),
                SinkSettings("email", "mail", {"host": "127.0.0.1", "sender": "a@b.example"}),
            ]
            checks = by_name(check_sinks(sinks, tmp_path, time.time))
        assert receiver.requests == []
        assert {name: check.ok for name, check in checks.items()} == {
            "sink there, connection": True,
            "sink away, connection": False,
            "sink private": False,
            "sink off": False,
            "sink on, program": True,
            "sink mail": False,
        }
        assert "enabled = true" in (checks["sink off"].remedy or "")
        assert "it lacks `to`" in checks["sink mail"].words


# ---------------------------------------------------------------- all of it


class TestExamine:
    def test_a_part_that_hangs_or_breaks_holds_up_no_other(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A dead mount costs its own checks alone, and so does a plug-in that raises something odd."""
        for_ever = threading.Event()

        def hang(*_: Any) -> Iterator[Check]:
            for_ever.wait()
            yield Check("never", True, "never")

        def broken(*_: Any) -> Iterator[Check]:
            raise ZeroDivisionError("a\x1bb")

        monkeypatch.setattr(examination, "check_place", hang)
        monkeypatch.setattr(examination, "check_plugins", broken)
        monkeypatch.setattr(examination, "check_libraries", lambda: iter([]))
        monkeypatch.setattr(examination, "PART_SECONDS", 0.5)
        flags = {"watch.path": str(root), "tracker.use": ["jsonl"], "state.path": str(tmp_path / "state")}
        checks = by_name(examine(None, flags, now=time.time))
        for_ever.set()
        assert "no answer within" in checks["watched place"].words
        assert "ZeroDivisionError: a\\x1bb" in checks["plug-ins"].words
        assert checks["tracker jsonl, file"].ok
        assert checks["state folder"].ok

    def test_several_runs(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The checks of each are told apart by its name."""
        monkeypatch.setattr(examination, "check_libraries", lambda: iter([]))
        file = tmp_path / "peel.toml"
        text = '[tracker]\nuse = ["jsonl"]\n'
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            text += f'[[run]]\nname = "{name}"\n[run.watch]\npath = "{tmp_path / name}"\n'
        file.write_text(text)
        checks = by_name(examine(file, {"state.path": str(tmp_path / "state")}, now=time.time))
        for name in ("a", "b"):
            assert checks[f"{name}: watched place"].ok is None
            assert checks[f"{name}: tracker jsonl, file"].ok


# ---------------------------------------------------------------- init


class TestInit:
    @pytest.mark.parametrize("name", ['a "quoted" \\ name', "tab\tand\x7fmore", "ünïcode 🙂", "new\nline = 1"])
    def test_any_name_of_a_folder(self, name: str, tmp_path: Path) -> None:
        """Whatever the folder is called, the file loads and names it."""
        folder = tmp_path / name
        folder.mkdir()
        file = tmp_path / "peel.toml"
        file.write_text(configuration_text(watched_place(folder, time.time())), encoding="utf-8")
        settings = load_settings(file, {})
        assert [run.watch.path for run in settings.runs] == [str(folder)]

    def test_a_name_that_no_file_can_hold(self, tmp_path: Path) -> None:
        """A name that is not UTF-8 is refused with the way out."""
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
        folder.mkdir()
        with pytest.raises(ConfigurationError, match="not UTF-8"):
            configuration_text(watched_place(folder, time.time()))

    @pytest.mark.usefixtures("in_process")
    def test_a_folder_that_is_itself_a_checkpoint(self, root: Path) -> None:
        """It says that a run is watched one folder higher."""
        assert any(
            "itself one checkpoint" in said for said in watched_place(root / "checkpoint-10", time.time()).sentences
        )

    def test_a_url(self, tmp_path: Path) -> None:
        """A URL is written as it is."""
        (tmp_path / "peel.toml").write_text(configuration_text(WatchedPlace("s3://bucket/run")))
        assert load_settings(tmp_path / "peel.toml", {}).runs[0].watch.path == "s3://bucket/run"


def test_a_plug_in_that_raises_anything_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's: it is named with what it raised, and the next one is examined."""
    monkeypatch.setattr(JsonlSink, "where", lambda _sink: {}["a bug"])
    monkeypatch.setattr(mlflow_run.MlflowTracker, "check", lambda _tracker, _now: {}["a bug"])
    sinks = [SinkSettings("jsonl", "first", {"path": str(tmp_path / "n")}), SinkSettings("stderr", "second", {})]
    checks = by_name(check_sinks(sinks, tmp_path, time.time))
    assert (checks["sink first"].ok, checks["sink first"].words) == (False, "the plug-in failed: KeyError: 'a bug'")
    assert "uninstall" in checks["sink first"].remedy
    assert checks["sink second"].ok is None
    trackers = TrackerSettings(use=("mlflow", "jsonl"), options={"jsonl": {"path": str(tmp_path / "p")}})
    checks = by_name(check_trackers(run_of(tmp_path, tracker=trackers), tmp_path, "", time.time, alone=True))
    assert checks["tracker mlflow"].words == "the plug-in failed: KeyError: 'a bug'"
    assert "tracker jsonl" in " ".join(checks)
