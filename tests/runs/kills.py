"""The agent and its child are killed at random instants, over a run of real checkpoints with MLflow and a sink.

`python -m tests.runs.kills --kills 200 --checkpoints 20` does the whole (about half an hour); a short form is part of
the tests. Prints what was killed and what came of it; exit 1 when an invariant does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tests import zoo
from tests.runs.command import environment_of
from tests.runs.sidecar import read_ledger
from tests.servers import free_port, mlflow_client, mlflow_server

CONFIGURATION = """\
[watch]
path = "{root}"
settle_seconds = 0
poll_seconds = 0.5
backlog = "all"

[probe]
path = "{probe}"

[peel]
effort = "quick"

[state]
path = "{state}"

[tracker.mlflow]
tracking_uri = "{uri}"
experiment = "kills"

[[sink]]
use = "jsonl"

[health]
listen = ""
"""

DEATHS_ALLOWED = 2
"""A checkpoint is given up at the third death of its worker: the children of one are killed no more often."""

PAUSES = (0.3, 9.0)
"""Seconds between two kills: from before an agent has begun to after a peel."""


@dataclass
class Outcome:
    """What was done and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, holds: bool, claim: str) -> None:
        print(f"{'holds' if holds else 'BROKEN'}: {claim}", flush=True)
        if not holds:
            self.wrong.append(claim)


class Killed:
    """A run of `checkpoints` checkpoints in `folder`, an MLflow server, and an agent that is killed."""

    def __init__(self, folder: Path, uri: str, checkpoints: int, seed: int) -> None:
        self.folder, self.root, self.state, self.uri = folder, folder / "checkpoints", folder / "state", uri
        self.steps = [100 * (index + 1) for index in range(checkpoints)]
        self.random = random.Random(seed)
        self.root.mkdir()
        self._write_checkpoints()
        tokens = np.random.default_rng(seed).integers(0, 64, 20_000).astype(np.int64)
        np.save(folder / "probe.npy", tokens % zoo.VOCABULARY)
        form = CONFIGURATION.format(root=self.root, probe=folder / "probe.npy", state=self.state, uri=uri)
        (folder / "peel.toml").write_text(form)
        self.outcome = Outcome()

    def _write_checkpoints(self) -> None:
        """A model whose weights all move a little from save to save; every fifth time a block's move far."""
        model = zoo.build("llama")
        generator = torch.Generator().manual_seed(0)
        for index, step in enumerate(self.steps):
            zoo.save(model, self.folder / "to come", step=step)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    far = 30.0 if index % 5 == 1 and ".layers.1." in name else 1.0
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.add_(noise, alpha=far * 0.001 * float(weight.norm()) / weight.numel() ** 0.5)

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "peel_agent", "watch", "-c", str(self.folder / "peel.toml")]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment_of(self.folder))

    def read(self, sql: str) -> list[Any]:
        return read_ledger(self.state, sql)

    def kill(self, kills: int) -> None:
        """So many kills at random instants, while the checkpoints come one after another.

        Then an agent is left alone until all is done and sent.
        """
        agent = self.start()
        to_come = list(self.steps)
        for number in range(kills):
            if to_come and number >= (len(self.steps) - len(to_come)) * kills // len(self.steps):
                name = f"checkpoint-{to_come.pop(0)}"
                (self.folder / "to come" / name).rename(self.root / name)
            time.sleep(self.random.uniform(*PAUSES))
            child = self._child(agent) if self.random.random() < 0.4 else None
            if child is not None:
                self.outcome.kills["child"] += 1
                os.kill(child, signal.SIGKILL)
                continue
            self.outcome.kills["agent"] += 1
            agent.kill()
            agent.wait()
            agent = self.start()
        while agent.poll() is None and not self._is_done():
            time.sleep(1)
        agent.terminate()
        agent.wait(30)

    def _child(self, agent: subprocess.Popen[bytes]) -> int | None:
        """The peeling child, or (one time in four) the courier; None when a further death would be one too many."""
        kind = "courier" if self.random.random() < 0.25 else "worker"
        if kind == "worker" and any(deaths >= DEATHS_ALLOWED for (deaths,) in self.read("SELECT deaths FROM jobs")):
            return None
        try:
            processes = psutil.Process(agent.pid).children(recursive=True)
            named = [one.pid for one in processes if any(f"peel_agent.{kind}" in word for word in one.cmdline())]
            return self.random.choice(named) if named else None  # a worker, or what it was forked from
        except psutil.Error:
            pass
        return None

    def _is_done(self) -> bool:
        peeled = self.read("SELECT count(*) FROM checkpoints WHERE outcome = 'peeled'")
        owed = self.read("SELECT count(*) FROM deliveries")
        return bool(peeled and peeled[0][0] == len(self.steps) and owed[0][0] == 0)

    def judge(self) -> Outcome:
        """Whether everything is there once, and nothing was lost."""
        outcome, count = self.outcome, len(self.steps)
        outcomes = Counter(what for (what,) in self.read("SELECT outcome FROM checkpoints"))
        outcome.check(
            outcomes == {"peeled": count}, f"{count} checkpoints peeled, none failed or lost: {dict(outcomes)}"
        )
        tallies = dict(self.read("SELECT what, amount FROM tallies"))
        outcome.check(tallies.get("answered") == count, f"each has one answer: {tallies.get('answered')}")
        outcome.check(not self.read("SELECT 1 FROM jobs"), "no job is left")
        client = mlflow_client(self.uri)
        experiment = client.get_experiment_by_name("kills")
        runs = client.search_runs([experiment.experiment_id])
        outcome.check(len(runs) == 1, f"one run in MLflow: {len(runs)}")
        points = Counter(point.step for point in client.get_metric_history(runs[0].info.run_id, "peel/loss"))
        outcome.check(points == Counter(self.steps), f"each step once in MLflow: {sorted(points.items())}")
        files = {file.path for file in client.list_artifacts(runs[0].info.run_id, "peel/checkpoints")}
        outcome.check(len(files) == count, f"each report in MLflow: {len(files)}")
        alerts = {json.loads(line)["id"] for (line,) in self.read("SELECT line FROM alerts")}
        notices = [one["id"] for line in self._notices() for one in line["notices"]]
        outcome.check(set(notices) == alerts and bool(alerts), f"each of {len(alerts)} notices at the sink")
        groups = [line["id"] for line in self._notices()]
        outcome.check(len(groups) == len(set(groups)), f"each group once in the sink's file: {len(groups)}")
        print(f"killed: {dict(outcome.kills)}; workers that died: {tallies.get('worker_died', 0):.0f}", flush=True)
        return outcome

    def _notices(self) -> list[dict[str, Any]]:
        file = self.state / "notices.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kill_at_random(folder: Path, uri: str, *, kills: int, checkpoints: int, seed: int) -> Outcome:
    killed = Killed(folder, uri, checkpoints, seed)
    killed.kill(kills)
    return killed.judge()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        (folder / "server").mkdir()
        with mlflow_server(folder / "server", free_port()) as uri:
            outcome = kill_at_random(
                folder, uri, kills=options.kills, checkpoints=options.checkpoints, seed=options.seed
            )
    return int(bool(outcome.wrong))


if __name__ == "__main__":
    sys.exit(main())
