"""`python -m tests.bench --device cuda`: what peels of models of 124 M, 1 B and 8 B parameters cost on a device.

Each model is a Llama of random weights, written on the spot in bf16, a shard a block. Its probe is sampled from it, so
that every block earns its place, as in a run that goes well. Then, each in a process of its own: a peel, with its peak
memory; the same under torch's profiler, for the time in kernels beside the time on the wall; the agent's `watch --once`
into MLflow's sqlite store; WeightWatcher on the same files, where it is to be had. Printed and written to device.json.

On the CPU the effort is `quick` unless another is named: `python -m tests.bench --device cpu --shapes 124m`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peel_agent.capture.trace import usable_device
from peel_agent.errors import ConfigurationError
from tests.bench import random_llama
from tests.bench.random_llama import SHAPES, STEP
from tests.runs.command import environment_of, reports_of
from tests.runs.sidecar import read_ledger

ROOT = Path(__file__).parents[2]
SEQUENCES = 88
LARGE = ("124m", "1b", "8b")
AIMS = {"1b": 20.0, "8b": 60.0}
"""Seconds on one H200, from the start of the peel to MLflow."""


@dataclass(frozen=True)
class Settings:
    """On which device, how thoroughly, and on sequences of how many tokens."""

    device: str
    effort: str
    sequence: int
    parts: tuple[str, ...]
    """What is measured: see PARTS."""
    weightwatcher: str | None
    """An interpreter that has WeightWatcher."""
    patience: float
    """The seconds that WeightWatcher gets."""

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Spent:
    """What a process took, with all that it started and waited for; and its last line."""

    seconds: float
    cpu_seconds: float
    last_line: str


def spent(command: Sequence[object], home: Path, patience: float | None = None) -> Spent:
    """Runs a command to its end. Raises CalledProcessError, its stderr shown, when it fails, and TimeoutExpired."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    finished = subprocess.run(
        list(map(str, command)),
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env=environment_of(home, PYTHONPATH=path),
        timeout=patience,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    finished.check_returncode()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(seconds, cpu, (finished.stdout.splitlines() or [""])[-1])


def peel(home: Path, settings: Settings, *extra: str) -> dict[str, Any]:
    """A peel of the checkpoint in a process of its own: see tests/bench/one_peel.py."""
    command = [sys.executable, "-m", "tests.bench.one_peel", _checkpoint(home), settings.device]
    taken = spent([*command, "--effort", settings.effort, *extra], home)
    return {
        "seconds with start": taken.seconds,
        "cpu seconds with start": taken.cpu_seconds,
        **json.loads(taken.last_line),
    }


def agent(home: Path, settings: Settings) -> dict[str, Any]:
    """The agent's way: seen, peeled by a worker, judged, put into the ledger and sent to MLflow's store."""
    store = home / "mlflow.db"
    (home / "peel.toml").write_text("[watch]\nsettle_seconds = 0.5\npoll_seconds = 0.5\n")
    command = [sys.executable, "-m", "peel_agent", "watch", home / "run", "--once", "-c", home / "peel.toml"]
    taken = spent(
        [*command, "--device", settings.device, "--effort", settings.effort, "--probe", home / "probe.npy",
         "--tracking-uri", f"sqlite:///{store}"], home,
    )  # fmt: skip
    (state,) = (home / "peel-agent").iterdir()
    (report,) = reports_of(state)
    timing = json.loads(report.read_text())["timing"]
    told = dict(read_ledger(state, "SELECT kind, at FROM events WHERE kind IN ('peeling', 'delivered')"))
    with sqlite3.connect(store) as rows:
        ((series,),) = rows.execute("SELECT count(DISTINCT key) FROM metrics WHERE key LIKE 'peel/%'")
    of_peel = sum(timing.values())
    return {
        "seconds": taken.seconds,
        "cpu seconds": taken.cpu_seconds,
        "from the start of the peel to MLflow": told["delivered"] - told["peeling"],
        "of these the peel": of_peel,
        "start, ledger and sending": taken.seconds - of_peel,
        "series in MLflow": series,
    }


