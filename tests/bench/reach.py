"""What the agent costs the machine that it runs on, measured beside a real training and a real MLflow server.

`python -m tests.bench.reach` (about ten minutes; nothing else may run): an idle agent with five runs; the seconds
from the end of a peel to its numbers in MLflow; and how much slower the steps of a training on the same processors
are while a checkpoint is peeled: the peel is stopped and goes on by turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from tests import zoo
from tests.runs.command import environment_of
from tests.runs.sidecar import Sidecar, workers_of
from tests.servers import free_port, mlflow_server

TRAINING = """
import sys, time, torch
torch.manual_seed(0)
layers = [torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True) for _ in range(4)]
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
x = torch.randn(4, 96, 256)
while True:
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    sys.stdout.write(f"{time.time()}\\n")
    sys.stdout.flush()
"""

IDLE_SECONDS = 60.0
CYCLES = 8
WINDOW_SECONDS = 15.0


class RealSidecar(Sidecar):
    """A sidecar with the real engine."""

    def start(self) -> None:
        command = [sys.executable, "-m", "peel_agent", "watch", "-c", str(self.file)]
        environment = environment_of(self.folder)
        del environment["PEEL__DEVICE__NICE"]  # which tests set, not to wait; here it is what is measured
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def idle(folder: Path, uri: str) -> None:
    """Processor time and memory of an agent that watches five runs, with nothing to do."""
    text = f'[tracker.mlflow]\ntracking_uri = "{uri}"\n'
    for index in range(5):
        place = folder / f"run-{index}"
        place.mkdir(parents=True)
        text += f'[[run]]\n[run.watch]\npath = "{place}"\n'
    sidecar = RealSidecar(folder, text)
    with sidecar.running():
        assert sidecar.process is not None
        sidecar.wait_for_words("watching ", 5)
        time.sleep(5)
        agent = psutil.Process(sidecar.process.pid)
        before = sum(agent.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        used = sum(agent.cpu_times()[:2]) - before
        memory = agent.memory_info().rss / 2**20
        children = len(agent.children(recursive=True))
    print(f"idle with 5 runs: {100 * used / IDLE_SECONDS:.2f} % of a core, {memory:.0f} MiB, {children} children")


def _peeling(folder: Path, uri: str) -> tuple[RealSidecar, LlamaForCausalLM]:
    """A sidecar, and a model for its checkpoints."""
    folder.mkdir()
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **shape))
    more = f'[tracker.mlflow]\ntracking_uri = "{uri}"\nexperiment = "reach"\n[peel]\nquantities = ["margin"]\n'
    sidecar = RealSidecar(folder, more)
    np.save(folder / "probe.npy", np.random.default_rng(0).integers(0, 256, 120_000))
    return sidecar, model


def beside(folder: Path, uri: str) -> None:
    """The steps of a training while a peel beside it goes on, and while it is stopped."""
    sidecar, model = _peeling(folder, uri)
    times = folder / "times"
    with times.open("w") as out, sidecar.running():
        zoo.save(model, sidecar.root, step=1)
        worker = _worker(sidecar)
        training = subprocess.Popen([sys.executable, "-c", TRAINING], stdout=out)
        try:
            time.sleep(10)
            windows = [window for _ in range(CYCLES) for window in _alternate(worker)]
        finally:
            training.kill()
            training.wait()
        _compare(np.loadtxt(times), windows)


def sent(folder: Path, uri: str) -> None:
    """How long it takes from the end of a peel until MLflow has it."""
    sidecar, model = _peeling(folder, uri)
    lags = []
    with sidecar.running():
        for step in range(1, 5):
            zoo.save(model, sidecar.root, step=step)
            lags.append(_until_sent(sidecar, step))
    print(f"from a peel's end to MLflow: {', '.join(f'{lag:.1f}' for lag in lags)} s")


def _worker(sidecar: Sidecar) -> psutil.Process:
    """The peeling child, once there is one."""
    assert sidecar.process is not None
    while not (workers := workers_of(sidecar.process.pid)):
        time.sleep(0.1)
    return workers[0]


def _alternate(worker: psutil.Process) -> list[tuple[float, float, bool]]:
    """A window in which the worker is stopped, and one in which it runs."""
    windows = []
    for is_on in (False, True):
        (worker.resume if is_on else worker.suspend)()
        began = time.time()
        time.sleep(WINDOW_SECONDS)
        windows.append((began, time.time(), is_on))
    assert worker.is_running(), "the peel ended before its time: give it a larger probe"
    return windows


def _until_sent(sidecar: Sidecar, count: int) -> float:
    """Waits until so many are peeled and sent; the seconds between."""
    while len(sidecar.steps()) < count:
        time.sleep(0.05)
    peeled = time.time()
    while sidecar.owed():
        time.sleep(0.05)
    return time.time() - peeled


def _compare(stamps: np.ndarray, windows: list[tuple[float, float, bool]]) -> None:
    steps: dict[bool, list[float]] = {True: [], False: []}
    for began, ended, is_on in windows:
        steps[is_on].extend(np.diff(stamps[(stamps > began) & (stamps < ended)]))
    on, off = np.array(steps[True]), np.array(steps[False])
    print(f"steps of the training: {len(off)} alone, {len(on)} beside a peel ({len(windows) // 2} windows of each)")
    for name, level in (("median", 50), ("95th percentile", 95)):
        alone, together = np.percentile(off, level), np.percentile(on, level)
        slower = 100 * (together / alone - 1)
        print(f"  {name}: {1000 * alone:.1f} ms alone, {1000 * together:.1f} ms beside: {slower:+.1f} %")


PARTS = {"idle": idle, "beside": beside, "sent": sent}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reach-") as name:
        folder = Path(name)
        (folder / "server").mkdir()
        with mlflow_server(folder / "server", free_port()) as uri:
            for part, measure in PARTS.items():
                if options.only in (None, part):
                    measure(folder / part, uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())
