"""What is shipped in deploy/slurm, run by a real SLURM of one node beside real small trainings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from peel_agent.demo.text import corpus
from tests.runs import slurm
from tests.runs.sidecar import read_ledger
from tests.runs.slurm import Cluster
from tests.waiting import wait_for

SHIPPED = Path(__file__).parents[2] / "deploy" / "slurm"
SCRIPTS = sorted(SHIPPED.glob("*.sbatch"))
PEEL_AGENT = Path(sys.executable).parent / "peel-agent"

CONFIGURATION = """\
[watch]
path = "{folder}/checkpoints"
settle_seconds = 1
poll_seconds = 1
backlog = "all"

[probe]
path = "{folder}/heldout.npy"

[peel]
effort = "quick"

[device]
nice = 0

[tracker]
use = ["jsonl"]

[health]
listen = ""
"""

needs_slurm = pytest.mark.skipif(
    bool(slurm.missing()) or os.geteuid() != 0,
    reason=f"as root, with: apt-get install slurmctld slurmd slurm-client munge (missing: {slurm.missing()})",
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one_that_bash_reads_and_keeps_its_requeue(script: Path) -> None:
    """bash parses it; it may be requeued, goes on in the same log, and is warned before its time limit."""
    assert subprocess.run(["bash", "-n", script], check=False, capture_output=True).stderr == b""
    options = {line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")}
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= options
    assert ("--dependency=singleton" in options) == (script.name == "agent.sbatch")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_what_it_needs(script: Path) -> None:
    """Without its variables it ends at once, and names the first that is missing."""
    done = subprocess.run(["bash", script], check=False, capture_output=True, text=True, env={"PATH": os.defpath})
    assert done.returncode != 0
    assert "PEEL_CONFIG: the configuration of the agent" in done.stderr


class Place:
    """A training's folder and its agent's state."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        (folder / "checkpoints").mkdir()
        np.save(folder / "heldout.npy", corpus()[1][: 256 * 128].reshape(-1, 128))
        (folder / "peel.toml").write_text(CONFIGURATION.format(folder=folder))
        train = [sys.executable, "-m", "peel_agent.demo.train", str(folder / "checkpoints")]
        self.training = " ".join([*train, "--width", "32", "--blocks", "2", "--steps", "30", "--save-every", "10"])
        self.environment = {
            "PEEL_CONFIG": str(folder / "peel.toml"),
            "PEEL_STATE": str(self.state),
            "PEEL_AGENT": str(PEEL_AGENT),
            "PEEL_PAUSE": "0.5",
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def peeled(self) -> list[int]:
        rows = read_ledger(self.state, "SELECT step FROM checkpoints WHERE outcome = 'peeled' ORDER BY step")
        return [step for (step,) in rows]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "run").mkdir()
    return Place(tmp_path / "run")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@needs_slurm
@pytest.mark.long
def test_beside_a_training_in_its_allocation(site: Cluster, place: Place) -> None:
    """Both run at the same time in one allocation; every checkpoint is peeled, the last ones after the training's end;
    the job has the training's exit status.
    """
    training = f"{place.training} && exit 7"
    job = site.submit(SHIPPED / "beside.sbatch", TRAINING=training, **place.environment)
    wait_for(lambda: {"peel-agent", "training"} <= site.steps(job))
    site.wait(job, "FAILED")
    assert (place.peeled(), site.exit_status(job)) == ([10, 20, 30], 7), site.said(job)


@needs_slurm
@pytest.mark.long
def test_as_a_job_of_its_own(site: Cluster, place: Place) -> None:
    """On another partition it follows the training's job, goes on after a requeue at its time limit, and ends with it;
    a second one of its name waits.
    """
    go = place.folder / "go"
    waits = f"until [ -e {go} ]; do sleep 0.2; done"
    training = site.submit(_script(place, f"{place.training} && {waits}"), **place.environment)
    options = ("--partition=cheap", "--job-name=agent-of-mine")
    environment = place.environment | {"PEEL_TRAINING_JOB": training}
    agent, second = (site.submit(SHIPPED / "agent.sbatch", *options, **environment) for _ in range(2))
    wait_for(lambda: len(place.peeled()) >= 1, 400)
    assert site.state(second) == "PENDING"
    site.do("scancel", "--batch", "--signal=USR1", agent)  # as the time limit does
    wait_for(lambda: site.restarts(agent) == 1 and site.state(agent) == "PENDING")
    assert "ending; what is not done yet is kept" in site.said(agent)
    site.do("scancel", second)
    wait_for(lambda: place.peeled() == [10, 20, 30], 400)
    assert site.state(agent) == "RUNNING", site.said(agent)
    go.touch()
    site.wait(agent, "COMPLETED")
    assert site.state(training) == "COMPLETED"


@needs_slurm
@pytest.mark.long
def test_a_wrong_configuration_ends_the_job(site: Cluster, place: Place) -> None:
    """Status 2 is final: the job fails with it and is not tried again."""
    (place.folder / "peel.toml").write_text("[watch]\nroot = 1\n")
    job = site.submit(SHIPPED / "agent.sbatch", "--job-name=wrong", "--partition=cheap", **place.environment)
    site.wait(job, "FAILED")
    assert (site.exit_status(job), site.restarts(job)) == (2, 0), site.said(job)


def _script(place: Place, command: str) -> Path:
    """A training's own batch script."""
    script = place.folder / "training.sbatch"
    script.write_text(f"#!/bin/sh\n#SBATCH --job-name=training-of-mine\n{command}\n")
    return script
