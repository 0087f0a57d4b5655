"""Starts the training and the sidecar as two processes, tells how far both are, and ends with the finding."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from peel_agent.demo.text import corpus
from peel_agent.errors import ConfigurationError, PeelError
from peel_agent.ledger import Outbox, open_beside
from peel_agent.publish import plain_text, report_from_json, report_sheet
from peel_agent.records import ACCUSING, PeelReport
from peel_agent.signals import Interrupted

HELD_BACK = 3
STEPS = 500
SAVE_EVERY = 100

STALL_SECONDS = 900.0
"""The demo gives up when neither the training nor the sidecar has given a sign of life for so long."""

LOOK_SECONDS = 0.5
SEND_SECONDS = 60.0

OPTIONS = "demo.json"

CONFIGURATION = """\
[watch]
settle_seconds = 1
backlog = "all"
poll_seconds = 2

[probe]
fit_tokens = 32768
select_tokens = 8192
confirm_tokens = 16384
"""


def run_demo(keep: Path | None, *, healthy: bool, bits: str | None = None) -> int:
    """Runs the demo in `keep` (default: a new temporary folder, kept too), or goes on with the one begun there.

    Returns 0 when the finding is the right one. Raises ConfigurationError for a folder with another demo in it and
    without the extra, and Interrupted for Ctrl-C.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigurationError(
            "the demo's training needs the package accelerate, which is not installed",
            remedy='pip install "peel-agent[demo]"',
        )
    folder = (keep or Path(tempfile.mkdtemp(prefix="peel-demo-"))).resolve()
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    print(f"demo: everything is kept in {folder}", flush=True)
    run_id = _run_id(folder, healthy=healthy, bits=bits)
    _write_probe(folder)
    if _last(folder) is not None:
        return _tell(folder, healthy=healthy)
    held = "no block held back" if healthy else f"block {HELD_BACK} held back: it never learns"
    kind = "Llama" if bits is None else f"{bits} Llama"
    print(f"demo: training a 6-block {kind} on the standard library's sources, {STEPS} steps, {held}", flush=True)
    signs = Signs(folder / "training.log", time.monotonic)
    try:
        with (
            _training(folder, checkpoints, run_id, healthy=healthy, bits=bits) as training,
            _sidecar(folder, checkpoints, run_id, signs, bits=bits) as sidecar,
        ):
            why_not = _wait_for_last(folder, signs, training, sidecar)
            if why_not is None:
                _wait_until_sent(folder)
    except KeyboardInterrupt:
        _tell_so_far(folder)
        at = f" at training step {signs.step} of {STEPS}" if signs.step else ""
        again = _again(folder, healthy=healthy, bits=bits)
        raise Interrupted(f"interrupted{at}; `{again}` goes on from the last checkpoint") from None
    if why_not is not None:
        print(f"demo: did not reach its end: {why_not}; see {signs.log} and the lines above")
        print(f"To go on:  {_again(folder, healthy=healthy, bits=bits)}")
        return 1
    return _tell(folder, healthy=healthy)


def _run_id(folder: Path, *, healthy: bool, bits: str | None) -> str:
    """The MLflow run of the demo that was begun here, or a new one, in a store of its own as a user's would be."""
    from mlflow import MlflowClient

    file, wanted = folder / OPTIONS, {"healthy": healthy, "bits": bits}
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        run_id: str = kept.pop("run_id")
        if kept != wanted:
            raise ConfigurationError(
                f"the demo in {folder} was begun with other options: {kept}", remedy="give --keep another folder"
            )
        print("demo: going on with the one that was begun there", flush=True)
        return run_id
    client = MlflowClient(tracking_uri=_store(folder))
    experiment = client.get_experiment_by_name("peel-demo")
    place = (folder / "artifacts").as_uri()
    number = experiment.experiment_id if experiment else client.create_experiment("peel-demo", artifact_location=place)
    run_id = client.create_run(number, run_name="demo").info.run_id
    file.write_text(json.dumps({"run_id": run_id, **wanted}), encoding="utf-8")
    return run_id


def _again(folder: Path, *, healthy: bool, bits: str | None) -> str:
    """The command that goes on."""
    flags = (["--healthy"] if healthy else []) + ([] if bits is None else ["--bits", bits])
    return shlex.join([sys.executable, "-m", "peel_agent", "demo", "--keep", str(folder), *flags])


