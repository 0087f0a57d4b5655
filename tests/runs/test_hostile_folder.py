"""A watched folder full of hostile and broken checkpoints: each is refused by name, and the good one is peeled."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from peel_agent import registry
from peel_agent.errors import CheckpointError
from peel_agent.load import open_snapshot
from peel_agent.pipeline import locate
from peel_agent.records import LocalListing
from peel_agent.spi import Format
from peel_agent.watch import scan
from tests import zoo
from tests.runs import hostile
from tests.runs.command import environment_of, peel_agent, published
from tests.runs.hostile import CANARY, Hostile
from tests.yardstick import yardstick

AT_A_LOOK = hostile.refused_at_a_look()
WHEN_OPENED = hostile.refused_when_opened()
CASES = {case.tag: case for case in (*AT_A_LOOK, *WHEN_OPENED)}
ROOM = 1.25
"""How much more memory the hostile folder may take than the good checkpoint alone, as a factor."""

LOG_PREFIX = re.compile(r"^\S+Z (?:INFO|WARNING|ERROR) +\S+: ", re.MULTILINE)
"""Time, level and run of a line of the log."""

CONFIGURATION = """
[watch]
settle_seconds = 0.5
poll_seconds = 0.3
[tracker]
use = ["jsonl"]
[probe]
sequence_length = 12
fit_tokens = 1000
select_tokens = 300
confirm_tokens = 600
[peel]
effort = "quick"
"""


@dataclasses.dataclass(frozen=True)
class Session:
    """What became of one run of the command: `peak` is the most memory that it and its children had, in bytes.

    `published` has a line for each publication of numbers.
    """

    status: int
    stdout: str
    stderr: str
    peak: int
    published: Sequence[str]

    def refusal(self, case: Hostile) -> str:
        """What is said of one checkpoint, up to what is said of the next."""
        said = LOG_PREFIX.sub("", self.stderr)
        named = rf"^(?:cannot read |cannot use |refused: |gave up )?/[^\n]*/{re.escape(case.tag)}"
        pattern = named + r".*?(?=^cannot |^step |^refused: |^gave up |^/|\Z)"
        return "\n".join(re.findall(pattern, said, re.MULTILINE | re.DOTALL))


class Sidecar:
    """`peel-agent watch` as a process whose working directory is the watched folder itself."""

    def __init__(self, root: Path, *flags: str) -> None:
        home = root.parent
        (home / "peel.toml").write_text(CONFIGURATION)
        np.save(home / "probe.npy", zoo.token_ids(200, 3))
        self.state = home / "state"
        self._stderr, self._stdout = home / "stderr", home / "stdout"
        command = [str(Path(sys.executable).with_name("peel-agent")), "watch", ".", "-c", "../peel.toml"]
        command += ["--probe", "../probe.npy", "--state", str(self.state), "--json", *flags]
        with self._stderr.open("wb") as stderr, self._stdout.open("wb") as stdout:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                env=environment_of(home, OMP_NUM_THREADS="1"),
                stdout=stdout,
                stderr=stderr,
                preexec_fn=hostile.give_up_root_s_privileges,  # noqa: PLW1509 -- calls the kernel, takes no lock
            )
        self._peak = 0
        self._watcher = threading.Thread(target=self._watch_memory)
        self._watcher.start()

    def _watch_memory(self) -> None:
        process = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            self._peak = max(self._peak, sum(map(_most_memory, _family(process))))
            time.sleep(0.05)

    def said(self) -> str:
        return self._stderr.read_text(errors="surrogateescape")

    def end(self, seconds: float = 1200) -> Session:
        """Waits for its end, and kills it when it hangs."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.wait()
        self._watcher.join()
        numbers = [line for line in published(self.state) if json.loads(line)["metrics"]]
        return Session(self.process.returncode, self._stdout.read_text(), self.said(), self._peak, numbers)


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _most_memory(process: psutil.Process) -> int:
    """The most that a process had so far, as the kernel keeps it: nothing is missed between two looks at it."""
    try:
        match = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return 0
    return 0 if match is None else int(match[1]) << 10


def watched(folder: Path) -> Path:
    """An empty folder to watch, with modules in it that nobody may import."""
    root = folder / "run"
    root.mkdir(parents=True)
    (root / "config.json").write_text("{}")  # what single files are read with
    return hostile.shadows(root)


def fill(root: Path, cases: Iterable[Hostile]) -> None:
    for case in cases:
        case.make(root / case.name)


