"""The child process that peels one checkpoint: a request in JSON on stdin, the answer in JSON on stdout.

Its death (out of memory, a crash in a driver) is contained here, and its memory and the device are given back when it
ends. It runs at the niceness asked for, with idle disk priority, so that the training stays first.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from peel_agent import errors
from peel_agent.config import ModelSettings, PeelSettings, ProbeSettings
from peel_agent.errors import PeelError, WorkerError
from peel_agent.records import Before, CheckpointRef, Memory, Peeled, plain, restored

PARENT_SECONDS = 2.0

STALL_SECONDS = 3600
"""A worker that makes no progress for so long (a dead network mount, a file that takes for ever) is ended."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the parent asks for."""

    ref: CheckpointRef
    probe: ProbeSettings
    peel: PeelSettings
    model: ModelSettings
    device: str
    nice: int
    earlier: Memory | None = None
    before: Before | None = None
    """The checkpoint to hold this one against; None when nobody asked for that."""
    keep_sketches: bool = False
    patch: Path | None = None
    memory_fraction: float = 1.0
    copy_to: Path | None = None
    """A folder of pins, when the files are to be copied there before they are read."""

    def to_json(self) -> str:
        return json.dumps(plain(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        return restored(cls, json.loads(text))


def command() -> list[str]:
    """How a worker is started. -P: the working directory may be a checkpoint's, with a torch.py in it."""
    return [sys.executable, "-P", "-m", "peel_agent.worker"]


def ask(
    request: Request, environment: Mapping[str, str], *, started: Callable[[subprocess.Popen[str]], None]
) -> Peeled:
    """The request answered by a child process of its own; `started` gets the child, to end it early.

    Raises WorkerError when it dies, and what it answers with when that is an error of the tree.
    """
    child = subprocess.Popen(  # noqa: S603 - our own interpreter
        command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    started(child)
    try:
        answer, _ = child.communicate(request.to_json())
    finally:
        child.kill()
        status = child.wait()
    if status != 0:
        cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if status == -signal.SIGALRM:
            cause = f"no progress in {STALL_SECONDS} s"
        raise WorkerError(
            f"the worker that peeled it ended with {cause}",
            remedy="its output stands above; SIGKILL usually means that memory ran out",
        )
    return _peeled_from(json.loads(answer.splitlines()[-1]))


def _peeled_from(answer: dict[str, Any]) -> Peeled:
    if "error" in answer:
        error = answer["error"]
        kind: type[PeelError] = getattr(errors, error["kind"], errors.CheckpointError)  # a plug-in may have its own
        raise kind(error["what"], remedy=error["remedy"])
    return restored(Peeled, answer["peeled"])


def main() -> int:
    """Answers one request. An expected error is an answer too; anything else ends the process with a traceback."""
    end_with_parent()
    request = Request.from_json(sys.stdin.read())
    give_way(request.nice)
    share_processors(request.device)
    limit_memory(request.memory_fraction, request.device)
    with quiet_libraries():
        answer = _answer(request)
    sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")
    return 0


def _answer(request: Request) -> dict[str, Any]:
    from peel_agent.pipeline import measure
    from peel_agent.publish import Meter
    from peel_agent.watch import copied

    meter = Meter(_to_stderr, time.monotonic, terminal=sys.stderr.isatty())
    signal.alarm(STALL_SECONDS)

    def progress(stage: str, done: int, total: int) -> None:
        signal.alarm(STALL_SECONDS)
        meter(stage, done, total)

    try:
        ref = request.ref if request.copy_to is None else copied(request.ref, request.copy_to)
        peeled = measure(
            ref,
            probe=request.probe,
            peeling=request.peel,
            model=request.model,
            patch=request.patch,
            device=request.device,
            clock=time.perf_counter,
            earlier=request.earlier,
            before=request.before,
            keep_sketches=request.keep_sketches,
            progress=progress,
        )
        return {"peeled": plain(peeled)}
    except PeelError as error:
        return {"error": {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy}}
    finally:
        meter.close()


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def end_with_parent() -> None:
    """Ends this process when its parent is gone: a new parent would start another beside it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def give_way(niceness: int) -> None:
    """Lowers this process's processor and disk priority."""
    import psutil

    process = psutil.Process()
    process.nice(max(niceness, process.nice()))
    if hasattr(process, "ionice"):
        process.ionice(psutil.IOPRIO_CLASS_IDLE)


def share_processors(device: str) -> None:
    """On the CPU, takes half of the processors at most: two processes with a thread each on every core both crawl."""
    import psutil
    import torch

    if device == "cpu":
        torch.set_num_threads(max(1, len(psutil.Process().cpu_affinity()) // 2))


def limit_memory(fraction: float, device: str) -> None:
    """Takes at most this fraction of the GPU's memory, or of the machine's (its cgroup's, in a container).

    What does not fit is an allocation error, for which fewer sequences are run at once, and at last an error of this
    process alone; the training's memory is not touched.
    """
    import psutil
    import torch

    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(fraction, torch.device(device))
        return
    limits = cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    total = min([psutil.virtual_memory().total, *limits])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(fraction * total)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def cgroup_limits(own: Path, root: Path) -> list[int]:
    """The memory limits in bytes of this process's control group (version 2) and of those above it."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    limits = []
    for folder in [] if path is None else [root / path, *(root / path).parents]:
        try:
            limits.append(int((folder / "memory.max").read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such file at the root, or "max"
            continue
    return limits


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps hints of libraries, written for people who build models, out of the log, and stdout for our own data.

    Some that transformers imports where they are installed log and print as they are loaded.
    """
    for name in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    sys.exit(main())
