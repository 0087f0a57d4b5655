"""What may pass does: trackers that are away, slow or refuse, disks that are full, places that go and come back.

Nothing is lost or doubled, each trouble is told once when it begins and once when it ends, in words that name it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import servers
from tests.rooms.test_watch_scan import write_checkpoint
from tests.runs.faulty_proxy import Fault, Proxy, answering, cut_after_write, faulty_proxy, killing, slow
from tests.runs.sidecar import Sidecar
from tests.servers import free_port, kill_mlflow_server, mlflow_client, mlflow_server
from tests.waiting import wait_for

mlflow_uri = servers.mlflow_uri

STEPS = (100, 200)
WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def tracked(uri: str, name: str) -> str:
    return f'[tracker.mlflow]\ntracking_uri = "{uri}"\nexperiment = "{name}"\n'


def history(uri: str, name: str) -> dict[int, int]:
    """How many points the loss has at each step, in the one run of an experiment."""
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(name)
    (run,) = client.search_runs([experiment.experiment_id])
    points = [point.step for point in client.get_metric_history(run.info.run_id, "peel/loss")]
    files = [file.path for file in client.list_artifacts(run.info.run_id, "peel/checkpoints")]
    assert sorted(files) == [f"peel/checkpoints/step-{step:09d}.json" for step in sorted(set(points))]
    return {step: points.count(step) for step in points}


@pytest.fixture
def proxy(mlflow_uri: str) -> Iterator[Proxy]:
    with faulty_proxy(mlflow_uri) as proxy:
        yield proxy


FAULTS: dict[str, tuple[Fault, str]] = {
    "500": (answering(500, "the database is locked", only="/api/"), "cannot be reached"),
    "401": (answering(401, "who are you", only="/api/"), "refused the results"),
    "403 for its host": (answering(403, "Invalid Host header", only="/api/"), "Invalid Host header"),
    "slow": (slow(1.0), ""),
    "cut in the middle of a write": (cut_after_write(), "cannot be reached"),
    "artifacts denied": (answering(403, "not yours", only="mlflow-artifacts"), "refused files, while metrics"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_tracker_with_a_fault(proxy: Proxy, mlflow_uri: str, tmp_path: Path, name: str) -> None:
    """It is tried again until it takes everything: each step once, whatever arrived before."""
    fault, words = FAULTS[name]
    experiment = f"outage: {name}"
    sidecar = Sidecar(tmp_path, tracked(proxy.uri, experiment))
    proxy.fault = fault
    with sidecar.running():
        sidecar.write(*STEPS)
        sidecar.wait_for_steps(*STEPS)
        if words:
            sidecar.wait_for_words(words)
            wait_for(lambda: not sidecar.status()["ready"])
            if name == "artifacts denied":
                wait_for(lambda: not sidecar.read("SELECT 1 FROM deliveries WHERE lane = 'numbers'"))
                assert "artifact store of MLflow run" in sidecar.said()
        proxy.fault = None
        assert sidecar.command("deliveries", "resend").returncode == 0
        wait_for(lambda: sidecar.owed() == 0)
        if words:
            sidecar.wait_for_words("are taken again")
    assert history(mlflow_uri, experiment) == dict.fromkeys(STEPS, 1)


def test_a_run_that_is_deleted_and_restored(mlflow_uri: str, tmp_path: Path) -> None:
    """Nothing is written into a deleted run, and everything once it is back."""
    client = mlflow_client(mlflow_uri)
    experiment = client.create_experiment("outage: deleted")
    run_id = client.create_run(experiment).info.run_id
    sidecar = Sidecar(tmp_path, f'[tracker.mlflow]\ntracking_uri = "{mlflow_uri}"\nrun_id = "{run_id}"\n')
    client.delete_run(run_id)
    with sidecar.running():
        sidecar.write(*STEPS)
        sidecar.wait_for_words("is deleted")
        assert f"mlflow runs restore --run-id {run_id}" in sidecar.said()
        client.restore_run(run_id)
        assert sidecar.command("deliveries", "resend").returncode == 0
        wait_for(lambda: sidecar.owed() == 0)
    assert history(mlflow_uri, "outage: deleted") == dict.fromkeys(STEPS, 1)


def test_a_tracker_that_is_away_for_the_whole_run(tmp_path: Path) -> None:
    """The next agent sends all of it; a server that is restarted goes on where it was."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    sidecar = Sidecar(tmp_path, tracked(uri, "away"))
    with sidecar.running():
        sidecar.write(*STEPS)
        sidecar.wait_for_steps(*STEPS)
        sidecar.wait_for_words("cannot be reached: Connection refused")
    assert sidecar.said().count("numbers for mlflow: ") == 1
    (tmp_path / "server").mkdir()
    with mlflow_server(tmp_path / "server", port), sidecar.running():
        sidecar.command("deliveries", "resend")
        wait_for(lambda: sidecar.owed() == 0)
        assert history(uri, "away") == dict.fromkeys(STEPS, 1)


