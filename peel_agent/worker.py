"""The child process that peels one checkpoint: a request in JSON on stdin, the answer in JSON on stdout.

Its death (out of memory, a crash in a driver) is contained here, and its memory and the device are given back when it
ends. It runs at the niceness asked for, with idle disk priority, so that the training stays first.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peel_agent import errors
from peel_agent.config import ModelSettings, PeelSettings, ProbeSettings
from peel_agent.errors import PeelError, WorkerError
from peel_agent.publish import report_from_json
from peel_agent.records import CheckpointRef, FileStamp, Memory, Peeled, WeightSet, restored


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
    patch: Path | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Request:
        raw = json.loads(text)
        ref, probe, peel = raw["ref"], raw["probe"], raw["peel"]
        files = tuple(FileStamp(**stamp) for stamp in ref.pop("files"))
        paths = {key: Path(probe[key]) for key in ("path", "tokenizer") if probe[key] is not None}
        maps = peel["maps"] if isinstance(peel["maps"], str) else tuple(tuple(own) for own in peel["maps"])
        return cls(
            ref=CheckpointRef(**(ref | {"path": Path(ref["path"]), "files": files})),
            probe=ProbeSettings(**(probe | paths)),
            peel=PeelSettings(**(peel | {"maps": maps})),
            model=ModelSettings({glob: WeightSet(**own) for glob, own in raw["model"]["precision"].items()}),
            device=raw["device"],
            nice=raw["nice"],
            earlier=None if raw["earlier"] is None else restored(raw["earlier"]),
            patch=None if raw["patch"] is None else Path(raw["patch"]),
        )


def ask(
    request: Request, environment: Mapping[str, str], *, started: Callable[[subprocess.Popen[str]], None]
) -> Peeled:
    """The request answered by a child process of its own; `started` gets the child, to end it early.

    Raises WorkerError when it dies, and what it answers with when that is an error of the tree.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "peel_agent.worker"],
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
        raise WorkerError(
            f"the worker that peeled it ended with {cause}",
            remedy="its output stands above; SIGKILL usually means that memory ran out",
        )
    return _peeled_from(json.loads(answer.splitlines()[-1]))  # a library may have printed before


def _peeled_from(answer: dict[str, Any]) -> Peeled:
    if "error" in answer:
        error = answer["error"]
        kind: type[PeelError] = getattr(errors, error["kind"], errors.CheckpointError)  # a plug-in may have its own
        raise kind(error["what"], remedy=error["remedy"])
    memory = answer["memory"]
    return Peeled(report_from_json(answer["report"]), None if memory is None else restored(memory))


def main() -> int:
    """Answers one request. An expected error is an answer too; anything else ends the process with a traceback."""
    request = Request.from_json(sys.stdin.read())
    give_way(request.nice)
    share_processors(request.device)
    quieten_libraries()
    from peel_agent.pipeline import measure
    from peel_agent.publish import Meter, report_json

    meter = Meter(_to_stderr, time.monotonic, terminal=sys.stderr.isatty())
    try:
        peeled = measure(
            request.ref,
            probe=request.probe,
            peeling=request.peel,
            model=request.model,
            patch=request.patch,
            device=request.device,
            clock=time.perf_counter,
            earlier=request.earlier,
            progress=meter,
        )
        memory = None if peeled.memory is None else dataclasses.asdict(peeled.memory)
        answer: dict[str, Any] = {"report": report_json(peeled.report), "memory": memory}
    except PeelError as error:
        answer = {"error": {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy}}
    meter.close()
    sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")
    return 0


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


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


def quieten_libraries() -> None:
    """Keeps transformers' hints, written for people who build models, out of the log."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