def _write_probe(folder: Path) -> None:
    import numpy as np

    np.save(folder / "probe.npy", corpus()[1])
    (folder / "peel.toml").write_text(CONFIGURATION, encoding="utf-8")


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@dataclass
class Signs:
    """Signs of life: lines of the training's log and of the sidecar. `now` gives seconds."""

    log: Path
    now: Callable[[], float]
    step: int = 0
    _last: float = field(init=False)
    _size: int = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.now()
        self._size = self.log.stat().st_size if self.log.exists() else 0

    def give(self) -> None:
        """There was one."""
        self._last = self.now()

    def look(self) -> list[str]:
        """What the training said of its steps since the last look."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._size)
                new = file.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        if whole:
            self._size += len(whole)
            self.give()
        said = re.findall(r"^step (\d+) (of .*)$", whole.decode(errors="replace"), flags=re.MULTILINE)
        self.step = int(said[-1][0]) if said else self.step
        return [f"step {step} {rest}" for step, rest in said]

    @property
    def have_ceased(self) -> bool:
        return self.now() - self._last > STALL_SECONDS


def _environment(folder: Path, run_id: str) -> dict[str, str]:
    return os.environ | {
        "MLFLOW_TRACKING_URI": _store(folder),
        "MLFLOW_EXPERIMENT_NAME": "peel-demo",
        "MLFLOW_RUN_ID": run_id,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


@contextmanager
def _training(
    folder: Path, checkpoints: Path, run_id: str, *, healthy: bool, bits: str | None
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "peel_agent.demo.train", str(checkpoints)]
    command += ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--report-to", "mlflow"]
    command += [] if healthy else ["--hold-back", str(HELD_BACK)]
    command += [] if bits is None else ["--bits", bits]
    with (folder / "training.log").open("ab") as log:
        # Ctrl-C is for the demo, which ends the training.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(folder, run_id), process_group=0)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _sidecar(
    folder: Path, checkpoints: Path, run_id: str, signs: Signs, *, bits: str | None
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "peel_agent", "watch", str(checkpoints), "-c", str(folder / "peel.toml")]
    command += ["--probe", str(folder / "probe.npy"), "--state", str(folder / "state")]
    command += ["--run-id", run_id, "--tracking-uri", _store(folder)]
    command += [] if bits is None else ["--precision", f"model.layers.*_proj.weight={bits}"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=_environment(folder, run_id), process_group=0
    )
    assert process.stderr is not None
    relay = threading.Thread(target=_relay, args=(process.stderr, signs), daemon=True)
    relay.start()
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        relay.join()


def _relay(lines: IO[str], signs: Signs) -> None:
    for line in lines:
        signs.give()
        print(f"  sidecar: {line.rstrip()}", flush=True)


def _wait_for_last(
    folder: Path, signs: Signs, training: subprocess.Popen[bytes], sidecar: subprocess.Popen[str]
) -> str | None:
    """Until the last checkpoint has its report: None; else why it will have none: one failed, or both stand still."""
    while _last(folder) is None:
        for words in signs.look():
            print(f"demo: training {words}", flush=True)
        if training.poll() not in (None, 0):
            return f"the training ended with status {training.returncode}"
        if sidecar.poll() is not None:
            return f"the sidecar ended with status {sidecar.returncode}"
        if signs.have_ceased:
            return f"neither the training nor the sidecar has given a sign of life for {STALL_SECONDS:.0f} s"
        time.sleep(LOOK_SECONDS)
    return None


def _wait_until_sent(folder: Path) -> None:
    """Until MLflow has all of it, the page too; what takes longer is kept, and sent when somebody goes on."""
    deadline = time.monotonic() + SEND_SECONDS
    while time.monotonic() < deadline:
        try:
            with closing(open_beside(folder / "state")) as database:
                if not any(owed for owed, _ in Outbox(database).owed().values()):
                    return
        except (PeelError, sqlite3.Error):  # damaged, or moved away: then nothing can be waited for
            return
        time.sleep(LOOK_SECONDS)


def _last(folder: Path) -> Path | None:
    """The file of the last checkpoint's report; its name is taken when it is whole."""
    return next((folder / "state").glob(f"runs/*/reports/step-{STEPS:09d}.json"), None)


def _read(file: Path) -> PeelReport:
    return report_from_json(json.loads(file.read_text(encoding="utf-8")))


def _tell_so_far(folder: Path) -> None:
    """The newest report, if there is any, and where everything can be seen."""
    reports = sorted((folder / "state").glob("runs/*/reports/step-*.json"), key=lambda path: path.name)
    if reports:
        print("\n" + plain_text(report_sheet(_read(reports[-1]))) + "\n")
        print(f"Report so far: {reports[-1]}")
    _tell_mlflow(folder)


def _tell_mlflow(folder: Path) -> None:
    command = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", _store(folder)])
    print(f"In MLflow: {command}")
    print(
        "  then open http://127.0.0.1:5000, experiment peel-demo, run demo: charts, and peel/report.html in Artifacts"
    )
    page = [sys.executable, "-m", "peel_agent", "report", "--state", str(folder / "state"), "--out", "report.html"]
    print(f"As a page: {shlex.join(page)}", flush=True)


def _tell(folder: Path, *, healthy: bool) -> int:
    file = _last(folder)
    assert file is not None
    report = _read(file)
    print("\n" + plain_text(report_sheet(report)) + "\n")
    accused = [layer for layer in report.layers if layer.finding is not None and layer.finding.kind in ACCUSING]
    for layer in accused:
        assert layer.finding is not None
        print(f"Finding: {layer.finding.words}.")
    if not accused:
        undecided = sum(layer.status == "undecided" for layer in report.layers)
        print(f"Finding: nothing is wrong with any layer; {undecided} undecided.")
    print(f"Training loss, which shows nothing of this: {folder / 'training.log'}")
    print(f"Report:   {file}")
    _tell_mlflow(folder)
    watch = [sys.executable, "-m", "peel_agent", "watch", str(folder / "checkpoints"), "-c", str(folder / "peel.toml")]
    places = ["--probe", str(folder / "probe.npy"), "--state", str(folder / "state"), "--tracking-uri", _store(folder)]
    print(f"To go on watching: {shlex.join([*watch, *places])}")
    expected = [] if healthy else [HELD_BACK]
    return int([layer.index for layer in accused] != expected)