def test_a_tracker_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    """A server that dies in the middle of a transaction, and is started again: each point is there, once."""
    folder, port = tmp_path / "server", free_port()
    folder.mkdir()
    with mlflow_server(folder, port) as uri, faulty_proxy(uri) as proxy:
        sidecar = Sidecar(tmp_path, tracked(proxy.uri, "killed"))
        proxy.fault = killing(folder / "mlflow.db-journal", lambda: kill_mlflow_server(port))
        with sidecar.running():
            sidecar.write(*STEPS)
            sidecar.wait_for_steps(*STEPS)
            sidecar.wait_for_words("cannot be reached")
            proxy.fault = None
            with mlflow_server(folder, port):
                assert sidecar.command("deliveries", "resend").returncode == 0
                wait_for(lambda: sidecar.owed() == 0)
                assert history(uri, "killed") == dict.fromkeys(STEPS, 1)


# ---------------------------------------------------------------- places


def test_a_directory_that_goes_and_comes_back(tmp_path: Path) -> None:
    """An unmounted file system says nothing of what is on it."""
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n')
    with sidecar.running():
        sidecar.write(100)
        sidecar.wait_for_steps(100)
        sidecar.root.rename(tmp_path / "elsewhere")
        sidecar.wait_for_words("it is not there now")
        wait_for(lambda: not sidecar.status()["ready"])
        (tmp_path / "elsewhere").rename(sidecar.root)
        sidecar.wait_for_words("is there again")
        sidecar.write(200)
        sidecar.wait_for_steps(*STEPS)
    assert len(sidecar.peels()) == 2
    assert sidecar.said().count("it is not there now") == 1


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) gives up root's privileges")
def test_a_directory_that_may_not_be_read_for_a_while(tmp_path: Path) -> None:
    """A permission that comes and goes is a trouble, and no end."""
    command = WITHOUT_PRIVILEGES if os.geteuid() == 0 else []
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n', command)
    with sidecar.running():
        sidecar.write(100)
        sidecar.wait_for_steps(100)
        sidecar.root.chmod(0)
        sidecar.wait_for_words("may not be listed")
        sidecar.root.chmod(0o755)
        sidecar.wait_for_words("is looked at again")
        sidecar.write(200)
        sidecar.wait_for_steps(*STEPS)
    assert sidecar.said().count("may not be listed") == 1


def trainer_only(folder: Path, way: str) -> tuple[Path, list[str]]:
    """A place that the trainer writes to and the agent only reads, and what its command begins with."""
    if way == "permission":
        return folder, WITHOUT_PRIVILEGES if os.geteuid() == 0 else []
    view = folder.with_name("view")
    view.mkdir()
    mounts = (["mount", "--bind", folder, view], ["mount", "-o", "remount,ro,bind", view])
    for mount in mounts:
        done = subprocess.run(mount, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"a directory cannot be mounted here: {done.stderr.strip()}")
    return view, []


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    folder.chmod(0o755)
    yield
    folder.chmod(0o555)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) gives up root's privileges")
