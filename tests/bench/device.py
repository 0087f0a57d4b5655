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

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from peel_agent.capture.trace import usable_device
from peel_agent.errors import ConfigurationError
from tests.bench import one_peel
from tests.bench.capacity import MODELS, Model
from tests.runs.command import environment_of, reports_of

ROOT = Path(__file__).parents[2]
STEP = 1000
SEQUENCES = 88
SHAPES: Mapping[str, Model] = {
    "tiny": Model("tiny", 64, 2, 128, 64, vocabulary=256),
    "124m": Model("124 M", 768, 12, 2048, 768, vocabulary=25_344),
    "1b": MODELS[0],
    "8b": MODELS[1],
}
LARGE = ("124m", "1b", "8b")
AIMS = {"1b": 20.0, "8b": 60.0}
"""Seconds on one H200, from the ledger to MLflow."""


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

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"


def config_of(model: Model) -> LlamaConfig:
    head = 128 if model.width >= 4096 else min(64, model.width // 2)
    return LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        intermediate_size=model.inner,
        num_hidden_layers=model.blocks,
        num_attention_heads=model.width // head,
        num_key_value_heads=model.keys // head,
        max_position_embeddings=2048,
        initializer_range=model.width**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, model: Model) -> int:
    """Writes random weights in bf16, one shard in memory at a time, as a Trainer's checkpoint. Returns their bytes."""
    config = config_of(model)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": STEP}))
    blocks = [f"model.layers.{block}." for block in range(model.blocks)]
    prefixes = [next((block for block in blocks if name.startswith(block)), "") for name in shapes]
    noise = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    written = 0
    for number, prefix in enumerate(["", *blocks], start=1):
        file = f"model-{number:05}-of-{model.blocks + 1:05}.safetensors"
        names = [name for name, own in zip(shapes, prefixes, strict=True) if own == prefix]
        weights = {name: _weight(shapes[name], config.initializer_range, noise) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
        written += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": written}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def _weight(shape: Sequence[int], spread: float, noise: torch.Generator) -> Tensor:
    """A matrix of normal numbers; a norm's weights are ones."""
    drawn = torch.randn(shape, generator=noise) * spread if len(shape) > 1 else torch.ones(shape)
    return drawn.to(torch.bfloat16)


@dataclass(frozen=True)
class Spent:
    """What a process took, with all that it started and waited for; and its last line."""

    seconds: float
    cpu_seconds: float
    last_line: str


def spent(command: Sequence[object], home: Path) -> Spent:
    """Runs a command to its end. Raises CalledProcessError, its stderr shown, when it fails."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    finished = subprocess.run(
        list(map(str, command)),
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env=environment_of(home, PYTHONPATH=path),
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    finished.check_returncode()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(seconds, cpu, (finished.stdout.splitlines() or [""])[-1])


def peel(home: Path, settings: Settings, *extra: str) -> dict[str, Any]:
    """A peel of the checkpoint in a process of its own: see tests/bench/one_peel.py."""
    command = [sys.executable, "-m", "tests.bench.one_peel", "peel", _checkpoint(home), settings.device]
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
    (report,) = (report for state in (home / "peel-agent").iterdir() for report in reports_of(state))
    timing = json.loads(report.read_text())["timing"]
    with sqlite3.connect(store) as rows:
        ((series,),) = rows.execute("SELECT count(DISTINCT key) FROM metrics WHERE key LIKE 'peel/%'")
    of_peel = sum(timing.values())
    return {
        "seconds": taken.seconds,
        "cpu seconds": taken.cpu_seconds,
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
        taken = spent([*hidden, *script], home)
    except subprocess.CalledProcessError as error:
        return {"left out": f"WeightWatcher ended with status {error.returncode}; what it said is above"}
    return {"seconds": taken.seconds, "cpu seconds": taken.cpu_seconds, **json.loads(taken.last_line)}


PARTS: Mapping[str, Callable[[Path, Settings], dict[str, Any]]] = {
    "peel": peel,
    "profile": lambda home, settings: peel(home, settings, "--profile"),
    "watch": agent,
    "weightwatcher": weightwatcher,
}


def draw_probe(home: Path, settings: Settings) -> None:
    """Samples the probe; in a process of its own on a GPU, which the agent has to see free."""
    if not settings.is_gpu:
        one_peel.sample(_checkpoint(home), settings.device, sequences=SEQUENCES, length=settings.sequence)
        return
    command = [sys.executable, "-m", "tests.bench.one_peel", "sample", _checkpoint(home), settings.device]
    spent([*command, "--sequence", settings.sequence, "--sequences", SEQUENCES], home)


def measured(name: str, settings: Settings, folder: Path, told: Callable[[str, Any], None]) -> None:
    """Everything about one model."""
    model, home = SHAPES[name], folder / name
    (home / "run").mkdir(parents=True)
    start = time.perf_counter()
    size = write_checkpoint(_checkpoint(home), model)
    told("file", {"GB": size / 1e9, "parameters": size // 2, "seconds to write": time.perf_counter() - start})
    start = time.perf_counter()
    draw_probe(home, settings)
    told("probe", {"tokens": SEQUENCES * settings.sequence, "seconds to sample": time.perf_counter() - start})
    found: dict[str, Any] = {}
    for part, measure in PARTS.items():
        if part in settings.parts:
            found[part] = measure(home, settings)
            told(part, {**found[part], **({"aim": AIMS[name]} if part == "watch" and name in AIMS else {})})
    if {"peel", "weightwatcher"} <= set(found) and "seconds" in found["weightwatcher"]:
        other, ours = found["weightwatcher"], found["peel"]
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
    )
    results: dict[str, Any] = {"settings": asdict(settings) | {"weightwatcher": settings.weightwatcher is not None}}
    print(f"settings: {json.dumps(results['settings'])}", flush=True)
    for name in names:
        found = results[SHAPES[name].name] = {}

        def told(what: str, value: Any, name: str = SHAPES[name].name, found: dict[str, Any] = found) -> None:
            found[what] = value
            print(f"{name}, {what}: {json.dumps(value)}", flush=True)
            options.out.write_text(json.dumps(results, indent=2) + "\n")

        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measured(name, settings, Path(folder), told)
