"""A trainer and the sidecar on one directory, in random schedules: nothing torn is published, nothing whole is missed.

The files, the formats, the pins, the queue and the ledger are real; time is invented, and reading is cut into steps, so
that a writer can come between any two of them. Every version of a checkpoint is filled with its own number.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peel_agent import registry
from peel_agent.config import DeviceSettings, RunSettings, TrackerSettings, WatchSettings
from peel_agent.errors import PeelError
from peel_agent.journal import Journal
from peel_agent.ledger import Ledger
from peel_agent.pipeline import check_unchanged
from peel_agent.records import DeviceLease, Peeled, Request
from peel_agent.run import Run
from peel_agent.watch import Folder, Settling
from peel_agent.work import Services
from tests.rooms.test_publish_form import FULL

SETTLE = 10.0
START = 1_700_000_000.0
SETTINGS = RunSettings("run", WatchSettings(), tracker=TrackerSettings(use=("jsonl",)))
CPU = DeviceLease("cpu", "", "cpu", "the only one")
FORMATS = registry.formats()
IN_PLACE = "ckpt.pt"
KINDS = ("trainer", "sharded", "pretrained", "staged", "again", "in place")
Step = Callable[[], None]


def safetensors(*names: str, value: int) -> bytes:
    """A file with tensors of 64 bytes, each byte the value."""
    entries = {
        name: {"dtype": "U8", "shape": [64], "data_offsets": [64 * index, 64 * index + 64]}
        for index, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value]) * (64 * len(names))


@cache
def saved_by_torch(value: int) -> bytes:
    """What torch.save writes, in nanoGPT's layout."""
    buffer = io.BytesIO()
    weights = {name: torch.full((64,), value, dtype=torch.uint8) for name in "ab"}
    torch.save({"model": weights, "optimizer": {}, "iter_num": 5}, buffer)
    return buffer.getvalue()


def one_file(value: int) -> dict[str, bytes]:
    return {"config.json": b"{}", "model.safetensors": safetensors("a", "b", value=value)}


def sharded(value: int) -> dict[str, bytes]:
    shards = {name: f"model-0000{index}-of-00002.safetensors" for index, name in enumerate("ab", 1)}
    files = {shard: safetensors(name, value=value) for name, shard in shards.items()}
    return (
        {"config.json": b"{}"} | files | {"model.safetensors.index.json": json.dumps({"weight_map": shards}).encode()}
    )


def of_trainer(files: dict[str, bytes], step: int) -> dict[str, bytes]:
    return files | {"optimizer.pt": b"o" * 99, "trainer_state.json": json.dumps({"global_step": step}).encode()}


@dataclasses.dataclass
class Writing:
    """A writer on its way: what is left to do at `target`, and the version that will be there then, if any."""

    target: str
    steps: list[Step]
    version: int | None


