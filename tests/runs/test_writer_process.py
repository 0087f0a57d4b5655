"""A trainer that writes slowly, rotates and is killed, with the agent beside it: real processes on one directory."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from peel_agent.pipeline import scan
from peel_agent.records import PeelSettings, ProbeSettings
from tests import zoo
from tests.runs.command import environment_of
from tests.waiting import wait_for

CONFIGURATION = """
[watch]
settle_seconds = 1
poll_seconds = 0.5
backlog = "all"
[probe]
sequence_length = 12
[peel]
quantities = ["bounds"]
maps = [[4]]
[tracker]
use = ["jsonl"]
"""
VERSIONS = 6
KILLED = (1, 3)
KEEP = 1


def test_only_whole_checkpoints_are_published_and_each_once(tmp_path: Path) -> None:
    """Every checkpoint that was finished has one report with the loss of its own weights, though only one is kept.

    Those whose writer was killed have none. The agent's worker may run with other numbers of threads than this
    process, and sums in another order differ in their last digits.
    """
    run, probe = tmp_path / "run", tmp_path / "probe.npy"
    run.mkdir()
    np.save(probe, zoo.token_ids(200, 3))
    (tmp_path / "peel.toml").write_text(CONFIGURATION)
    model = zoo.build("llama", steps=5)
    losses = {}
    for version in range(VERSIONS):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.2)
        model.save_pretrained(tmp_path / str(version))
        settings = PeelSettings(quantities=("bounds",), maps=((4,),))
        report = scan(
            tmp_path / str(version),
            probe=ProbeSettings(path=probe, sequence_length=12),
            peeling=settings,
            clock=itertools.count().__next__,
        )
        losses[10 * (version + 1)] = report.loss.value
    watch = ["watch", run, "-c", tmp_path / "peel.toml", "--probe", probe, "--json"]
    command = [sys.executable, "-m", "peel_agent", *map(str, watch)]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        agent = subprocess.Popen(command, stdout=out, stderr=err, env=environment_of(tmp_path))
        try:
            wait_for(lambda: "watching" in (tmp_path / "err").read_text())
            dice, finished = random.Random(7), []
            for version in range(VERSIONS):
                step = 10 * (version + 1)
                arguments = [run, tmp_path / str(version), step, KEEP, version]
                writer = subprocess.Popen([sys.executable, "-m", "tests.runs.restless_writer", *map(str, arguments)])
                if version in KILLED:
                    wait_for((run / f"checkpoint-{step}").exists)
                    time.sleep(dice.uniform(0.0, 0.3))
                    writer.kill()
                    assert writer.wait() == -signal.SIGKILL
                else:
                    assert writer.wait() == 0
                    finished.append(step)
                    wait_for(partial(_seen, tmp_path, step))
            wait_for(lambda: len((tmp_path / "out").read_text().splitlines()) >= len(finished))
            time.sleep(2)  # a second report of one, or a first of another, would come now
        finally:
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(240) == 0, (tmp_path / "err").read_text()
    reports = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [report["checkpoint"]["step"] for report in reports] == finished
    assert {report["checkpoint"]["step"]: report["loss"]["value"] for report in reports} == {
        step: pytest.approx(losses[step], abs=1e-5) for step in finished
    }
    assert np.diff(sorted(losses.values())).min() > 1e-3  # no other checkpoint has the same
    assert len([path for path in run.glob("checkpoint-*") if (path / "trainer_state.json").exists()]) == KEEP


def _seen(home: Path, step: int) -> bool:
    """The agent holds the checkpoint or has published it: the next one may be written, and this one rotated."""
    held = any((home / "peel-agent").glob(f"*/runs/*/pins/*/checkpoint-{step}"))
    return held or f'"step": {step},' in (home / "out").read_text()