def scenery(root: Path) -> None:
    """Puts what is passed over in silence: links, which are found under their own names, and hidden names."""
    elsewhere = hostile.good(root.parent / "checkpoint-8", step=8)
    (root / "checkpoint-8").symlink_to(elsewhere)
    (root / "loop").symlink_to(".")
    (root / "dangling.pt").symlink_to("nothing")
    (root / "device.ckpt").symlink_to("/dev/zero")
    elsewhere.rename(root / ".checkpoint-8")
    os.mkfifo(root / "pipe.pt")
    os.mkfifo(root / "pipe.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The good checkpoint without company."""
    root = watched(tmp_path_factory.mktemp("alone"))
    hostile.good(root / "checkpoint-5")
    return Sidecar(root, "--once").end()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """All of them at once."""
    root = watched(tmp_path_factory.mktemp("hostile"))
    fill(root, CASES.values())
    scenery(root)
    hostile.good(root / "checkpoint-5")
    return Sidecar(root, "--once").end()


def test_there_are_enough_of_them() -> None:
    """More than 60 different hostile checkpoints, of every kind, each with a name of its own."""
    assert len(CASES) == len(AT_A_LOOK) + len(WHEN_OPENED) > 60


@pytest.mark.parametrize("tag", CASES)
def test_each_is_refused_by_name(tag: str, session: Session) -> None:
    """What is said names the checkpoint and the cause."""
    said = session.refusal(CASES[tag])
    assert re.search(CASES[tag].words, said, re.DOTALL), said[:2000] or "nothing is said of it"


def test_the_good_one_is_peeled_once(session: Session) -> None:
    """One report, one publication, of the good checkpoint; the exit status is 0."""
    assert session.status == 0, session.stderr[-3000:]
    (report,) = map(json.loads, session.stdout.splitlines())
    assert (Path(report["checkpoint"]["path"]).name, report["checkpoint"]["step"]) == ("checkpoint-5", 5)
    assert [json.loads(line)["step"] for line in session.published] == [5]


def test_no_traceback(session: Session) -> None:
    """Nothing that is in a checkpoint ends a process with a traceback."""
    tracebacks = re.findall(r"^Traceback.*?^(\w\S*Error.*?)$", session.stderr, re.MULTILINE | re.DOTALL)
    assert not tracebacks
    again = [line for line in session.stderr.splitlines() if "; try 2 of 3" in line or "; try 3 of 3" in line]
    assert all("/weights-of-4-tebibytes: memory ran out" in line for line in again), again  # which may be another's


def test_nothing_ran(session: Session) -> None:
    """No payload ran: neither code in a pickle, nor a module beside the weights or in the working directory."""
    assert session.status == 0
    assert not CANARY.exists()


def test_a_payload_would_run(tmp_path: Path) -> None:
    """The payloads are real: a pickle that is loaded, and a module that is imported, make the canary."""
    try:
        hostile.SHELL.made[0](*hostile.SHELL.made[1])
        assert CANARY.exists()
        CANARY.unlink()
        hostile.shadows(tmp_path)
        subprocess.run([sys.executable, "-c", "import psutil"], cwd=tmp_path, check=False, capture_output=True)
        assert CANARY.exists()
    finally:
        CANARY.unlink(missing_ok=True)


def test_the_terminal_is_not_written_to_by_names(session: Session) -> None:
    """Control characters, line ends and marks of direction in names, headers and configs are shown as escapes."""
    assert session.stderr
    raw = {character for character in session.stderr if not character.isprintable() and character != "\n"}
    assert not raw
    assert not [line for line in session.stderr.splitlines() if line.startswith(("ALERT", "cannot use everything"))]


def test_what_is_said_is_short(session: Session) -> None:
    """No line is longer than a person reads, whatever the length of the names in a file."""
    lengths = {line[:80]: len(line) for line in session.stderr.splitlines() if len(line) > 2500}
    assert not lengths


def test_memory_stays_what_it_is(session: Session, alone: Session) -> None:
    """The command and its workers together need at most a quarter more memory than for the good checkpoint alone."""
    assert alone.status == 0
    assert session.peak <= ROOM * alone.peak, f"{session.peak >> 20} MiB, alone {alone.peak >> 20} MiB"


HEAVY = {case.tag: case for case in hostile.heavy()}
LOOK = """
import re, sys, time
from pathlib import Path
from peel_agent import registry
from peel_agent.watch import scan
from tests.yardstick import yardstick
formats, units, taken = registry.formats(), [yardstick()], []
for _ in range(2):
    start = time.process_time()
    (sighting,) = scan(Path(sys.argv[1]), formats)
    taken.append(time.process_time() - start)
units.append(yardstick())
for seconds in taken:
    print(2 * seconds / sum(units))
print(re.search("VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
print(sighting.readiness.reason)
"""


@pytest.mark.parametrize("tag", HEAVY)
def test_a_heavy_one_is_light_for_the_agent(tag: str, tmp_path: Path) -> None:
    """A look takes less than half a gigabyte, and less processor time than pickletools alone takes for 60 million
    operations, which is what the longest of them holds; the next look takes less than for one million.
    """
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.json").write_text("{}")
    fill(root, [HEAVY[tag]])
    looked = subprocess.run(
        [sys.executable, "-c", LOOK, str(root)], capture_output=True, text=True, timeout=600, check=False
    )
    assert looked.returncode == 0, looked.stderr
    first, second, peak, reason = looked.stdout.splitlines()
    assert re.search(HEAVY[tag].words, reason)
    assert (float(first) < 60, float(second) < 1, int(peak) < 512 << 10) == (True, True, True), looked.stdout[:200]


@pytest.mark.parametrize("name", hostile.CONFIG_FAULTS)
def test_a_hostile_configuration_is_refused(name: str, tmp_path: Path) -> None:
    """Whatever is in config.json, opening the checkpoint raises a CheckpointError that names it."""
    changes, words = hostile.CONFIG_FAULTS[name]
    hostile.changed_config(**changes)(tmp_path / "x")
    ref = locate(tmp_path / "x")
    with pytest.raises(CheckpointError, match=words):
        open_snapshot(ref, *registry.formats(ref.format), registry.family)


def test_a_thousand_million_layers_are_refused(tmp_path: Path) -> None:
    """More blocks than there are tensors are refused before they are built."""
    root = watched(tmp_path)
    hostile.changed_config(num_hidden_layers=10**9)(root / "x")
    np.save(tmp_path / "probe.npy", zoo.token_ids(200, 3))
    scanned = peel_agent("scan", root / "x", "--probe", tmp_path / "probe.npy", home=tmp_path)
    assert scanned.returncode == 3
    assert "1000000000" in scanned.stderr.replace(",", "")
    assert "Traceback" not in scanned.stderr


def claimed(path: Path) -> Format:
    """The format that has a path."""
    winner = registry.claimed(LocalListing(path), registry.formats())
    assert winner is not None
    return winner[0]


def test_no_look_is_long(tmp_path: Path) -> None:
    """A look at any of them takes less processor time than pickletools for 15 million operations, the next one than for
    one million.
    """
    root = watched(tmp_path)
    fill(root, AT_A_LOOK)
    units, taken = [yardstick()], dict[tuple[str, str], float]()
    for case in AT_A_LOOK:
        path = root / case.name
        form = claimed(path)
        for look in ("first", "next"):
            before = time.process_time()
            form.inspect(LocalListing(path))
            form.step(LocalListing(path))
            taken[case.name, look] = time.process_time() - before
    units.append(yardstick())
    limits = {"first": 15 * sum(units) / 2, "next": sum(units) / 2}
    assert not {key: seconds for key, seconds in taken.items() if seconds > limits[key[1]]}, limits


def test_many_files_are_looked_at_quickly(tmp_path: Path) -> None:
    """An unfinished file among 2,000 takes a look at most three times the processor time of one among 200."""
    costs = {}
    for count in (1, 200, 2000):  # whatever is made at the first look is made before it counts
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.pt").write_bytes(b"PK")
        before = time.process_time()
        assert len(scan(folder, registry.formats())) == count
        costs[count] = (time.process_time() - before) / count
    assert costs[2000] < 3 * costs[200], costs


def test_a_running_sidecar_goes_on(tmp_path: Path) -> None:
    """Hostile checkpoints that appear while it runs are refused, and the good one that comes last is peeled."""
    root = watched(tmp_path)
    sidecar = Sidecar(root)
    try:
        _wait(sidecar, "watching ")
        looked = [case for case in AT_A_LOOK if case.tag.split("-")[0] in ("bin", "dcp", "bomb", "checkpoint", "name")]
        fill(root, looked)
        scenery(root)
        opened = [case for case in WHEN_OPENED if case.tag in ("weights-that-are-an-archive", "config-auto-map")]
        for case in opened:
            fill(root, [case])
            _wait(sidecar, f"cannot use {root / case.name}:")
        hostile.good(root / "checkpoint-5")
        _wait(sidecar, "step 5; loss")
        sidecar.process.send_signal(signal.SIGTERM)
    finally:
        session = sidecar.end(240)
    assert session.status == 0, session.stderr[-3000:]
    assert "Traceback" not in session.stderr
    assert [json.loads(line)["step"] for line in session.published] == [5]
    for case in looked:
        said = session.refusal(case)
        assert re.search(case.words, said, re.DOTALL) or _may_be_unfinished(root / case.name), case.name
    assert not CANARY.exists()


def _wait(sidecar: Sidecar, words: str) -> None:
    deadline = time.monotonic() + 240
    while words not in sidecar.said():
        assert sidecar.process.poll() is None, sidecar.said()[-3000:]
        assert time.monotonic() < deadline, f"waited in vain for {words!r}: {sidecar.said()[-3000:]}"
        time.sleep(0.1)


def _may_be_unfinished(path: Path) -> bool:
    """Of one that may still be written a running sidecar says nothing for ten minutes."""
    form = claimed(path)
    return form.inspect(LocalListing(path)).state == "incomplete"
