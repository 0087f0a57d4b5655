"""A trainer that writes slowly, rotates and is killed, with the agent beside it: real processes on one directory."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from peel_agent.pipeline import scan
from peel_agent.records import PeelSettings, ProbeSettings
from tests import zoo
from tests.runs.command import environment_of
from tests.runs.sidecar import Sidecar
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


@pytest.mark.parametrize(("backlog", "peeled"), [("all", [1, 2, 3, 4, 5, 6]), ("latest", [1, 6])])
def test_a_file_that_is_rewritten_in_place(tmp_path: Path, backlog: str, peeled: list[int]) -> None:
    """Saves into one file that come faster than peels: each is held by a copy and peeled with its own step and weights,
    or the newest is, and the others are told by their steps.
    """
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n', GO=str(tmp_path / "go"))
    sidecar.module = "tests.runs.late_agent"
    text = sidecar.file.read_text()
    sidecar.file.write_text(text.replace("settle_seconds = 0", "settle_seconds = 0.2").replace('"all"', f'"{backlog}"'))
    command = [sys.executable, "-m", "tests.runs.overwriting_writer", str(sidecar.root / "ckpt.pt")]
    with (
        sidecar.running(),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer,
    ):
        assert writer.stdin is not None
        assert writer.stdout is not None
        for step in range(1, 7):
            writer.stdin.write(f"{step}\n")
            writer.stdin.flush()
            assert int(writer.stdout.readline()) == step
            wait_for(partial(_is_held, sidecar, step))
        (tmp_path / "go").touch()
        sidecar.wait_for_steps(*peeled)
        wait_for(lambda: sidecar.owed() == 0)
    assert sidecar.peels() == [f"{step}:{step}" for step in peeled]
    assert sidecar.steps("passed over") == [step for step in range(1, 7) if step not in peeled]
    for step in sidecar.steps("passed over"):
        assert f"passed over {sidecar.root / 'ckpt.pt'} (step {step})" in sidecar.said()


def _is_held(sidecar: Sidecar, step: int) -> bool:
    for note in sidecar.state.glob("runs/*/pins/*.json"):
        with suppress(FileNotFoundError):  # it was passed over just now
            if f'"step": {step},' in note.read_text():
                return True
    return False


def _seen(home: Path, step: int) -> bool:
    """The agent holds the checkpoint or has published it: the next one may be written, and this one rotated."""
    held = any((home / "peel-agent").glob(f"*/runs/*/pins/*/checkpoint-{step}"))
    return held or f'"step": {step},' in (home / "out").read_text()