@pytest.mark.parametrize("way", ["mount", "permission"])
def test_a_directory_that_may_only_be_read(tmp_path: Path, way: str) -> None:
    """Every checkpoint is peeled, nothing is written there or asked for, and it is told where files that wait are held:
    by links where those can be made, by copies what is rewritten in place, and else not at all, with the reason.
    """
    trainer = tmp_path / "agent" / "checkpoints"
    trainer.mkdir(parents=True)
    place, command = trainer_only(trainer, way)
    try:
        sidecar = Sidecar(tmp_path / "agent", command=command)
        sidecar.root = place
        sidecar.configure('[tracker]\nuse = ["jsonl"]\n')
        sidecar.root = trainer
        trainer.chmod(0o555)
        with sidecar.running():
            with writable(trainer):
                sidecar.write(100)
            sidecar.wait_for_steps(100)
            wait_for(lambda: held(sidecar) == ([] if way == "mount" else ["checkpoint-100"]))
            with writable(trainer):
                torch.save({"model": {"w": torch.zeros(4)}, "model_args": {}, "iter_num": 200}, trainer / "ckpt.pt")
            sidecar.wait_for_steps(*STEPS)
            wait_for(lambda: held(sidecar) == ["ckpt.pt"])
        (pins,) = sidecar.state.glob("runs/*/pins")
        assert f"files of checkpoints that wait in {pins}" in sidecar.said()
        assert sidecar.said().count("files cannot be held") == (way == "mount")
        for words in ("Permission denied", "Read-only file system", "may write", "write access"):
            assert words not in sidecar.said()
        assert sorted(path.name for path in trainer.iterdir()) == ["checkpoint-100", "ckpt.pt"]
    finally:
        if place != trainer:
            subprocess.run(["umount", "-l", str(place)], check=True)


def held(sidecar: Sidecar) -> list[str]:
    return [path.name for path in sidecar.state.glob("runs/*/pins/*/*")]


