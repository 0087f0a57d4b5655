"""The child process that peels one checkpoint: a request in JSON on stdin, the answer in JSON on stdout.

Its death (out of memory, a crash in a driver) is contained here, and its memory and the device are given back when it
ends. It runs at the niceness asked for, with idle disk priority, so that the training stays first.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from peel_agent.config import PeelSettings, ProbeSettings
from peel_agent.errors import PeelError
from peel_agent.records import BoundMemory, CheckpointRef, FileStamp


@dataclasses.dataclass(frozen=True)
class Request:
    """What the parent asks for."""

    ref: CheckpointRef
    probe: ProbeSettings
    peel: PeelSettings
    device: str
    nice: int
    earlier: BoundMemory | None

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
            device=raw["device"],
            nice=raw["nice"],
            earlier=None if raw["earlier"] is None else BoundMemory.restored(raw["earlier"]),
        )


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
