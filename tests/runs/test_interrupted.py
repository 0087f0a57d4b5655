"""Ctrl-C, as a terminal sends it: to the command and to every child in its foreground group, at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import zoo
from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.command import environment_of, published
from tests.waiting import wait_for

pytestmark = pytest.mark.long

Moment = Callable[["Command"], bool]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of one run, the last without an end, and a probe."""
    folder = tmp_path_factory.mktemp("place")
    model = zoo.build("llama", steps=40)
    for step in (10, 20, 30):
        zoo.save(model, folder / "run", step=step)
    np.save(folder / "heldout.npy", zoo.token_ids(400, 1))
    return folder


class Command:
    """`peel-agent ARGUMENTS` in a process group of its own, told on stderr of each module that it imports."""

    def __init__(self, home: Path, *arguments: object, module: str = "peel_agent", **environment: str) -> None:
        self.out, self.err = home / "out", home / "err"
        command = [sys.executable, "-X", "importtime", "-m", module, *map(str, arguments)]
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, start_new_session=True, env=environment_of(home, **environment)
            )

    def printed(self) -> str:
        return self.out.read_text(errors="replace")

    def said(self) -> list[str]:
        """Its own lines on stderr."""
        lines = self.err.read_text(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("import time:")]

    def has_imported(self, module: str) -> bool:
        """Whether that import is over; many follow."""
        return any(line.split("|")[-1].strip() == module for line in self.err.read_text(errors="replace").splitlines())

    def interrupted(self, moment: Moment, times: int = 1) -> int:
        """Its exit status, after Ctrl-C at this moment."""
        try:
            wait_for(lambda: moment(self) or self.process.poll() is not None)
            assert self.process.poll() is None, self.said()
            for _ in range(times):
                os.killpg(self.process.pid, signal.SIGINT)
            return self.process.wait(120)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def imports(module: str) -> Moment:
    return lambda command: command.has_imported(module)


def prints(words: str) -> Moment:
    return lambda command: words in command.printed()


def says(words: str) -> Moment:
    return lambda command: any(words in line for line in command.said())


def the_sentence(command: Command) -> str:
    """What it said of the interrupt: one line, and no traceback before it or after it."""
    said = command.said()
    assert "Traceback" not in "".join(said)
    (sentence,) = [line for line in said if "interrupted" in line]
    assert said[-1] == sentence
    return sentence


@pytest.mark.parametrize("module", ["argparse", "peel_agent.config.sections", "torch._C"])
def test_scan_while_it_begins(place: Path, tmp_path: Path, module: str) -> None:
    """Whatever is being imported: status 130 and one sentence; reports of an earlier scan are still in the file."""
    file = tmp_path / "reports.jsonl"
    file.write_text("earlier\n")
    command = Command(
        tmp_path, "scan", place / "run" / "checkpoint-10", "--probe", place / "heldout.npy", "--out", file
    )
    assert command.interrupted(imports(module)) == 130
    assert the_sentence(command).startswith("peel-agent: interrupted")
    assert file.read_text() == "earlier\n"


def test_scan_keeps_what_was_measured(place: Path, tmp_path: Path) -> None:
    """The reports that are there stay in the file and are counted; the checkpoint without one is named.

    Somebody who holds the keys down interrupts no clean-up.
    """
    file = tmp_path / "reports.jsonl"
    checkpoints = [place / "run" / f"checkpoint-{step}" for step in (10, 20, 30)]
    command = Command(
        tmp_path, "scan", *checkpoints, "--probe", place / "heldout.npy", "--format", "json", "--out", file,
        "--effort", "full", "--solver", "descent", "--maps", "paper",
    )  # fmt: skip
    assert command.interrupted(lambda _: file.exists() and file.read_text().count("\n") >= 1, times=3) == 130
    reports = [json.loads(line)["checkpoint"]["step"] for line in file.read_text().splitlines()]
    assert reports == [10, 20, 30][: len(reports)]
    assert f"the reports of {len(reports)} of 3 checkpoints are in {file}" in the_sentence(command)


@pytest.mark.parametrize("is_measuring", [False, True])
def test_witness_leaves_no_patch(place: Path, tmp_path: Path, is_measuring: bool) -> None:
    """Neither the patch nor the unproven one beside it, which is there while it is measured again."""
    out = tmp_path / "patches" / "patch.safetensors"
    out.parent.mkdir()
    command = Command(
        tmp_path, "witness", place / "run" / "checkpoint-10", "--probe", place / "heldout.npy", "--layer", "2",
        "--out", out,
    )  # fmt: skip
    moment = (lambda _: any(out.parent.iterdir())) if is_measuring else imports("numpy")
    assert command.interrupted(moment) == 130
    assert ("is not proven" in the_sentence(command)) == is_measuring
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_doctor_says_how_far_it_came(place: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The checks that were made are counted."""
    command = Command(tmp_path, "doctor", place / "run", *flags, PEEL__TRACKER__USE='["jsonl"]')
    moment = imports("peel_agent.doctor.examination") if flags else prints("\n")
    assert command.interrupted(moment) == 130
    assert the_sentence(command)


@pytest.mark.parametrize(
    ("flags", "module", "moment"),
    [
        # What the test's own program imports is not the command's.
        ([], "peel_agent", imports("peel_agent.ledger.ledger")),
        ([], "tests.runs.instant_agent", says("watching ")),
        (["--once"], "tests.runs.instant_agent", says("peeling ")),
        ([], "tests.runs.instant_agent", says(" step 10")),
    ],
    ids=["import", "watching", "peeling", "sending"],
)
def test_watch_keeps_what_is_not_done(tmp_path: Path, flags: list[str], module: str, moment: Moment) -> None:
    """Status 130, also with a courier in the terminal's group; what is not done is done by the next start."""
    for step in (10, 20):
        write_checkpoint(tmp_path / "run" / f"checkpoint-{step}", step)
    np.save(tmp_path / "heldout.npy", np.arange(8))
    arguments = ["watch", tmp_path / "run", "--probe", tmp_path / "heldout.npy", "--state", tmp_path / "state"]
    environment = {
        "PEELS": str(tmp_path / "peels"),
        "PEEL__WATCH__SETTLE_SECONDS": "0",
        "PEEL__WATCH__BACKLOG": '"all"',
        "PEEL__TRACKER__USE": '["jsonl"]',
        "PEEL__HEALTH__LISTEN": '""',
    }
    command = Command(tmp_path, *arguments, *flags, module=module, **environment)
    assert command.interrupted(moment, times=2) == 130
    said = "\n".join(command.said())
    assert "Traceback" not in said
    assert "interrupted" in said or "ending; what is not done yet is kept for the next start" in said
    command = Command(tmp_path, *arguments, "--once", module="tests.runs.instant_agent", **environment)
    assert command.process.wait(240) == 0, command.said()
    assert [json.loads(line)["step"] for line in published(tmp_path / "state")] == [10, 10, 20, 20]
