"""The child process that peels one checkpoint: a request in JSON on stdin, the answer in JSON on stdout.

Its death (out of memory, a crash in a driver) is contained here, and its memory and the device are given back when it
ends. It runs at the niceness asked for, with idle disk priority, so that the training stays first.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from peel_agent.elsewhere import Elsewhere, received
from peel_agent.errors import PeelError
from peel_agent.records import Progress, Request, plain, restored

PARENT_SECONDS = 2.0

OOM_SCORE = 800
"""Of 1,000: what the kernel adds to this process's share of memory when it chooses whom to end."""

AVAILABLE_FRACTION = 0.9
"""Of the memory that is free when a worker begins, it takes at most this."""

STALL_SECONDS = 3600
"""A worker that makes no progress for so long (a dead network mount, a file that takes for ever) is ended."""


def main() -> int:
    """Answers one request. An expected error is an answer too; anything else ends the process with a traceback."""
    end_with_parent()
    request = restored(Request, json.loads(sys.stdin.read()))
    stay_second(request.nice, request.memory_fraction, request.lease.name, request.threads)
    with quiet_libraries():
        answer = _answer(request)
    sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")
    return 0


def _answer(request: Request) -> dict[str, Any]:
    from peel_agent.pipeline import measure
    from peel_agent.publish import Meter

    meter = Meter.on(sys.stderr, time.monotonic)
    signal.alarm(STALL_SECONDS)

    def progress(stage: str, done: int, total: int) -> None:
        signal.alarm(STALL_SECONDS)
        meter(stage, done, total)

    helpers = None
    try:
        if request.piece is not None:
            return {"losses": _piece_losses(request, request.piece, progress)}
        if request.helpers is not None:
            helpers = Elsewhere(request.helpers, request.pieces, alive=lambda: signal.alarm(STALL_SECONDS))
        peeled = measure(
            request.ref,
            probe=request.probe,
            peeling=request.peel,
            model=request.model,
            patch=request.patch,
            device=request.lease.name,
            clock=time.perf_counter,
            earlier=request.earlier,
            before=request.before,
            keep_sketches=request.keep_sketches,
            progress=progress,
            helpers=helpers,
        )
        return {"peeled": plain(peeled)}
    except PeelError as error:
        return {"error": {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy}}
    finally:
        meter.close()
        if helpers is not None:
            helpers.close()


def _piece_losses(request: Request, place: Path, progress: Progress) -> list[str]:
    """The losses of the piece that waits at a socket, to the last bit."""
    from peel_agent.piece import measure_piece

    losses = measure_piece(
        request.ref,
        received(place),
        probe=request.probe,
        peeling=request.peel,
        model=request.model,
        patch=request.patch,
        device=request.lease.name,
        progress=progress,
    )
    return [float(loss).hex() for loss in losses]


def end_with_parent() -> None:
    """Ends this process when its parent is gone: a new parent would start another beside it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stay_second(niceness: int, memory_fraction: float, device: str, threads: int | None = None) -> None:
    """Lets the training have processor, disk and memory first, and be spared when memory runs out."""
    give_way(niceness)
    be_ended_first()
    share_processors(device, threads)
    limit_memory(memory_fraction, device)


def be_ended_first() -> None:
    """When the machine's memory runs out, the kernel ends this process rather than the training."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError, ValueError):  # not Linux
        score.write_text(str(max(int(score.read_text()), OOM_SCORE)))


def give_way(niceness: int) -> None:
    """Lowers this process's processor and disk priority.

    Where the kernel shares processors out by session first ("autogroup"), a process's niceness counts only within its
    session: that of a session of our own is lowered too.
    """
    import psutil

    process = psutil.Process()
    process.nice(max(niceness, process.nice()))
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # there are no autogroups here
            Path("/proc/self/autogroup").write_text(str(process.nice()))
    if hasattr(process, "ionice"):
        process.ionice(psutil.IOPRIO_CLASS_IDLE)


def share_processors(device: str, threads: int | None = None) -> None:
    """Computes with these threads, or on the CPU with one for every second processor: two processes with a thread each
    on every core both crawl.
    """
    import psutil
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif device == "cpu":
        torch.set_num_threads(max(1, len(psutil.Process().cpu_affinity()) // 2))


def limit_memory(fraction: float, device: str) -> None:
    """Takes at most this fraction of the GPU's memory, or of the machine's (its cgroup's, in a container).

    On the CPU it takes no more than is free, either. What does not fit is an allocation error, for which fewer
    sequences are run at once, and at last an error of this process alone; the training's memory is not touched.
    """
    import psutil
    import torch

    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(fraction, torch.device(device))
        return
    limits = cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    memory = psutil.virtual_memory()
    total = min([memory.total, *limits])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(min(fraction * total, psutil.Process().memory_info().data + AVAILABLE_FRACTION * memory.available))
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
