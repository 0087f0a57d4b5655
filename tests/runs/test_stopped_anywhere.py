"""The nine invariants of the runtime: the agent is killed between two lines of its own code, and started again.

Every line is tried by `pytest -m long tests/runs/test_stopped_anywhere.py`; some in the usual run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import peel_agent.intake
import peel_agent.judging
import peel_agent.ledger.database
import peel_agent.ledger.files
import peel_agent.ledger.run
import peel_agent.run
import peel_agent.watch.pins
import peel_agent.watch.queue
import peel_agent.watcher
from peel_agent.deliver import Carrier
from peel_agent.destinations import Address
from peel_agent.ledger import Lane, Outbox, open_beside
from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.sidecar import read_ledger

STEPS = (100, 200, 300, 400, 500, 600)
WRITTEN = time.time()
"""Unix seconds, the same for every stage: an alert is told from others by the checkpoint with which it began."""

MODULES = (
    peel_agent.run,
    peel_agent.intake,
    peel_agent.judging,
    peel_agent.ledger.run,
    peel_agent.ledger.files,
    peel_agent.ledger.database,
    peel_agent.watcher,
    peel_agent.watch.pins,
    peel_agent.watch.queue,
)
"""Where a checkpoint's life is led, line by line."""

FILES = [str(module.__file__) for module in MODULES]


