"""A SLURM of one node: slurmctld, slurmd and munged of Debian, with all that they keep in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.servers import free_port
from tests.waiting import wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel")

# A requeued job waits for cred_expire (120 s by default): started sooner, the node refuses it as one that was killed.
CONFIGURATION = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=training Nodes={host} Default=YES
PartitionName=cheap Nodes={host}
"""


def missing() -> list[str]:
    """The programs that are not installed here: `apt-get install slurmctld slurmd slurm-client munge`."""
    return [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]


class Cluster:
    """Its jobs write what they say to JOB.log in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, *command: str, **environment: str) -> str:
        """What a program of SLURM says; AssertionError with its errors when it fails."""
        variables = {**os.environ, **environment, "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=variables, cwd=self.folder)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.log()}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str, **environment: str) -> str:
        """The id of the job; its environment is ours and this."""
        return self.do("sbatch", "--parsable", "--output=%j.log", *options, str(script), **environment)

    def state(self, job: str) -> str:
        """Of a job, also of one that ended a moment ago: RUNNING, PENDING, COMPLETED, FAILED, ..."""
        return dict(self._shown(job))["JobState"]

    def exit_status(self, job: str) -> int:
        return int(dict(self._shown(job))["ExitCode"].partition(":")[0])

    def restarts(self, job: str) -> int:
        return int(dict(self._shown(job))["Restarts"])

    def steps(self, job: str) -> set[str]:
        """The names of the steps of a job that run now."""
        return set(self.do("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%j").split())

    def said(self, job: str) -> str:
        log = self.folder / f"{job}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def wait(self, job: str, *states: str) -> None:
        wait_for(lambda: self.state(job) in states, 400)

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.out")))

    def _shown(self, job: str) -> list[tuple[str, str]]:
        shown = self.do("scontrol", "--oneliner", "show", "job", job)
        return [(key, value) for key, _, value in (field.partition("=") for field in shown.split())]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """It runs, and at the end nothing of it or of its jobs does."""
    for name in ("controller", "node"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, ports=[free_port(), free_port()])
    (folder / "slurm.conf").write_text(text)
    munged = ["--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
    running: list[subprocess.Popen[bytes]] = []
    made = Cluster(folder)
    try:
        for command in (["munged", *munged], ["slurmctld", "-D"], ["slurmd", "-D"]):
            running.append(_started(folder, command))
            wait_for((folder / "munge.socket").exists)
        wait_for(lambda: "idle" in _answer(made), 120)
        yield made
    finally:
        if len(running) == 3:  # a job outlives the node's daemon
            made.do("scancel", "--full", f"--user={os.getuid()}")
            wait_for(lambda: made.do("squeue", "--noheader") == "")
        for process in reversed(running):
            process.terminate()
            process.wait(60)


def _started(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    environment["PATH"] += ":/usr/sbin"
    with (folder / f"{command[0]}.out").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _answer(made: Cluster) -> str:
    try:
        return made.do("sinfo", "--noheader", "--format=%t")
    except AssertionError:
        return ""