def test_a_state_folder_without_room(tmp_path: Path) -> None:
    """What was peeled while the disk was full is kept, recorded once there is room, and not peeled again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system of its own size cannot be mounted here: {mounted.stderr.strip()}")
    try:
        sidecar = Sidecar(tmp_path / "agent", '[tracker]\nuse = ["jsonl"]\n[tracker.jsonl]\npath = "/dev/null"\n')
        sidecar.state = disk / "state"
        sidecar.configure('[tracker]\nuse = ["jsonl"]\n')
        with sidecar.running():
            sidecar.write(100)
            sidecar.wait_for_steps(100)
            fill(disk / "filler")
            sidecar.write(200)
            sidecar.wait_for_words("cannot be written: database or disk is full")  # by the run too
            assert sidecar.process is not None
            assert sidecar.process.poll() is None
            (disk / "filler").unlink()
            sidecar.wait_for_steps(*STEPS)
            sidecar.wait_for_words("is looked at again")
            wait_for(lambda: sidecar.owed() == 0)
        assert len(sidecar.peels()) == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(file: Path) -> None:
    """Takes all room that is left."""
    with file.open("wb", buffering=0) as written:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    written.write(b"x" * size)
            except OSError:
                continue


def test_a_ledger_that_is_damaged(tmp_path: Path) -> None:
    """The next agent puts the last copy back, says so, and peels again only what the copy has not."""
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n')
    with sidecar.running():
        sidecar.write(100)
        sidecar.wait_for_steps(100)
    with (sidecar.state / "ledger.sqlite").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 20_000)
    with sidecar.running():
        sidecar.wait_for_words("its last copy was put back")
        sidecar.write(200)
        sidecar.wait_for_steps(*STEPS)
        wait_for(lambda: sidecar.owed() == 0)
    assert len(sidecar.peels()) == 2
    (publications,) = sidecar.state.glob("runs/*/publications.jsonl")
    assert len(publications.read_text().splitlines()) == 4


def clock(shift: str) -> dict[str, str]:
    """The environment of a process whose clock is off; faketime itself would stand between us and its signals."""
    told = subprocess.run(["faketime", "-f", shift, "env"], capture_output=True, text=True, check=True).stdout
    preloaded = dict(line.split("=", 1) for line in told.splitlines() if line.startswith(("LD_PRELOAD=", "FAKETIME=")))
    return {**preloaded, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed: apt-get install faketime")
@pytest.mark.parametrize("shift", ["+3d", "-3d"])
def test_a_clock_that_jumps(tmp_path: Path, shift: str) -> None:
    """An agent whose clock is days off, before or after one whose clock is right, goes on all the same."""
    right = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n')
    with right.running():
        right.write(100)
        right.wait_for_steps(100)
        wait_for(lambda: right.owed() == 0)
    wrong = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n', **clock(shift))
    with wrong.running():
        wrong.write(200)
        wrong.wait_for_steps(*STEPS)
        wait_for(lambda: wrong.owed() == 0)
    with right.running():
        right.write(300)
        right.wait_for_steps(*STEPS, 300)
        wait_for(lambda: right.owed() == 0)
    assert len(right.peels()) == 3


# ---------------------------------------------------------------- runs


def runs(folder: Path, *names: str) -> str:
    text = '[tracker]\nuse = ["jsonl"]\n'
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        text += f'[[run]]\nname = "{name}"\n[run.watch]\npath = "{folder / name}"\n'
    return text


def test_two_runs_of_which_one_breaks_and_a_third_that_is_added(tmp_path: Path) -> None:
    """The other never notices. SIGHUP adds a third; a configuration that cannot be read is refused."""

    def outcomes() -> dict[str, int]:
        rows = sidecar.read("SELECT run, count(*) FROM checkpoints WHERE outcome = 'peeled' GROUP BY run")
        return {run.rpartition("-")[0]: count for run, count in rows}

    sidecar = Sidecar(tmp_path, runs(tmp_path, "one", "two"))
    with sidecar.running():
        for name in ("one", "two"):
            write_checkpoint(tmp_path / name / "checkpoint-100", 100)
        wait_for(lambda: outcomes() == {"one": 1, "two": 1})
        (tmp_path / "one").rename(tmp_path / "gone")
        sidecar.wait_for_words("one: it is not there now")
        write_checkpoint(tmp_path / "two" / "checkpoint-200", 200)
        wait_for(lambda: outcomes() == {"one": 1, "two": 2})

        sidecar.file.write_text("[[run]\n")
        assert sidecar.process is not None
        sidecar.process.send_signal(1)
        sidecar.wait_for_words("the new configuration is refused")
        sidecar.configure(runs(tmp_path, "two", "three"))
        write_checkpoint(tmp_path / "three" / "checkpoint-100", 100)
        sidecar.process.send_signal(1)
        wait_for(lambda: outcomes() == {"one": 1, "two": 2, "three": 1})
        sidecar.wait_for_words("one is not watched any more")
        write_checkpoint(tmp_path / "two" / "checkpoint-300", 300)
        wait_for(lambda: outcomes() == {"one": 1, "two": 3, "three": 1})
    assert len(sidecar.peels()) == 5
    names = [run["name"] for run in sidecar.status()["runs"]]
    assert names == ["three", "two"]


def test_commands_beside_it(tmp_path: Path) -> None:
    """`status` answers beside an agent and after it; ready is 0, not ready is 1."""
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n')
    with sidecar.running():
        sidecar.write(100)
        sidecar.wait_for_steps(100)
        wait_for(lambda: sidecar.command("status").returncode == 0)
        told = sidecar.command("status").stdout
        assert "last peeled: step 100" in told
        assert "1 found, 1 peeled" in told
    after = sidecar.command("status")
    assert after.returncode == 1
    assert "no agent is running" in after.stdout


def test_what_systemd_hears(tmp_path: Path) -> None:
    """READY when it watches, WATCHDOG while its loop goes round, RELOADING and READY again, STOPPING at its end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(120)
        more = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n', **more)

        def hear(word: str) -> None:
            while word not in manager.recv(4096).decode().split("\n"):
                pass

        with sidecar.running():
            hear("READY=1")
            hear("WATCHDOG=1")
            assert sidecar.process is not None
            sidecar.process.send_signal(signal.SIGHUP)
            hear("RELOADING=1")
            hear("READY=1")
            hear("WATCHDOG=1")
            sidecar.process.send_signal(signal.SIGTERM)
            hear("STOPPING=1")
            assert sidecar.process.wait(20) == 0
            sidecar.process = None


def test_status_finds_the_state_that_systemd_gives(tmp_path: Path) -> None:
    """`peel-agent status` without arguments, as a health check of an image runs it."""
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n')
    ask = [sys.executable, "-m", "peel_agent", "status"]
    environment = sidecar.environment | {"STATE_DIRECTORY": str(sidecar.state)}
    with sidecar.running():
        wait_for(lambda: subprocess.run(ask, env=environment, capture_output=True, check=False).returncode == 0)
    assert subprocess.run(ask, env=environment, capture_output=True, check=False).returncode == 1


def test_a_folder_too_high(tmp_path: Path) -> None:
    """Where nothing is found, what lies one level below is said, once."""
    sidecar = Sidecar(tmp_path, '[tracker]\nuse = ["jsonl"]\n')
    write_checkpoint(sidecar.root / "run-a" / "checkpoint-100", 100)
    with sidecar.running():
        sidecar.wait_for_words("run-a")
        assert sidecar.said().count("run-a") == 1
        sidecar.write(100)
        sidecar.wait_for_steps(100)
