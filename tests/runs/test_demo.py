"""The front door: `peel-agent demo`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peel_agent.demo.show import STALL_SECONDS, Signs
from tests.runs.command import environment_of
from tests.runs.conftest import Train
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


SMALL = {"PEEL__PROBE__FIT_TOKENS": "8192", "PEEL__PROBE__SELECT_TOKENS": "2048", "PEEL__PROBE__CONFIRM_TOKENS": "8192"}


def demo(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "peel_agent", "demo", "--keep", str(folder / "demo"), *arguments]
    with (folder / "out").open("ab") as out, (folder / "err").open("ab") as err:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env=environment_of(folder, **variables),
        )


@pytest.mark.parametrize("last", [400, pytest.param(100, marks=pytest.mark.long)])
def test_demo_is_interrupted_goes_on_and_finds_the_block_it_held_back(last: int, train: Train, tmp_path: Path) -> None:
    """Ctrl-C after the first checkpoint says how to go on, and keeps what was measured. Then, from the last checkpoint
    on: the held-back block is found, the alert fires, and the end says where to look, by commands that are there.

    The steps from 100 to 400 are those of the same training that other tests made, and the probe is smaller; as a long
    test all of it is as a user has it.
    """
    out, checkpoints = tmp_path / "out", tmp_path / "demo" / "checkpoints"
    probe = SMALL if last > 100 else {}
    first = demo(tmp_path, **probe)
    try:
        wait_for(lambda: (checkpoints / "checkpoint-100" / "trainer_state.json").exists() or first.poll() is not None)
        wait_for(lambda: "demo: training step " in out.read_text() or first.poll() is not None)
        os.killpg(first.pid, signal.SIGINT)
        assert first.wait(240) == 130, (tmp_path / "err").read_text()
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGTERM)
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said + out.read_text()
    sentence = said.splitlines()[-1]
    assert re.search(r"interrupted at training step \d+ of 500; `.*demo --keep .*` goes on from the last", sentence)
    assert not (checkpoints / "checkpoint-500").exists()

    if last > 100:
        shutil.copytree(train("llama", False) / f"checkpoint-{last}", checkpoints / f"checkpoint-{last}")
    shown = out.read_text()
    assert demo(tmp_path, **probe).wait(1200) == 0, out.read_text() + (tmp_path / "err").read_text()
    printed = out.read_text().removeprefix(shown)
    assert "going on with the one that was begun there" in printed
    steps = [int(step) for step in re.findall(r"^demo: training step (\d+) of 500, loss \d", printed, re.MULTILINE)]
    assert min(steps) > last
    assert "ALERT firing: model.layers.3" in printed
    assert "Finding: model.layers.3 was never trained" in printed
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/demo/mlflow.db" in printed
    assert f"peel_agent watch {checkpoints}" in printed
    assert f"peel_agent report --state {tmp_path}/demo/state --out report.html" in printed
    (report,) = [line.split()[-1] for line in printed.splitlines() if line.startswith("Report:")]
    assert Path(report).is_file()

    other = demo(tmp_path, "--healthy")
    assert other.wait(240) == 2
    assert "begun with other options" in (tmp_path / "err").read_text()


def test_it_waits_as_long_as_there_is_progress(tmp_path: Path) -> None:
    """A line of the training or of the sidecar now and then is enough, whatever it takes altogether; silence is not."""
    log, seconds = tmp_path / "log", [0.0]
    signs = Signs(log, lambda: seconds[0])
    assert signs.look() == []
    for step in range(20, 520, 20):
        seconds[0] += 0.9 * STALL_SECONDS
        with log.open("a") as file:
            file.write(f"warming up\nstep {step} of 500, loss 2.5\nstep {step + 1} of")
        assert signs.look() == [f"step {step} of 500, loss 2.5"]
        with log.open("a") as file:
            file.write("\n")
        assert not signs.have_ceased
        assert signs.step == step
        signs.look()
    seconds[0] += 0.9 * STALL_SECONDS
    signs.give()  # the sidecar's
    seconds[0] += 0.9 * STALL_SECONDS
    assert not signs.have_ceased
    seconds[0] += 0.2 * STALL_SECONDS
    assert signs.have_ceased


def test_make_demo_installs_what_it_needs_and_says_so(tmp_path: Path) -> None:
    """Nothing of the tests is installed for it, and each step of the set-up is named before it begins."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    make = ["make", "--dry-run", "demo"]
    planned = subprocess.run(make, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    (install,) = [line for line in planned.splitlines() if "pip install" in line]
    assert '-e ".[demo]"' in install
    assert "--quiet" not in install
    assert [f"{number} of 3" in planned for number in (1, 2, 3)] == [True] * 3
    assert planned.index("2 of 3") < planned.index("pip install") < planned.index("3 of 3")