class Stage:
    """A watched directory, an agent's state, and the process that agents are forked from."""

    def __init__(self, folder: Path, zygote: subprocess.Popen[str]) -> None:
        self.folder, self.root, self.state = folder, folder / "checkpoints", folder / "state"
        self._zygote = zygote
        for step in STEPS:
            for file in write_checkpoint(self.root / f"checkpoint-{step}", step).iterdir():
                os.utime(file, (WRITTEN + step / 1000,) * 2)

    def agent(self, last: int | None = None) -> dict[str, Any]:
        """One agent to its end, or to this line."""
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        order = {"root": str(self.root), "state": str(self.state), "files": FILES, "last": last}
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()
        answer: dict[str, Any] = json.loads(self._zygote.stdout.readline())
        return answer

    def read(self, sql: str) -> list[Any]:
        return read_ledger(self.state, sql)

    @property
    def run_folder(self) -> Path:
        (folder,) = (self.state / "runs").iterdir()
        return folder

    def peels(self) -> list[str]:
        file = self.folder / "peels"
        return file.read_text().split() if file.exists() else []

    def answered(self) -> set[str]:
        """The checkpoints whose answer is on disk."""
        kept = self.read("SELECT fingerprint FROM jobs WHERE state = 'answered'")
        done = self.read("SELECT fingerprint FROM checkpoints WHERE outcome = 'peeled'")
        return {fingerprint for (fingerprint,) in [*kept, *done]}

    def deliver(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """All that is owed, sent: the publications and the notices that arrived."""
        outbox = Outbox(open_beside(self.state, writing=True))
        kinds = {"jsonl": ("tracker", "publications.jsonl"), "notices": ("sink", "notices.jsonl")}
        for lane in outbox.lanes():
            kind, _ = kinds["notices" if lane.kind == "notices" else "jsonl"]
            address = Address(kind, lane.destination, "jsonl", {}, lane.run, str(self.root), self.run_folder)  # type: ignore[arg-type]
            carrier = Carrier(lane, address, outbox, lambda: 0.0)
            while carrier.step(at_once=True).wait is not None:
                pass
        return self._lines("publications.jsonl"), self._lines("notices.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_folder / name).read_text().splitlines()]

    def outcome(self) -> dict[str, Any]:
        """What an undisturbed run and one that was killed must both come to."""
        publications, notices = self.deliver()
        return {
            "checkpoints": self.read("SELECT step, outcome, detail FROM checkpoints ORDER BY step"),
            "states": self.read("SELECT rule, subject, phase, streak, since_step FROM rule_states ORDER BY 1, 2"),
            "alerts": [
                line.replace(str(self.folder), "") for (line,) in self.read("SELECT line FROM alerts ORDER BY position")
            ],
            "numbers": [one["step"] for one in publications if one["metrics"]],
            "files": sorted(name for one in publications for name in one["files"]),
            "notices": [notice["text"] for group in notices for notice in group["notices"]],
            "tallies": [
                row for row in self.read("SELECT what, amount FROM tallies ORDER BY what") if "/" not in row[0]
            ],
        }


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.runs.stoppable"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture(scope="module")
def undisturbed(
    zygote: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[int], dict[str, Any]]:
    """Where each line of an agent that nobody kills is run first and last, and what comes of it."""
    stage = Stage(tmp_path_factory.mktemp("undisturbed"), zygote)
    answer = stage.agent()
    assert answer["status"] == 0, (stage.folder / "said").read_text()
    outcome = stage.outcome()
    assert outcome["numbers"] == list(STEPS)
    assert [state[2] for state in outcome["states"] if state[0] == "layer_below"].count("firing") == 0
    assert ["firing" in outcome["notices"][0] or len(outcome["notices"])] == [2]
    return answer["points"], outcome


def _is_held(stage: Stage) -> set[str]:
    return {path.name for path in (stage.run_folder / "pins").glob("*/*")}


def killed_and_started_again(stage: Stage, last: int, expected: dict[str, Any]) -> None:
    """The whole of the invariants after a death at one line."""
    stage.agent(last)
    answered = stage.answered()
    before = Counter(stage.peels())
    recorded = {row[0] for row in stage.read("SELECT step FROM checkpoints WHERE outcome = 'peeled'")}
    for step in set(STEPS) - recorded:  # 3: what is not recorded is still held, or still in its place
        assert (stage.root / f"checkpoint-{step}").exists()
    again = stage.agent()
    assert again["status"] == 0, (last, (stage.folder / "said").read_text())
    after = Counter(stage.peels())
    assert {fingerprint for fingerprint in answered if after[fingerprint] != before[fingerprint]} == set(), last  # 1
    assert max(after.values()) <= 2, last  # 5
    outcome = stage.outcome()
    assert outcome == expected, last  # 2, 4, 5, 6
    assert _is_held(stage) == {f"checkpoint-{STEPS[-1]}"}, last  # 3


def try_lines(stage_of: Callable[[int], Stage], lines: list[int], expected: dict[str, Any]) -> None:
    for last in lines:
        stage = stage_of(last)
        killed_and_started_again(stage, last, expected)
        shutil.rmtree(stage.folder)


def test_stopped_at_some_lines(
    zygote: subprocess.Popen[str], undisturbed: tuple[list[int], dict[str, Any]], tmp_path: Path
) -> None:
    """Twenty-five of them, evenly apart."""
    points, expected = undisturbed
    try_lines(lambda last: Stage(tmp_path / str(last), zygote), points[:: max(1, len(points) // 25)], expected)


@pytest.mark.long
def test_stopped_at_every_line(
    zygote: subprocess.Popen[str], undisturbed: tuple[list[int], dict[str, Any]], tmp_path: Path
) -> None:
    """Every line that an undisturbed agent runs, when it is run first and last."""
    points, expected = undisturbed
    print(f"{len(points)} deaths, each at another line")
    try_lines(lambda last: Stage(tmp_path / str(last), zygote), points, expected)


def test_what_is_sent_again_is_the_same(
    zygote: subprocess.Popen[str], undisturbed: tuple[list[int], dict[str, Any]], tmp_path: Path
) -> None:
    """Invariant 4: what arrived, and was not known to have arrived, comes again with the same key and bytes."""
    stage = Stage(tmp_path / "again", zygote)
    stage.agent()
    outbox = Outbox(open_beside(stage.state, writing=True))
    bodies = stage.read("SELECT key, body FROM deliveries ORDER BY id")
    lane = next(lane for lane in outbox.lanes() if lane.kind == "notices")
    address = Address("sink", lane.destination, "jsonl", {}, lane.run, str(stage.root), stage.run_folder)
    Carrier(lane, address, _Forgetful(outbox), lambda: 0.0).step()  # type: ignore[arg-type]
    assert stage.read("SELECT key, body FROM deliveries ORDER BY id") == bodies
    _, notices = stage.deliver()
    assert len({group["id"] for group in notices}) == len(notices) == 2


class _Forgetful:
    """An outbox whose process dies after a delivery, before it is noted."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def head(self, lane: Lane) -> Any:
        return self._outbox.head(lane)

    def sent(self, owed: Any) -> None:
        """The process is gone by now."""