class Schedule(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="schedule-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.root = self.home / "run"
        self.root.mkdir()
        self.now, self.versions, self.steps = START, 0, 0
        self.writing: list[Writing] = []
        self.whole: dict[str, tuple[int, float | None]] = {}
        """By name: the version that is there, and the time of the first round that could see it."""
        self.owed: set[int] = set()
        self.published: list[int] = []
        self.reading: tuple[Future[Peeled], Iterator[None]] | None = None
        self.put("config.json", b"{}")
        self.start()

    # ------------------------------------------------------------ the sidecar

    def start(self) -> None:
        self.ledger = Ledger(self.home / "state")
        source = Folder(self.root, FORMATS, Settling(SETTLE))
        journal = Journal(lambda _: None, lambda: self.now)
        services = Services(journal, lambda *_: CPU, self.submit, lambda _: None, emit=self.emit)
        run_ledger = self.ledger.run("run", "run", str(self.root))
        self.run = Run(SETTINGS, DeviceSettings(), source, "all", run_ledger, services)

    def emit(self, line: str) -> None:
        self.published.append(json.loads(line)["model"]["parameters"])

    def submit(self, request: Request) -> Future[Peeled]:
        answer: Future[Peeled] = Future()
        self.reading = (answer, self.read_steps(request, answer))
        return answer

    def read_steps(self, request: Request, answer: Future[Peeled]) -> Iterator[None]:
        """What a worker does, up to the numbers: every tensor is read, then the files are looked at again."""
        try:
            ref = request.ref
            yield
            (form,) = (known for known in FORMATS if known.name == ref.format)
            weights = form.open(ref.in_place())
            values = set()
            for name in sorted(weights.shapes()):
                yield
                values |= set(weights.read(name).unique().tolist())
            yield
            check_unchanged(ref, form)
        except PeelError as error:
            answer.set_exception(error)
            return
        assert len(values) == 1, f"a torn read of {ref.path}: {values}"
        report = dataclasses.replace(FULL, model=dataclasses.replace(FULL.model, parameters=values.pop()))
        answer.set_result(Peeled(report, None))

    @rule()
    def look(self) -> None:
        """One round; what it sees whole for the second time after settle_seconds is owed."""
        self.run.round(self.now)
        for name, (version, seen) in self.whole.items():
            first = self.now if seen is None else seen
            self.whole[name] = (version, first)
            if self.now - first >= SETTLE:
                self.owed.add(version)

    @precondition(lambda self: self.reading is not None)
    @rule(count=st.integers(1, 6))
    def read(self, count: int) -> None:
        assert self.reading is not None
        for _ in range(count):
            if next(self.reading[1], self) is self:
                self.reading = None
                return

    @rule()
    def restart(self) -> None:
        """Killed and started again: what it held is lost, and owed only once it is seen anew."""
        self.ledger.close()
        self.owed &= set(self.published)
        self.whole = {name: (version, None) for name, (version, _) in self.whole.items()}
        self.reading = None
        self.start()

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # ------------------------------------------------------------ the trainer

    def put(self, name: str, content: bytes, *, append: bool = False) -> None:
        """Writes to a file of the run in place, at this time."""
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        with path.open("ab" if append else "wb") as file:
            file.write(content)
        self.touch(path)

    def touch(self, path: Path) -> None:
        self.now += 0.001
        os.utime(path, ns=(int(self.now * 1e9),) * 2)

    def rename(self, old: str, new: str) -> None:
        (self.root / old).rename(self.root / new)

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)

    def written(self, folder: str, files: dict[str, bytes], dice: random.Random) -> list[Step]:
        """Each file in halves, at once, or aside and renamed; the files in any order, cut into each other."""
        queues: list[list[Step]] = []
        for name, content in files.items():
            target, half = f"{folder}/{name}", dice.randrange(1, len(content))
            way = dice.choice(["halves", "at once", "renamed"])
            if way == "halves":
                first, rest = content[:half], content[half:]
                queues.append(
                    [lambda t=target, c=first: self.put(t, c), lambda t=target, c=rest: self.put(t, c, append=True)]
                )
            elif way == "at once":
                queues.append([lambda t=target, c=content: self.put(t, c)])
            else:
                aside = f"{folder}/.{name}.part"
                queues.append([lambda a=aside, c=content: self.put(a, c), lambda a=aside, t=target: self.rename(a, t)])
        order = []
        while queues:
            queue = queues[0] if dice.random() < 0.5 else dice.choice(queues)
            order.append(queue.pop(0))
            queues = [waiting for waiting in queues if waiting]
        return order

    @precondition(lambda self: len(self.writing) < 3 and self.versions < 200)
    @rule(kind=st.sampled_from(KINDS), seed=st.integers(0))
    def begin(self, kind: str, seed: float) -> None:
        """A checkpoint is begun; `again` is one that a training run once more writes under an old name."""
        dice, version = random.Random(seed), self.versions + 1
        busy = {writing.target for writing in self.writing}
        if kind == "in place":
            target, content = IN_PLACE, saved_by_torch(version)
            half = dice.randrange(1, len(content))
            steps: list[Step] = [
                lambda: self.put(target, content[:half]),
                lambda: self.put(target, content[half:], append=True),
            ]
        elif kind == "again":
            old = sorted(name for name in self.whole if name.startswith("checkpoint-"))
            if not old:
                return
            target = dice.choice(old)
            files = of_trainer(one_file(version), int(target.split("-")[1]))
            steps = [*self.unlinked(target), *self.written(target, files, dice)]
        else:
            self.steps += 10
            files = sharded(version) if kind in ("sharded", "pretrained") else one_file(version)
            target = f"step_{self.steps}" if kind == "pretrained" else f"checkpoint-{self.steps}"
            files = files if kind == "pretrained" else of_trainer(files, self.steps)
            place = f"tmp-{target}" if kind == "staged" else target
            steps = self.written(place, files, dice)
            if kind == "staged":
                steps.append(lambda: self.rename(place, target))
        if target not in busy:
            self.versions = version
            self.writing.append(Writing(target, steps, version))

    def unlinked(self, name: str) -> list[Step]:
        files = sorted(path.name for path in (self.root / name).iterdir())
        return [*(lambda f=file: self.remove(f"{name}/{f}") for file in files), lambda: self.remove(name)]

    @precondition(lambda self: self.whole)
    @rule(seed=st.integers(0))
    def rotate(self, seed: float) -> None:
        """A checkpoint is removed, file by file."""
        dice, busy = random.Random(seed), {writing.target for writing in self.writing}
        free = sorted(name for name in self.whole if name not in busy and name != IN_PLACE)
        if free:
            name = dice.choice(free)
            self.writing.append(Writing(name, self.unlinked(name), None))

    @precondition(lambda self: self.writing)
    @rule(index=st.integers(0, 2), count=st.integers(1, 9))
    def write(self, index: int, count: int) -> None:
        """A writer goes on. What it touches is not whole any more; what was at rest before is held, and stays owed."""
        writing = self.writing[index % len(self.writing)]
        for _ in range(min(count, len(writing.steps))):
            self.whole.pop(writing.target, None)
            writing.steps.pop(0)()
        if not writing.steps:
            self.writing.remove(writing)
            if writing.version is not None:
                self.whole[writing.target] = (writing.version, None)

    @precondition(lambda self: self.writing)
    @rule(index=st.integers(0, 2))
    def kill(self, index: int) -> None:
        """A writer is killed where it stands."""
        self.writing.pop(index % len(self.writing))

    # ------------------------------------------------------------ what must hold

    @rule(seed=st.integers(0))
    def storm(self, seed: int) -> None:
        """Many small things at once: hypothesis alone seldom goes so far."""
        dice = random.Random(seed)
        for _ in range(60):
            act = dice.choices(["look", "write", "read", "begin", "wait", "rotate"], [4, 6, 5, 2, 3, 1])[0]
            if act == "look":
                self.look()
            elif act == "wait":
                self.time_passes(dice.choice([1.0, 4.0, 11.0]))
            elif act == "begin" and len(self.writing) < 3 and self.versions < 200:
                self.begin(dice.choice(KINDS), dice.random())
            elif act == "rotate" and self.whole:
                self.rotate(dice.random())
            elif act == "write" and self.writing:
                self.write(dice.randrange(3), dice.randrange(1, 9))
            elif act == "read" and self.reading is not None:
                self.read(dice.randrange(1, 7))

    @invariant()
    def each_is_scored_once(self) -> None:
        assert len(self.published) == len(set(self.published))

    def teardown(self) -> None:
        """The trainer rests; whatever is owed is published in the end."""
        try:
            for _ in range(200):
                self.now += SETTLE + 1
                self.look()
                while self.reading is not None:
                    self.read(6)
                if self.owed <= set(self.published) and self.reading is None:
                    break
            assert self.owed <= set(self.published), f"missed {self.owed - set(self.published)}"
            self.each_is_scored_once()
        finally:
            self.run.close()
            self.ledger.close()
            shutil.rmtree(self.home)


class MoreSchedules(Schedule):
    pass


EVERY_TIME = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
Schedule.TestCase.settings = EVERY_TIME
TestSchedules = Schedule.TestCase
MoreSchedules.TestCase.settings = settings(EVERY_TIME, max_examples=1000)
TestMoreSchedules = pytest.mark.long(MoreSchedules.TestCase)
