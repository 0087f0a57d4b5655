"""What keeps a worker within its bounds: memory, progress, and nothing imported from where it happens to run."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from peel_agent.errors import CheckpointError, GaveWay, PeelError, WorkerError
from peel_agent.records import (
    CheckpointRef,
    DeviceLease,
    ModelSettings,
    Peeled,
    PeelSettings,
    ProbeSettings,
    Request,
    plain,
    restored,
)
from peel_agent.worker import OOM_SCORE, be_ended_first, cgroup_limits
from peel_plugins.engines import local
from peel_plugins.engines.local import LocalEngine, command
from tests.rooms.test_publish_form import FULL
from tests.waiting import wait_for

REQUEST = Request(
    ref=CheckpointRef(Path("/nowhere/checkpoint-1"), 1, "transformers", "f", 0.0, held=Path("/held/checkpoint-1")),
    probe=ProbeSettings(),
    peel=PeelSettings(),
    model=ModelSettings(factory="own_model:factory"),
    lease=DeviceLease("cpu", "", "cpu", "the only one"),
    nice=0,
    memory_fraction=0.25,
)


def python(program: str, text: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program in a fresh interpreter."""
    command = [sys.executable, "-P", "-c", program]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=cwd)


def test_a_request_comes_back_as_it_was() -> None:
    """What the parent asks for survives the pipe to the worker."""
    assert restored(Request, json.loads(json.dumps(plain(REQUEST)))) == REQUEST


@pytest.mark.parametrize(("fraction", "fits"), [(1.0, True), (0.02, False)])
def test_memory_is_limited(fraction: float, fits: bool) -> None:
    """Above its fraction an allocation fails in the worker, as an error that it can answer with.

    It may take no more than is free, either: here all of the memory is, whatever else this machine does.
    """
    ran = python(
        "import psutil, torch\n"
        "from pathlib import Path\n"
        "memory = psutil.virtual_memory()\n"
        "psutil.virtual_memory = lambda: memory._replace(available=memory.total)\n"
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
        json.dumps(plain(REQUEST)),
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


def test_the_kernel_ends_a_worker_before_the_training() -> None:
    """Where the machine's memory runs out, it is the worker that is ended; one that stands higher stays there."""
    ran = python(
        "from pathlib import Path\n"
        "from peel_agent.worker import be_ended_first\n"
        "score = Path('/proc/self/oom_score_adj')\n"
        "be_ended_first(); print(int(score.read_text()))\n"
        "score.write_text('900'); be_ended_first(); print(int(score.read_text()))\n"
    )
    assert ran.stdout.split() == [str(OOM_SCORE), "900"], ran.stderr
    assert be_ended_first.__doc__


class Children:
    """The local engine with children that do what a shell script says, instead of workers."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.started = folder / "worker", folder / "started"
        monkeypatch.setattr(local, "command", lambda: [str(self.script)])
        monkeypatch.setattr(local.WorkerServers, "start", lambda *_: None)  # each is started by itself
        self.engine = LocalEngine(lambda visible: {"PATH": "/bin:/usr/bin", "CUDA_VISIBLE_DEVICES": visible})

    def does(self, script: str) -> None:
        self.script.write_text(f"#!/bin/sh\necho x >> {self.started}\n{script}\n")
        self.script.chmod(0o755)

    def starts(self) -> int:
        return len(self.started.read_text().splitlines()) if self.started.exists() else 0

    def error(self, script: str) -> PeelError:
        """What becomes of a request."""
        self.does(script)
        error = self.engine.submit(REQUEST).exception(240)
        assert isinstance(error, PeelError)
        return error


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    return Children(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("kill -ALRM $$", WorkerError, "no progress for too long"),
        ("kill -KILL $$", WorkerError, "signal SIGKILL"),
        ("exit 7", WorkerError, "exit status 7"),
        ("exit 0", WorkerError, "IndexError"),
        ("echo no answer", WorkerError, "JSONDecodeError"),
        ("""echo '{"error": {"kind": "CheckpointError", "what": "NaN", "remedy": "r"}}'""", CheckpointError, "NaN"),
        ("""echo '{"error": {"kind": "OfAPlugIn", "what": "odd", "remedy": "r"}}'""", CheckpointError, "odd"),
    ],
)
def test_what_became_of_a_worker(children: Children, script: str, kind: type[PeelError], words: str) -> None:
    """Its death is told in words, its error is raised as what it was, and anything else is a death too."""
    error = children.error(f"cat > /dev/null\n{script}")
    assert type(error) is kind
    assert words in error.what


def test_an_answer_of_a_worker(children: Children, tmp_path: Path) -> None:
    """It sees the device that was leased and gets the request; what it answers comes back, whatever it prints first."""
    peeled = Peeled(FULL, None)
    request, seen, answer = (tmp_path / name for name in ("request", "seen", "answer"))
    children.does(f"cat > {request}; echo [$CUDA_VISIBLE_DEVICES] > {seen}; echo a warning; cat {answer}")
    answer.write_text(json.dumps({"peeled": plain(peeled)}))
    gpu = dataclasses.replace(REQUEST, lease=DeviceLease("cuda:0", "GPU-7", "GPU 7", "idle"))
    assert children.engine.submit(gpu).result(240) == peeled
    assert restored(Request, json.loads(request.read_text())) == gpu
    assert seen.read_text() == "[GPU-7]\n"
    assert children.engine.memory_bytes() is None


def test_a_worker_gives_way(children: Children) -> None:
    """It ends soon, whether it runs or is about to be started; what comes after it is not meant."""
    children.does("exec sleep 600")
    running = children.engine.submit(REQUEST)
    wait_for(lambda: children.starts() == 1)
    wait_for(lambda: (children.engine.memory_bytes() or 0) > 0)  # a child may run before the engine has it on its list
    children.engine.give_way("another", "not meant")
    children.engine.give_way(REQUEST.ref.fingerprint, "somebody is on the GPU")
    starting = children.engine.submit(
        dataclasses.replace(REQUEST, ref=dataclasses.replace(REQUEST.ref, fingerprint="g"))
    )
    children.engine.give_way("g", "its run was ended")
    for answer, why in ((running, "somebody is on the GPU"), (starting, "its run was ended")):
        error = answer.exception(240)
        assert isinstance(error, GaveWay)
        assert error.what == why
    assert "exit status 7" in children.error("exit 7").what


def test_an_engine_that_is_closed(children: Children) -> None:
    """Its workers end, and the checkpoint is not blamed; nor is one that is asked for afterwards."""
    children.does("exec sleep 600")
    running = children.engine.submit(REQUEST)
    wait_for(lambda: children.starts() == 1)
    children.engine.close(240)
    assert isinstance(running.exception(240), GaveWay)
    assert isinstance(children.engine.submit(REQUEST).exception(240), GaveWay)


def test_nothing_is_imported_from_the_working_directory(tmp_path: Path) -> None:
    """A torch.py or numpy.py in a checkpoint's folder is not run when the agent's working directory is that folder."""
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
    """When the agent is killed its worker does not go on beside the next one's."""
    program = (
        "import subprocess, sys, time\n"
        "from peel_plugins.engines.local import command\n"
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
