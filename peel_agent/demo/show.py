"""Starts the training and the sidecar as two processes, relays what the sidecar says, and ends with the finding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from peel_agent.demo.text import corpus
from peel_agent.publish import ACCUSING, report_from_json, table
from peel_agent.records import PeelReport

HELD_BACK = 3
STEPS = 500
SAVE_EVERY = 100
GIVE_UP_SECONDS = 900

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
    """Runs the demo in `keep` (default: a new temporary folder, kept too); 0 when the finding is the right one."""
    folder = (keep or Path(tempfile.mkdtemp(prefix="peel-demo-"))).resolve()
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    _write_probe(folder)
    print(f"demo: everything is kept in {folder}", flush=True)
    run_id = _new_run(folder)
    held = "no block held back" if healthy else f"block {HELD_BACK} held back: it never learns"
    kind = "Llama" if bits is None else f"{bits} Llama"
    print(f"demo: training a 6-block {kind} on the standard library's sources, {STEPS} steps, {held}", flush=True)
    with (
        _training(folder, checkpoints, run_id, healthy=healthy, bits=bits) as training,
        _sidecar(folder, checkpoints, run_id, bits=bits) as sidecar,
    ):
        report = _wait_for_last(folder, training, sidecar)
    return _tell(folder, report, healthy=healthy)


def _write_probe(folder: Path) -> None:
    import numpy as np

    np.save(folder / "probe.npy", corpus()[1])
    (folder / "peel.toml").write_text(CONFIGURATION, encoding="utf-8")


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _new_run(folder: Path) -> str:
    """An MLflow run in a store of its own, as a user's training would have."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=_store(folder))
    experiment = client.create_experiment("peel-demo", artifact_location=(folder / "artifacts").as_uri())
    run_id: str = client.create_run(experiment, run_name="demo").info.run_id
    return run_id


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
    with (folder / "training.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(folder, run_id))
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _sidecar(folder: Path, checkpoints: Path, run_id: str, *, bits: str | None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "peel_agent", "watch", str(checkpoints), "-c", str(folder / "peel.toml")]
    command += ["--probe", str(folder / "probe.npy"), "--state", str(folder / "state")]
    command += ["--run-id", run_id, "--tracking-uri", _store(folder)]
    command += [] if bits is None else ["--precision", f"model.layers.*_proj.weight={bits}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment(folder, run_id))
    assert process.stderr is not None
    relay = threading.Thread(target=_relay, args=(process.stderr,), daemon=True)
    relay.start()
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        relay.join()


def _relay(lines: IO[str]) -> None:
    for line in lines:
        print(f"  sidecar: {line.rstrip()}", flush=True)


def _wait_for_last(
    folder: Path, training: subprocess.Popen[bytes], sidecar: subprocess.Popen[str]
) -> PeelReport | None:
    """The report of the last checkpoint, or None when one of the two processes failed."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while time.monotonic() < deadline:
        if (last := _last(folder)) is not None:
            return report_from_json(json.loads(last.read_text(encoding="utf-8")))
        if training.poll() not in (None, 0) or sidecar.poll() is not None:
            return None
        time.sleep(0.5)
    return None


def _last(folder: Path) -> Path | None:
    """The file of the last checkpoint's report; its name is taken when it is whole."""
    return next((folder / "state").glob(f"runs/*/reports/step-{STEPS:09d}.json"), None)


def _tell(folder: Path, report: PeelReport | None, *, healthy: bool) -> int:
    if report is None:
        print(f"demo: did not reach its end; see {folder / 'training.log'} and the lines above")
        return 1
    print("\n" + table(report) + "\n")
    accused = [layer for layer in report.layers if layer.finding is not None and layer.finding.kind in ACCUSING]
    for layer in accused:
        assert layer.finding is not None
        print(f"Finding: {layer.finding.words}.")
    if not accused:
        undecided = sum(layer.status == "undecided" for layer in report.layers)
        print(f"Finding: nothing is wrong with any layer; {undecided} undecided.")
    print(f"Training loss, which shows nothing of this: {folder / 'training.log'}")
    print(f"Report:   {_last(folder)}")
    print(f"In MLflow: mlflow ui --backend-store-uri {_store(folder)}")
    expected = [] if healthy else [HELD_BACK]
    return int([layer.index for layer in accused] != expected)
