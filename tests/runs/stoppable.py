"""An agent that is stopped, by SIGKILL, between any two lines of its own code.

`python -m tests.runs.stoppable` serves trials: a JSON object a line on stdin, its result on stdout. Each trial is a
fork of this process, in which the agent watches a directory with an engine that answers at once. Lines are counted in
the files that the trial names; at the count that it gives, the process kills itself. What was on disk then is there,
and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import peel_agent.agent
import peel_agent.watcher
from peel_agent.agent import Agent
from peel_agent.config import load_settings
from peel_agent.ledger import Ledger
from peel_agent.records import (
    CheckpointInfo,
    Estimate,
    LayerReport,
    ModelInfo,
    Peeled,
    PeelReport,
    ProbeInfo,
    Request,
    Timing,
)

BLOCKS = 4
IDLE = (200, 300, 400)
"""At these steps block 1 earns nothing: its alert fires at the second of them, and is resolved after two others."""


def report_of(request: Request) -> PeelReport:
    """What peeling this checkpoint gives: always the same."""
    ref = request.ref
    return PeelReport(
        checkpoint=CheckpointInfo(ref.label, ref.step, ref.format, ref.fingerprint),
        model=ModelInfo("llama", BLOCKS, 1_000_000, "float32"),
        probe=ProbeInfo("beef", 65_536, 8_192, 16_384, 128),
        loss=Estimate(2.0, 1.9, 2.1),
        bound=None,
        gap=None,
        zone="undecided",
        bounds=(),
        layers=tuple(_layer(index, idle=index == 1 and ref.step in IDLE) for index in range(BLOCKS)),
        redundancy=None,
        skipped=(),
        timing=Timing(0.1, 0.2, 0.3, 0.4),
    )


def _layer(index: int, *, idle: bool) -> LayerReport:
    margin = Estimate(0.0, -0.0002, 0.0002) if idle else Estimate(0.05, 0.04, 0.06)
    return LayerReport(
        index=index,
        name=f"model.layers.{index}",
        status="below" if idle else "above",
        margin=margin,
        best_reference="skip",
        references={"skip": margin.value},
        parts={},
        stream_share=0.1,
    )


class InstantEngine:
    """Answers at once with what `report` gives, and notes in `peels` each checkpoint that it answered for."""

    def __init__(self, peels: Path, report: Callable[[Request], PeelReport] = report_of) -> None:
        self._peels = peels
        self._report = report

    def submit(self, request: Request) -> Future[Peeled]:
        answer: Future[Peeled] = Future()
        with self._peels.open("a") as file:
            file.write(request.ref.fingerprint + "\n")
        answer.set_result(Peeled(self._report(request), None))
        return answer

    def give_way(self, fingerprint: str, why: str) -> None:
        """Nothing runs here."""

    def memory_bytes(self) -> int | None:
        return None

    def close(self, seconds: float) -> None:
        """Nothing runs here."""


class NoDispatch:
    """What is owed stays owed: the test delivers it itself."""

    def __init__(self, *_: object) -> None:
        pass

    def address(self, addresses: Sequence[object]) -> None: ...
    def busy(self, run: str, *, is_busy: bool) -> None: ...
    def owed(self) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...
    def drain(self, seconds: float, *, stopping: object) -> None: ...
    def look(self) -> None: ...

    def unsent(self) -> dict[object, object]:
        return {}

    not_there = False


class Counter:
    """Counts the lines that are run in these files; at `last` the process ends."""

    def __init__(self, files: Sequence[str], last: int | None) -> None:
        self.count = 0
        self._occurrences: dict[tuple[str, int], list[int]] = {}
        self._files = frozenset(files)
        self._last = last

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def points(self) -> list[int]:
        """The counts at which each line was run first, and last."""
        return sorted({count for counts in self._occurrences.values() for count in counts})

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            counts = self._occurrences.setdefault((frame.f_code.co_filename, frame.f_lineno), [])
            counts[1:] = [self.count]  # the first, and the last so far
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


def agent_once(root: Path, state: Path) -> int:
    """The agent over everything that is there now."""
    (root.parent / "probe.npy").touch()
    flags = {
        "watch.path": str(root),
        "watch.settle_seconds": 0.0,
        "watch.poll_seconds": 0.02,
        "watch.keep_free_gb": 0.0,
        "tracker.use": ["jsonl"],
        "probe.path": str(root.parent / "probe.npy"),
        "sink": [{"use": "jsonl"}],
    }
    settings = load_settings(None, flags)
    peel_agent.watcher.LOOK_PAUSE_SECONDS = 0.0
    peel_agent.agent.TICK_SECONDS = 0.02
    peel_agent.agent.Dispatch = NoDispatch  # type: ignore[misc, assignment]
    ledger = Ledger(state)
    said: list[str] = []
    try:
        return Agent(settings, ledger, say=said.append, engine=InstantEngine(state.parent / "peels")).run(once=True)
    finally:
        (state.parent / "said").write_text("\n".join(said))
        ledger.close()


def trial(order: dict[str, Any]) -> dict[str, Any]:
    """One agent in a fork of this process: its exit status, and, of one that lived, the counts of its lines."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        counter = Counter(order["files"], order["last"])
        status = 70
        try:
            threading.settrace(counter.trace)
            sys.settrace(counter.trace)
            status = agent_once(Path(order["root"]), Path(order["state"]))
            sys.settrace(None)
            with os.fdopen(writable, "w") as told:
                json.dump(counter.points(), told)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable, "rb") as told:
        points = told.read()
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "points": json.loads(points) if points else None}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(trial(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