def weightwatcher(home: Path, settings: Settings) -> dict[str, Any]:
    """WeightWatcher's default analysis of the same files; it uses a GPU where it sees one."""
    if settings.weightwatcher is None:
        return {"left out": "WeightWatcher is not installed here: name an interpreter that has it (--weightwatcher)"}
    hidden = [] if settings.is_gpu else ["env", "CUDA_VISIBLE_DEVICES="]
    script = [settings.weightwatcher, ROOT / "tests" / "bench" / "one_analysis.py", _checkpoint(home)]
    try:
        taken = spent([*hidden, *script], home, settings.patience)
    except subprocess.TimeoutExpired:
        return {"left out": f"WeightWatcher was not done after {settings.patience:g} seconds"}
    except subprocess.CalledProcessError as error:
        return {"left out": f"WeightWatcher ended with status {error.returncode}; what it said is above"}
    return {"seconds": taken.seconds, "cpu seconds": taken.cpu_seconds, **json.loads(taken.last_line)}


PARTS: Mapping[str, Callable[[Path, Settings], dict[str, Any]]] = {
    "peel": peel,
    "profile": lambda home, settings: peel(home, settings, "--profile"),
    "watch": agent,
    "weightwatcher": weightwatcher,
}


def make(home: Path, name: str, settings: Settings) -> dict[str, Any]:
    """The file and the probe; in a process of its own on a GPU, which the agent has to see free."""
    if not settings.is_gpu:
        return random_llama.make(_checkpoint(home), SHAPES[name], "cpu", SEQUENCES, settings.sequence)
    command = [sys.executable, "-m", "tests.bench.random_llama", _checkpoint(home), name, settings.device]
    taken = spent([*command, "--sequence", settings.sequence, "--sequences", SEQUENCES], home)
    return dict(json.loads(taken.last_line))


def measured(name: str, settings: Settings, folder: Path, told: Callable[[str, Any], None]) -> None:
    """Everything about one model."""
    home = folder / name
    (home / "run").mkdir(parents=True)
    told("made", make(home, name, settings))
    results: dict[str, Any] = {}
    for part, measure in PARTS.items():
        if part in settings.parts:
            results[part] = measure(home, settings)
            told(part, {**results[part], **({"aim": AIMS[name]} if part == "watch" and name in AIMS else {})})
    if {"peel", "weightwatcher"} <= set(results) and "seconds" in results["weightwatcher"]:
        other, ours = results["weightwatcher"], results["peel"]
        ratios = {which: other[which] / ours[f"{which} with start"] for which in ("seconds", "cpu seconds")}
        told("weightwatcher / peel", ratios)


def _checkpoint(home: Path) -> Path:
    return home / "run" / f"checkpoint-{STEP}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--shapes", default=",".join(LARGE), help=f"of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--effort", choices=["quick", "standard", "full"], help="standard on a GPU, quick on the CPU")
    parser.add_argument("--sequence", type=int, help="tokens a sequence: 1024 on a GPU, 128 on the CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"what to measure: of {', '.join(PARTS)}, with commas")
    parser.add_argument("--weightwatcher", metavar="PYTHON", help="an interpreter that has WeightWatcher")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that WeightWatcher gets (%(default)g)")
    parser.add_argument("--folder", type=Path, help="where the files are made and deleted (20 GB for 8b)")
    parser.add_argument("--out", type=Path, default=Path("device.json"))
    options = parser.parse_args(arguments)
    device = "cuda:0" if options.device == "cuda" else options.device
    names, parts = options.shapes.split(","), options.parts.split(",")
    for option, given, known in (("--shapes", names, SHAPES), ("--parts", parts, PARTS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option}: `{unknown[0]}` is none of {', '.join(known)}")
    try:
        usable_device(device)  # counts GPUs and computes nothing on them
    except ConfigurationError as error:
        parser.error(f"{error.what}; {error.remedy}")
    is_gpu = device != "cpu"
    settings = Settings(
        device=device,
        effort=options.effort or ("standard" if is_gpu else "quick"),
        sequence=options.sequence or (1024 if is_gpu else 128),
        parts=tuple(parts),
        weightwatcher=options.weightwatcher or (sys.executable if find_spec("weightwatcher") else None),
        patience=options.patience,
    )
    results: dict[str, Any] = {"settings": asdict(settings) | {"weightwatcher": settings.weightwatcher is not None}}
    print(f"settings: {json.dumps(results['settings'])}", flush=True)
    for name in names:
        of_shape = results[SHAPES[name].name] = {}

        def told(what: str, value: Any, name: str = SHAPES[name].name, of_shape: dict[str, Any] = of_shape) -> None:
            of_shape[what] = value
            print(f"{name}, {what}: {json.dumps(value)}", flush=True)
            options.out.write_text(json.dumps(results, indent=2) + "\n")

        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measured(name, settings, Path(folder), told)
