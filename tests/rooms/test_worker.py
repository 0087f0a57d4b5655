"""What keeps a worker within its bounds: memory, progress, and nothing imported from where it happens to run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from peel_agent import worker
from peel_agent.config import ModelSettings, PeelSettings, ProbeSettings
from peel_agent.errors import WorkerError
from peel_agent.records import CheckpointRef
from peel_agent.worker import STALL_SECONDS, Request, ask, cgroup_limits, command
from tests.waiting import wait_for

REQUEST = Request(
    ref=CheckpointRef(Path("/nowhere/checkpoint-1"), 1, "transformers", "f", 0.0, held=Path("/held/checkpoint-1")),
    probe=ProbeSettings(),
    peel=PeelSettings(),
    model=ModelSettings(factory="own_model:factory"),
    device="cpu",
    nice=0,
    memory_fraction=0.25,
    copy_to=Path("/held"),
)


def python(program: str, text: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program in a fresh interpreter."""
    command = [sys.executable, "-P", "-c", program]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=cwd)


def test_a_request_comes_back_as_it_was() -> None:
    """What the parent asks for survives the pipe to the worker."""
    assert Request.from_json(REQUEST.to_json()) == REQUEST


@pytest.mark.parametrize(("fraction", "fits"), [(1.0, True), (0.02, False)])
def test_memory_is_limited(fraction: float, fits: bool) -> None:
    """Above its fraction an allocation fails in the worker, as an error that it can answer with."""
    ran = python(
        "import psutil, torch\n"
        "from pathlib import Path\n"
        "from peel_agent.worker import cgroup_limits, limit_memory\n"
        f"limit_memory({fraction}, 'cpu')\n"
        "limits = cgroup_limits(Path('/proc/self/cgroup'), Path('/sys/fs/cgroup'))\n"
        "size = min([psutil.virtual_memory().total, *limits]) // 20\n"
        "try: torch.empty(size, dtype=torch.uint8)\n"
        "except (RuntimeError, MemoryError): print('refused')\n"
        "else: print('fits')\n"
    )
    assert ran.stdout.strip() == ("fits" if fits else "refused"), ran.stderr


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    """The memory limits of the control group and of those above it, without those that say `max`."""
    (tmp_path / "own").write_text("1:name=x:/else\n0::/kube/pod\n")
    for folder, text in (("kube/pod", "max\n"), ("kube", "4096\n")):
        (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / folder / "memory.max").write_text(text)
    assert cgroup_limits(tmp_path / "own", tmp_path / "root") == [4096]
    assert cgroup_limits(tmp_path / "not there", tmp_path) == []


def answered(measure: str, stall: int) -> subprocess.CompletedProcess[str]:
    """A worker with this STALL_SECONDS that has nothing to do but `measure`: indented lines, to which `progress` is
    known.
    """
    return python(
        "import signal, time\n"
        "from peel_agent import pipeline, worker\n"
        "from peel_agent.errors import CheckpointError\n"
        f"worker.STALL_SECONDS = {stall}\n"
        "def measure(ref, *, progress, **_):\n"
        f"{measure}"
        "    raise CheckpointError('done', remedy='')\n"
        "pipeline.measure = measure\n"
        "raise SystemExit(worker.main())\n",
        Request.from_json(REQUEST.to_json().replace('"/held"', "null")).to_json(),
    )


def test_a_worker_that_stands_still_ends() -> None:
    """Without progress for STALL_SECONDS it is ended."""
    ran = answered("    time.sleep(600)\n", stall=1)
    assert ran.returncode == -signal.SIGALRM, ran.stderr


def test_progress_sets_the_time_anew() -> None:
    """However little of it is left, each sign of progress gives a worker all of STALL_SECONDS."""
    ran = answered(
        "    for done in range(8):\n"
        "        signal.alarm(600)\n"
        "        progress('margins', done, 8)\n"
        "        assert signal.getitimer(signal.ITIMER_REAL)[0] > 1200\n",
        stall=3600,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_parent_says_that_it_stood_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker ended by its alarm is told in words, not as a signal's name."""
    script = tmp_path / "worker"
    script.write_text("#!/bin/sh\nkill -ALRM $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(script))
    with pytest.raises(WorkerError, match=f"no progress in {STALL_SECONDS} s"):
        ask(REQUEST, {}, started=lambda _: None)


def test_nothing_is_imported_from_the_working_directory(tmp_path: Path) -> None:
    """A torch.py or numpy.py in a checkpoint's folder is not run when the daemon's working directory is that folder."""
    for name in ("torch", "numpy", "transformers", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nraise SystemExit(7)\n")
    ran = subprocess.run(
        command(),
        input="{}",
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "TypeError" in ran.stderr  # it read the request with the real json
    assert not (tmp_path / "canary").exists()


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """When the daemon is killed its worker does not go on beside the next one's."""
    program = (
        "import subprocess, sys, time\n"
        "from peel_agent.worker import command\n"
        "child = subprocess.Popen(command(), stdin=subprocess.PIPE)\n"  # it waits for its request
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.communicate()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
