"""The commands on a run in a bucket: a real S3 server, real checkpoints, the agent as its own process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import s3, servers, zoo
from tests.runs.command import environment_of, peel_agent
from tests.waiting import wait_for

FAST = ("--quantities", "bounds", "--maps", "[[4]]", "--sequence-length", "12")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a run, and a probe."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (5, 10, 15):
        path = zoo.save(zoo.build("llama", steps=step), folder, step=step)
        (path / "optimizer.pt").write_bytes(b"never fetched")
    np.save(folder / "probe.npy", zoo.token_ids(200, 3))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = servers.free_port()
    with s3.s3_server(tmp_path_factory.mktemp("moto"), port) as url:
        yield url


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> Iterator[s3.Bucket]:
    made = s3.Bucket(server, request.node.name.replace("_", "-").replace("[", "-").rstrip("]")[:60])
    yield made
    made.close()


def losses_of(saved: Path, home: Path) -> dict[int, float]:
    """The loss of each checkpoint as `scan` finds it on the disk."""
    paths = [saved / f"checkpoint-{step}" for step in (5, 10, 15)]
    ran = peel_agent("scan", *paths, "--probe", saved / "probe.npy", *FAST, "--format", "json", home=home)
    assert ran.returncode == 0, ran.stderr
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    return {report["checkpoint"]["step"]: report["loss"]["value"] for report in reports}


def test_watch_once_and_scan(server: str, bucket: s3.Bucket, saved: Path, tmp_path: Path) -> None:
    """`watch --once` peels every checkpoint of a bucket, `scan` one; the numbers are those of the files on the disk, to
    the last digits, which hang on the number of threads that a worker takes.

    The reports name the URL, all copies but the last one's, which the next is held against, are dropped, a second
    `--once` publishes nothing, and no secret is told.
    """
    for step in (5, 10, 15):
        bucket.upload(saved / f"checkpoint-{step}", f"run/checkpoint-{step}")
    url = f"s3://{bucket.name}/run"
    losses, environment = losses_of(saved, tmp_path), s3.environment(server)
    settings = {"PEEL__WATCH__SETTLE_SECONDS": "0", "PEEL__TRACKER__USE": '["jsonl"]'}
    arguments = ("watch", url, "--once", "--json", "--probe", saved / "probe.npy", *FAST, "--state", tmp_path / "state")
    ran = peel_agent(*arguments, home=tmp_path, **environment, **settings)
    assert ran.returncode == 0, ran.stderr
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [report["checkpoint"]["path"] for report in reports] == [f"{url}/checkpoint-{step}" for step in (5, 10, 15)]
    loss_by_step = {report["checkpoint"]["step"]: report["loss"]["value"] for report in reports}
    assert loss_by_step == pytest.approx(losses, abs=1e-5)
    assert np.diff(sorted(losses.values())).min() > 1e-3  # no other checkpoint has the same
    assert "object store reports no events" in ran.stderr
    assert [path.parent.name for path in (tmp_path / "state").rglob("*.safetensors")] == ["checkpoint-15"]
    again = peel_agent(*arguments, home=tmp_path, **environment, **settings)
    assert (again.returncode, again.stdout) == (0, "")
    one = peel_agent(
        "scan", f"{url}/checkpoint-10", "--probe", saved / "probe.npy", *FAST, "--format", "json", home=tmp_path,
        **environment,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    assert json.loads(one.stdout)["checkpoint"]["path"] == f"{url}/checkpoint-10"
    assert json.loads(one.stdout)["loss"]["value"] == losses[10]
    assert s3.SECRET not in ran.stdout + ran.stderr + again.stderr + one.stdout + one.stderr


def test_watching_while_it_is_uploaded(server: str, bucket: s3.Bucket, saved: Path, tmp_path: Path) -> None:
    """The agent waits for the last object of a checkpoint, and goes on with the next."""
    bucket.put("run/config.json", (saved / "checkpoint-5" / "config.json").read_bytes())
    state, out, err = tmp_path / "state", tmp_path / "out", tmp_path / "err"
    command = [
        "watch", f"s3://{bucket.name}/run", "--json", "--probe", saved / "probe.npy", *FAST, "--state", state
    ]  # fmt: skip
    environment = environment_of(
        tmp_path, **s3.environment(server), PEEL__WATCH__SETTLE_SECONDS="1", PEEL__WATCH__POLL_SECONDS="0.5",
        PEEL__WATCH__BACKLOG="all", PEEL__TRACKER__USE='["jsonl"]',
    )  # fmt: skip
    with out.open("w") as stdout, err.open("w") as stderr:
        agent = subprocess.Popen(
            [sys.executable, "-m", "peel_agent", *map(str, command)], stdout=stdout, stderr=stderr, env=environment
        )
        try:
            wait_for(lambda: "watching" in err.read_text())
            for step in (5, 10):
                files = sorted((saved / f"checkpoint-{step}").iterdir(), key=lambda file: file.name != "config.json")
                for file in files[:-1]:
                    bucket.put(f"run/checkpoint-{step}/{file.name}", file.read_bytes())
                assert f'"step": {step},' not in out.read_text()
                bucket.put(f"run/checkpoint-{step}/{files[-1].name}", files[-1].read_bytes())
                wait_for(lambda step=step: f'"step": {step},' in out.read_text() or agent.poll() is not None)
        finally:
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(240) == 0, err.read_text()
    reports = [json.loads(line) for line in out.read_text().splitlines()]
    assert [report["checkpoint"]["step"] for report in reports] == [5, 10], err.read_text()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://no-such-bucket/run", "no-such-bucket"),
        ("ftp://somewhere/run", "ftp"),
        ("s3://", "s3://"),
    ],
)
def test_what_cannot_be_watched(server: str, url: str, words: str, saved: Path, tmp_path: Path) -> None:
    """A wrong URL is told at once, with what to do, and exit status 2."""
    ran = peel_agent(
        "watch", url, "--once", "--probe", saved / "probe.npy", "--state", tmp_path / "state", home=tmp_path,
        PEEL__TRACKER__USE='["jsonl"]', **s3.environment(server),
    )  # fmt: skip
    assert ran.returncode == 2, ran.stderr
    assert words in ran.stderr
    assert "->" in ran.stderr
    assert "Traceback" not in ran.stderr
