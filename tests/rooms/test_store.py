"""Object stores as watched roots: what real S3 clients and a real server (moto) make of them."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import botocore.session
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import peel_agent
from peel_agent import registry
from peel_agent.cli import main
from peel_agent.config import RunSettings, WatchSettings
from peel_agent.doctor.places import check_place
from peel_agent.errors import (
    CheckpointError,
    ConfigurationError,
    IncompleteCheckpoint,
    NoRoom,
    StoreUnavailable,
    TornCheckpoint,
)
from peel_agent.pipeline import locate
from peel_agent.sources import source_of
from peel_agent.watch import Bucket, Unread, scan, store
from peel_agent.watch.fetch import fetch
from peel_agent.watch.mirror import Mirror, Synced
from peel_agent.watch.store import RemoteObject, Store, name_fault
from peel_agent.watch.units import Division
from tests import s3, servers, zoo

FORMATS = registry.formats()
SETTLE = 10.0
PATIENCE = 240.0
"""Seconds for which a server keeps silent: what takes as long was not ended by the agent."""


@dataclass
class Side:
    """Both sides of one prefix of the bucket: what writes it, and a mirror of it."""

    bucket: s3.Bucket
    gateway: s3.Gateway
    prefix: str
    folder: Path
    now: float = field(default_factory=lambda: time.time() + 7200.0)  # after every object that a test writes

    @property
    def url(self) -> str:
        return f"s3://{self.bucket.name}/{self.prefix}"

    def put(self, name: str, content: bytes) -> None:
        self.bucket.put(f"{self.prefix}/{name}", content)

    def upload(self, folder: Path, name: str) -> None:
        self.bucket.upload(folder, f"{self.prefix}/{name}".rstrip("/"))

    def mirror(self) -> Mirror:
        return Mirror(Store(self.url), self.folder, FORMATS)

    def settle(self, mirror: Mirror) -> Synced:
        """Syncs until nothing is to come, hours apart; fails if that never ends."""
        for _ in range(20):
            self.now += 7200.0
            synced = mirror.sync(self.now, SETTLE)
            if not synced.waiting and not synced.more:
                return synced
        raise AssertionError(synced.waiting)


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of one server for the module."""
    port = servers.free_port()
    with s3.s3_server(tmp_path_factory.mktemp("moto"), port):
        yield port


@pytest.fixture(scope="module")
def shared_gateway(moto: int) -> Iterator[s3.Gateway]:
    with s3.Gateway(moto) as gateway, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment(gateway.url).items():
            patch.setenv(name, value)
        # Every new client parses a megabyte of JSON, the same each time.
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        for limit in ("CONNECT_SECONDS", "READ_SECONDS", "CALL_SECONDS"):  # a server on a busy machine may take longer
            patch.setattr(store, limit, PATIENCE)
        yield gateway


@pytest.fixture(scope="module")
def shared_bucket(moto: int) -> Iterator[s3.Bucket]:
    bucket = s3.Bucket(f"http://127.0.0.1:{moto}", "runs")
    yield bucket
    bucket.close()


@pytest.fixture
def side(shared_gateway: s3.Gateway, shared_bucket: s3.Bucket, tmp_path: Path, request: pytest.FixtureRequest) -> Side:
    """An empty prefix of its own for a test."""
    shared_gateway.reset()
    folder = tmp_path / "mirror"
    folder.mkdir()
    return Side(shared_bucket, shared_gateway, f"{abs(hash(request.node.nodeid)):x}/run", folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What producers write: `export` (save_pretrained), `checkpoint-7` (Trainer's, in shards), `step-3` (DCP)."""
    folder = tmp_path_factory.mktemp("saved")
    model = zoo.build("llama", steps=1)
    model.save_pretrained(folder / "export")
    trainer = folder / "checkpoint-7"
    model.save_pretrained(trainer, max_shard_size="10KB")
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), trainer / "optimizer.pt")
    torch.save({"cpu": torch.get_rng_state()}, trainer / "rng_state.pth")
    (trainer / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "step-3")
    return folder


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint at `path`, as its format reads it."""
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    weights = form.open(ref)
    return {name: weights.read(name) for name in weights.shapes()}


def are_same_bits(one: Path, other: Path) -> bool:
    first, second = tensors_of(one), tensors_of(other)
    return bool(first) and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def complete(root: Path) -> list[str]:
    """Names of the checkpoints that `scan` finds whole."""
    return [seen.path.name for seen in scan(root, FORMATS) if seen.readiness.state == "complete"]


def wanted_names(folder: Path) -> set[str]:
    """The files of a checkpoint that is fetched."""
    return {path.name for path in folder.iterdir()} - {"optimizer.pt", "rng_state.pth", "generation_config.json"}


class TestUpload:
    @pytest.mark.parametrize(("name", "seed"), [("checkpoint-7", 0), ("checkpoint-7", 1), ("export", 2)])
    def test_whole_only_when_all_objects_are_there(self, side: Side, saved: Path, name: str, seed: int) -> None:
        """Uploaded object by object in any order, at rest after each, it is whole from the last needed object on;
        then the bits are the producer's, each object was read once, and no optimizer or random state ever. Trainer's
        state is waited for as soon as anything else of Trainer's is there."""
        files = sorted(path for path in (saved / name).iterdir())
        random.Random(seed).shuffle(files)
        mirror, missing = side.mirror(), wanted_names(saved / name)
        put, is_whole = set[str](), False
        for file in files:
            side.put(f"{name}/{file.name}", file.read_bytes())
            missing.discard(file.name)
            put.add(file.name)
            side.settle(mirror)
            # Without anything else of Trainer's, a checkpoint-N is a training loop's own.
            is_whole |= not missing - (
                {"trainer_state.json"} if put.isdisjoint(("optimizer.pt", "rng_state.pth")) else set()
            )
            assert complete(mirror.root) == ([name] if is_whole else [])
        assert are_same_bits(mirror.root / name, saved / name)
        assert sorted(side.gateway.gets) == sorted(f"{side.prefix}/{name}/{n}" for n in wanted_names(saved / name))

    def test_trainers_state_is_waited_for(self, side: Side, saved: Path) -> None:
        """With Trainer's optimizer there and its state not, nothing is fetched; after ten minutes it says what is
        missing and what to do. A scan says it at once. What comes once it was fetched is not fetched for.
        """
        for file in sorted((saved / "checkpoint-7").iterdir()):
            if file.name != "trainer_state.json":
                side.put(f"checkpoint-7/{file.name}", file.read_bytes())
        mirror, began = side.mirror(), time.time()
        for later, kept in ((30.0, "waiting"), (700.0, "refused")):
            ((_, reason, remedy),) = getattr(mirror.sync(began + later, SETTLE), kept)
            assert (reason, "upload that too" in remedy) == ("waits for trainer_state.json", True)
        with pytest.raises(IncompleteCheckpoint, match=r"trainer_state\.json is not there yet"):
            fetch(f"{side.url}/checkpoint-7", side.folder, FORMATS)
        assert side.gateway.gets == []
        side.put("checkpoint-7/trainer_state.json", b'{"global_step": 7}')
        side.settle(mirror)
        before = locate(mirror.root / "checkpoint-7")
        mirror.drop(mirror.root / "checkpoint-7")
        side.gateway.gets.clear()
        side.put("checkpoint-7/scaler.pt", b"x")
        side.settle(mirror)
        assert (before.step, side.gateway.gets) == (7, [])

    def test_nothing_is_fetched_before_it_is_at_rest(self, side: Side, saved: Path) -> None:
        """While the listing changes within the time to settle it waits, and nothing is read."""
        mirror = side.mirror()
        mirror.sync(side.now, SETTLE)
        for file in sorted((saved / "checkpoint-7").iterdir()):
            side.put(f"checkpoint-7/{file.name}", file.read_bytes())
            side.now += SETTLE - 1
            synced = mirror.sync(time.time() if file.name == "config.json" else side.now, SETTLE)
        assert synced.waiting == (Unread(f"{side.url}/checkpoint-7", "it changed less than 10 s ago"),)
        assert side.gateway.gets == []
        assert mirror.sync(side.now + SETTLE, SETTLE).waiting == ()
        assert complete(mirror.root) == ["checkpoint-7"]

    def test_one_that_changes_while_it_is_fetched_is_fetched_again(self, side: Side, saved: Path) -> None:
        """An object replaced between listing and reading it: no copy appears before it settled anew."""
        side.upload(saved / "export", "export")
        other = zoo.build("llama", steps=2)
        other.save_pretrained(side.folder.parent / "other")
        side.gateway.before = replacing(side, "export/model.safetensors", side.folder.parent / "other")
        mirror = side.mirror()
        synced = mirror.sync(side.now, SETTLE)
        assert synced.waiting[0][1].endswith("changed while it was fetched: export/model.safetensors")
        assert complete(mirror.root) == []
        assert mirror.sync(side.now + 1, SETTLE).waiting[0][1] == "it changed less than 10 s ago"
        side.settle(mirror)
        assert are_same_bits(mirror.root / "export", side.folder.parent / "other")

    def test_one_that_grows_while_it_is_fetched(self, side: Side, saved: Path) -> None:
        """An object that is added meanwhile, needed or not, says that the upload goes on: no copy appears yet."""
        side.upload(saved / "export", "export")
        side.gateway.before = lambda method, key: (
            side.put("export/optimizer.pt", b"x") if "export/config" in key else None
        )
        mirror = side.mirror()
        synced = mirror.sync(side.now, SETTLE)
        assert [(url, reason) for url, reason, _ in synced.waiting] == [
            (f"{side.url}/export", f"{side.url}/export changed while it was fetched")
        ]
        assert complete(mirror.root) == []
        side.gateway.before = lambda method, key: None
        side.settle(mirror)
        assert complete(mirror.root) == ["export"]

    def test_the_oldest_first_one_a_sync(self, side: Side, saved: Path) -> None:
        """Of several at rest each sync fetches one, by the numbers in their names, and says that there are more."""
        for name in ("checkpoint-1000", "checkpoint-200", "export"):
            side.upload(saved / "export", name)
        mirror = side.mirror()
        seen = []
        for _ in range(3):
            more = mirror.sync(side.now, SETTLE).more
            seen.append((sorted(path.name for path in mirror.root.iterdir()), more))
        assert [more for _, more in seen] == [True, True, False]
        assert seen[0][0] == ["checkpoint-200"]
        assert seen[1][0] == ["checkpoint-1000", "checkpoint-200"]

    def test_what_has_been_overtaken_is_not_fetched(self, side: Side, saved: Path) -> None:
        """With `newest_only` no byte is read of a checkpoint that a newer one has overtaken, nor later."""
        for name in ("step-1", "step-2"):
            side.upload(saved / "export", name)
        mirror = side.mirror()
        for _ in range(2):
            assert not mirror.sync(side.now, SETTLE, newest_only=True).more
        assert complete(mirror.root) == ["step-2"]
        assert {key.split("/")[2] for key in side.gateway.gets} == {"step-2"}

    def test_a_stop_between_two_windows(self, side: Side, saved: Path) -> None:
        """Told to stop it reads no further object, and the next sync goes on where it was."""
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        mirror = side.mirror()
        mirror.sync(side.now, SETTLE, stopping=lambda: len(side.gateway.gets) >= 3)
        assert (len(side.gateway.gets), mirror.root.exists()) == (3, False)
        mirror.sync(side.now, SETTLE)
        assert complete(mirror.root) == ["checkpoint-7"]
        assert len(side.gateway.gets) == len(set(side.gateway.gets)) == len(wanted_names(saved / "checkpoint-7"))


def replacing(side: Side, name: str, folder: Path) -> Callable[[str, str], None]:
    """Replaces an object with a file of `folder` just before it is read for the first time."""
    content = [(folder / Path(name).name).read_bytes()]

    def before(method: str, key: str) -> None:
        if method == "GET" and key == f"{side.prefix}/{name}" and content:
            side.put(name, content.pop())

    return before


class TestLayouts:
    def test_the_root_itself_is_a_checkpoint(self, side: Side, saved: Path) -> None:
        """A URL of one checkpoint's folder: its copy has the folder's name, and dropping it leaves nothing."""
        side.prefix += "/checkpoint-7"
        side.upload(saved / "checkpoint-7", "")
        mirror = side.mirror()
        side.settle(mirror)
        assert complete(mirror.root) == ["checkpoint-7"]
        assert are_same_bits(mirror.root, saved / "checkpoint-7")
        mirror.drop(mirror.root)
        assert not mirror.root.exists()
        assert side.settle(side.mirror()).waiting == ()
        assert len(side.gateway.gets) == len(wanted_names(saved / "checkpoint-7"))

    def test_single_files_share_the_config_beside_them(self, side: Side, saved: Path) -> None:
        """Each file is a checkpoint of its own; a config.json that comes last makes them whole."""
        for step in (5, 10):
            side.put(f"step_{step}.safetensors", (saved / "export" / "model.safetensors").read_bytes())
        mirror = side.mirror()
        side.settle(mirror)
        assert complete(mirror.root) == []
        side.put("config.json", (saved / "export" / "config.json").read_bytes())
        mirror.sync(side.now, SETTLE)
        assert complete(mirror.root) == ["step_10.safetensors", "step_5.safetensors"]
        mirror.drop(mirror.root / "step_5.safetensors")
        assert complete(mirror.root) == ["step_10.safetensors"]
        mirror.drop(mirror.root / "step_10.safetensors")
        assert not mirror.root.exists()

    def test_distributed_checkpoint_with_the_config_above(self, side: Side, saved: Path) -> None:
        """A DCP folder is read with the config.json of the run's folder, dotted names included."""
        side.upload(saved / "step-3", "step-3")
        side.put("config.json", (saved / "export" / "config.json").read_bytes())
        mirror = side.mirror()
        side.settle(mirror)
        assert complete(mirror.root) == ["step-3"]
        assert are_same_bits(mirror.root / "step-3", saved / "export")

    def test_an_export_beside_checkpoints(self, side: Side, saved: Path) -> None:
        """Trainer's last save lies in the run's own folder: both are found, and the steps come first."""
        side.upload(saved / "export", "")
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        mirror = side.mirror()
        side.settle(mirror)
        assert complete(mirror.root) == ["checkpoint-7", "run"]
        mirror.drop(mirror.root)
        assert complete(mirror.root) == ["checkpoint-7"]

    def test_folders_of_other_things(self, side: Side) -> None:
        """Logs, hidden folders, folder markers and a folder of single files are no checkpoints: nothing is read."""
        side.put("logs/events.out.tfevents.1.host", b"x")
        side.put(".cache/model.safetensors", b"x")
        side.put("weights/epoch=1-step=8.ckpt", b"x")
        for marker in ("", "checkpoint-1/"):
            side.put(marker, b"")
        synced = side.settle(side.mirror())
        assert (synced.waiting, synced.refused, side.gateway.gets) == ((), (), [])

    def test_a_prefix_too_high(self, side: Side, saved: Path) -> None:
        """Checkpoints below the place where they are looked for are named with the folder to give, as in a folder."""
        side.upload(saved / "export", "exp1/checkpoints/checkpoint-5")
        side.upload(saved / "export", "exp2/checkpoint-7")
        bucket = Bucket(side.mirror(), FORMATS, SETTLE, newest_only=False, stopping=lambda: False)
        observed = bucket.look(side.now)
        assert (observed.ready, observed.waiting, observed.unreadable) == ((), (), ())
        sentences = " | ".join(bucket.near())
        assert f"in {side.url}/exp1/checkpoints there is a checkpoint (checkpoint-5): too deep to be seen" in sentences
        assert f"in {side.url}/exp2 there is a checkpoint (checkpoint-7)" in sentences
        check = next(iter(check_place(RunSettings("run", WatchSettings(path=side.url)), side.folder, "", time.time)))
        assert (check.ok, sentences.split(" | ")[0] in check.words) == (False, True)
        assert side.gateway.gets == []

    def test_what_is_declined_is_not_fetched(self, side: Side) -> None:
        """A layout that is known and not read is refused with its way out, before a byte of it is read."""
        side.put("100/_CHECKPOINT_METADATA", b"{}")
        side.put("100/d/abc", b"x" * 100)
        ((url, reason, remedy),) = side.settle(side.mirror()).refused
        assert url == f"{side.url}/100"
        assert "Orbax" in reason
        assert "to_huggingface.py" in remedy
        assert side.gateway.gets == []


class TestLettingGo:
    def test_rotation(self, side: Side, saved: Path) -> None:
        """The copy of a checkpoint that was deleted goes; a file that is held open is still read."""
        for name in ("checkpoint-7", "export"):
            side.upload(saved / name, name)
        mirror = side.mirror()
        side.settle(mirror)
        with (mirror.root / "export" / "model.safetensors").open("rb") as held:
            side.bucket.delete(f"{side.prefix}/export/")
            side.settle(mirror)
            assert complete(mirror.root) == ["checkpoint-7"]
            assert held.read() == (saved / "export" / "model.safetensors").read_bytes()
        side.bucket.delete(side.prefix)
        side.settle(mirror)
        assert not mirror.root.exists()
        assert list((side.folder / "objects").iterdir()) == []

    def test_a_dropped_one_is_not_fetched_again(self, side: Side, saved: Path) -> None:
        """Neither by the next sync nor after a restart; its disk space is given back."""
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        mirror = side.mirror()
        side.settle(mirror)
        read = list(side.gateway.gets)
        mirror.drop(mirror.root / "checkpoint-7")
        for again in (mirror, side.mirror()):
            side.settle(again)
            assert not again.root.exists()
            assert list((side.folder / "objects").iterdir()) == []
        assert side.gateway.gets == read

    def test_a_restart_fetches_nothing_again(self, side: Side, saved: Path) -> None:
        """The copy and the parts of a copy survive the process, and are given by the first sync."""
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        first = side.mirror()
        first.sync(side.now, SETTLE, stopping=lambda: len(side.gateway.gets) >= 2)
        for _ in range(3):
            mirror = side.mirror()
            mirror.sync(side.now, SETTLE)
            assert complete(mirror.root) == ["checkpoint-7"]
        assert len(side.gateway.gets) == len(wanted_names(saved / "checkpoint-7"))

    def test_fingerprints_stay(self, side: Side, saved: Path) -> None:
        """Fetched anew into an empty folder, a checkpoint has the fingerprint and the time that it had before."""
        began = time.time()
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        uploaded = time.time()
        refs = []
        for _ in range(2):
            mirror = side.mirror()
            side.settle(mirror)
            refs.append(locate(mirror.root / "checkpoint-7"))
            shutil.rmtree(side.folder)
            side.folder.mkdir()
        assert refs[0].fingerprint == refs[1].fingerprint
        assert refs[0].committed_at == refs[1].committed_at
        assert began - 1 <= refs[0].committed_at <= uploaded + 1  # the objects' time in whole seconds, not the mirror's

    def test_another_store_in_the_same_folder(self, side: Side, saved: Path) -> None:
        """What was remembered of another URL, or cannot be parsed, is forgotten with its files."""
        side.upload(saved / "export", "export")
        side.settle(side.mirror())
        (side.folder / "mirror.json").write_text('{"store": []')
        mirror = side.mirror()
        assert not mirror.root.exists()
        side.settle(mirror)
        assert complete(mirror.root) == ["export"]
        side.prefix = f"other/{side.prefix}"
        assert not side.mirror().root.exists()


class TestOverwriting:
    def test_overwritten_object_by_object(self, side: Side, saved: Path) -> None:
        """A checkpoint overwritten in place stays the old one until every file of tensors is new, however long it
        rests in between; then it is the new one, with another fingerprint, also when the old one was dropped."""
        zoo.build("llama", steps=3).save_pretrained(side.folder.parent / "new", max_shard_size="10KB")
        new = side.folder.parent / "new"
        (new / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
        for dropped in (False, True):
            side.upload(saved / "checkpoint-7", "checkpoint-7")
            mirror = side.mirror()
            side.settle(mirror)
            before = locate(mirror.root / "checkpoint-7").fingerprint
            if dropped:
                mirror.drop(mirror.root / "checkpoint-7")
            shards = sorted(new.glob("*.safetensors"))
            for shard in shards[:-1]:
                side.put(f"checkpoint-7/{shard.name}", shard.read_bytes())
                for _ in range(2):
                    side.now += 60.0
                    synced = mirror.sync(side.now, SETTLE)
                assert "overwritten in part: checkpoint-7/model-0000" in synced.waiting[0][1]
                assert dropped or are_same_bits(mirror.root / "checkpoint-7", saved / "checkpoint-7")
                assert complete(mirror.root) == ([] if dropped else ["checkpoint-7"])
            side.put(f"checkpoint-7/{shards[-1].name}", shards[-1].read_bytes())
            side.settle(mirror)
            assert torch.equal(*(t["model.norm.weight"] for t in map(tensors_of, (mirror.root / "checkpoint-7", new))))
            assert locate(mirror.root / "checkpoint-7").fingerprint != before
            side.bucket.delete(side.prefix)
            side.settle(mirror)

    def test_a_part_replaced_for_good(self, side: Side, saved: Path) -> None:
        """When no more comes for an hour, a checkpoint with one file of tensors replaced is taken as it is."""
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        mirror = side.mirror()
        side.settle(mirror)
        shard = min((saved / "checkpoint-7").glob("*.safetensors"))
        side.put(f"checkpoint-7/{shard.name}", shard.read_bytes()[:-1] + b"!")
        mirror.sync(side.now, SETTLE)
        assert "overwritten in part" in mirror.sync(side.now + 3599.0, SETTLE).waiting[0][1]
        assert mirror.sync(side.now + 3600.0, SETTLE).waiting == ()
        assert (mirror.root / "checkpoint-7" / shard.name).read_bytes().endswith(b"!")

    def test_within_a_second_and_of_the_same_size(self, side: Side, saved: Path) -> None:
        """S3 tells times in whole seconds: another object of the same size and time still gives another fingerprint."""
        content = (saved / "export" / "model.safetensors").read_bytes()
        side.upload(saved / "export", "export")
        side.gateway.written = datetime.now(UTC)
        mirror, refs = side.mirror(), []
        for last in b"ab":
            side.put("export/model.safetensors", content[:-1] + bytes([last]))
            side.settle(mirror)
            refs.append(locate(mirror.root / "export"))
        assert [int(ref.committed_at) for ref in refs] == 2 * [int(side.gateway.written.timestamp())]
        assert refs[0].fingerprint != refs[1].fingerprint

    def test_only_what_is_new_is_read(self, side: Side, saved: Path) -> None:
        """When one object is replaced, that one alone is fetched again."""
        side.upload(saved / "export", "export")
        mirror = side.mirror()
        side.settle(mirror)
        side.gateway.gets.clear()
        side.put("export/config.json", (saved / "export" / "config.json").read_bytes() + b"\n")
        side.settle(mirror)
        assert side.gateway.gets == [f"{side.prefix}/export/config.json"]
        assert (mirror.root / "export" / "config.json").read_bytes().endswith(b"\n")


class TestOutages:
    def test_the_server_dies_and_comes_back(self, side: Side, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """While it is away every sync says so and ends, and the copy stays; with the server, work goes on."""
        port = servers.free_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with s3.s3_server(side.folder.parent, port) as url:
            bucket = s3.Bucket(url, "runs")
            bucket.upload(saved / "export", f"{side.prefix}/step-1")
            mirror = side.mirror()
            side.settle(mirror)
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="cannot be read now") as raised:
                mirror.sync(side.now, SETTLE)
            assert raised.value.retryable
            assert complete(mirror.root) == ["step-1"]
        with s3.s3_server(side.folder.parent, port) as url:
            bucket.close()
            bucket = s3.Bucket(url, "runs")
            bucket.upload(saved / "export", f"{side.prefix}/step-2")
            side.settle(mirror)
            bucket.close()
            assert complete(mirror.root) == ["step-2"]

    def test_cut_off_in_the_middle(self, side: Side, saved: Path) -> None:
        """Half fetched is not there at all; afterwards only the rest is read."""
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        mirror, gateway = side.mirror(), side.gateway

        def cut(method: str, key: str) -> None:
            gateway.cut = gateway.cut or len(gateway.gets) >= 4

        gateway.before = cut
        with pytest.raises(StoreUnavailable):
            mirror.sync(side.now, SETTLE)
        assert not mirror.root.exists()
        gateway.before, gateway.cut = (lambda method, key: None), False
        mirror.sync(side.now, SETTLE)
        assert are_same_bits(mirror.root / "checkpoint-7", saved / "checkpoint-7")
        assert len(gateway.gets) == len(wanted_names(saved / "checkpoint-7"))

    @pytest.mark.parametrize(
        ("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (403, "AccessDenied"), (404, "NoSuchBucket")]
    )
    def test_errors_of_the_store(self, side: Side, saved: Path, status: int, code: str) -> None:
        """Any error after it was once reached is given up after a few requests, and is retryable; it is said in the
        store's words and without secrets.
        """
        side.upload(saved / "export", "export")
        mirror = side.mirror()
        mirror.sync(side.now - 7200.0, SETTLE)
        asked: list[str] = []
        side.gateway.before = lambda method, key: asked.append(method) or (status, code)  # type: ignore[func-returns-value]
        with pytest.raises(StoreUnavailable, match=f"injected {code}") as raised:
            mirror.sync(side.now, SETTLE)
        assert 1 <= len(asked) <= 4
        assert s3.SECRET not in str(raised.value)
        side.gateway.reset()
        mirror.sync(side.now, SETTLE)
        assert complete(mirror.root) == ["export"]

    def test_an_object_that_may_not_be_read(self, side: Side, saved: Path) -> None:
        """Listed, but refused when it is read: retryable, and nothing of the checkpoint is shown."""
        side.upload(saved / "export", "export")
        side.gateway.before = lambda method, key: (403, "AccessDenied") if key.endswith("safetensors") else None
        mirror = side.mirror()
        with pytest.raises(StoreUnavailable, match="injected AccessDenied"):
            mirror.sync(side.now, SETTLE)
        assert not mirror.root.exists()

    def test_a_server_that_never_answers(self, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is given up after the time to read, a few times."""
        monkeypatch.setattr(store, "READ_SECONDS", 0.2)
        monkeypatch.setattr(store, "CALL_SECONDS", PATIENCE)
        with servers.silent_server(PATIENCE) as (port, connections):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match="Read timeout"):
                Store("s3://runs/run").list()
            assert time.monotonic() - start < PATIENCE
            assert 1 <= len(connections) <= 4

    def test_a_call_has_an_end(self, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the library is still trying, a call ends after its time."""
        monkeypatch.setattr(store, "CALL_SECONDS", 1.0)
        monkeypatch.setattr(store, "READ_SECONDS", PATIENCE)
        with servers.silent_server(PATIENCE) as (port, _):
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match="Timeout"):
                Store("s3://runs/run").list()
            assert time.monotonic() - start < PATIENCE


class TestConfiguration:
    @pytest.mark.parametrize(
        ("url", "options", "words"),
        [
            ("ftp://runs/run", {}, "'ftp' is known"),
            ("runs/run", {}, "give a folder, or one of s3://"),
            ("s3://", {}, "has a part that is empty"),
            ("s3://runs/../secrets", {}, "`..`"),
            ("s3://key:hunter2@runs/run", {}, "before the bucket's name"),
            ("s3://runs/run", {"secret": "hunter2"}, "unknown option `secret` of s3fs"),
        ],
    )
    def test_what_is_no_store(self, url: str, options: Mapping[str, str], words: str) -> None:
        """A URL or an option that cannot be meant is refused by name before anything is asked, and shows no secret."""
        with pytest.raises(ConfigurationError) as raised:
            Store(url, options)
        assert words in str(raised.value)
        assert "hunter2" not in str(raised.value)

    @pytest.mark.parametrize(("url", "extra"), [("s3://runs/run", "[s3]"), ("gs://runs/run", "[gcs]")])
    def test_a_missing_library(self, url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error says what to install."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigurationError) as raised:
            Store(url)
        assert f'pip install "peel-agent{extra}"' in str(raised.value)

    def test_a_bucket_that_is_not_there(self, side: Side) -> None:
        """That is the configuration's fault; a folder without objects is one that the training has yet to write."""
        with pytest.raises(ConfigurationError, match="s3://no-such-bucket/run cannot be read: there is no such bucket"):
            Store("s3://no-such-bucket/run").list()
        assert Store(side.url).list() == ()

    def test_a_root_that_is_an_object(self, side: Side) -> None:
        """A file is no folder to watch."""
        side.put("ckpt.pt", b"x")
        with pytest.raises(ConfigurationError, match=r"ckpt\.pt is an object"):
            Store(f"{side.url}/ckpt.pt").list()

    def test_no_permission(self, side: Side) -> None:
        """Refused at the first request: the remedy names the credentials."""
        side.gateway.before = lambda method, key: (403, "AccessDenied")
        with pytest.raises(ConfigurationError, match="injected AccessDenied") as raised:
            Store(side.url).list()
        assert "credentials" in raised.value.remedy
        assert s3.SECRET not in str(raised.value)

    def test_no_credentials(self, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        """None in the environment: said at the first request; with `anon` none are needed."""
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with pytest.raises(ConfigurationError, match="locate credentials"):
            Store(side.url).list()
        side.put("a.json", b"{}")
        assert [remote.name for remote in Store(side.url, {"anon": "true"}).list()] == ["a.json"]

    def test_more_objects_than_are_looked_through(self, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        """A folder with too many objects is refused."""
        monkeypatch.setattr(store, "MAX_OBJECTS", 1)
        for name in ("a", "b"):
            side.put(name, b"x")
        with pytest.raises(ConfigurationError, match="holds 2 objects, more than the 1"):
            Store(side.url).list()

    def test_the_parent_imports_neither_torch_nor_the_library(self, side: Side) -> None:
        """A mirror is made without s3fs, botocore or torch; the first request imports no torch either."""
        check = (
            "import sys; from pathlib import Path; from peel_agent.watch.mirror import Mirror\n"
            "from peel_agent.watch.store import Store\n"
            "mirror = Mirror(Store(sys.argv[1]), Path(sys.argv[2]), ())\n"
            "print(sorted({'torch', 'fsspec', 's3fs', 'botocore'} & set(sys.modules)))\n"
            "mirror.sync(0.0, 0.0)\n"
            "print(sorted({'torch', 's3fs'} & set(sys.modules)))"
        )
        command = [sys.executable, "-c", check, side.url, str(side.folder)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        assert ran.stdout.splitlines() == ["[]", "['s3fs']"]


class TestHostileNames:
    @pytest.mark.parametrize(
        ("key", "words"),
        [
            ("checkpoint-1/../../../evil.safetensors", "`..`"),
            ("checkpoint-1//evil.safetensors", "empty"),
            ("checkpoint-1/model.safetensors/evil.json", "is both an object and the folder of"),
            ("checkpoint-1/a?versionId=3.bin.json", "one of the characters"),
            (f"checkpoint-1/{'x' * 300}.json", "too long"),
            (f"checkpoint-1/{'x/' * 9}model.bin.json", "too deep"),
        ],
    )
    def test_refused_by_name(self, side: Side, saved: Path, key: str, words: str) -> None:
        """A checkpoint with such an object is refused with its name, nothing of it is read, and others are."""
        side.upload(saved / "export", "checkpoint-1")
        side.upload(saved / "export", "export")
        side.put(key, b"evil")
        mirror = side.mirror()
        before = set(side.folder.parent.rglob("*"))
        ((url, reason, remedy),) = side.settle(mirror).refused
        assert url == f"{side.url}/checkpoint-1"
        assert words in reason
        assert "rename the object" in remedy
        assert complete(mirror.root) == ["export"]
        assert all(path.is_relative_to(side.folder) for path in set(side.folder.parent.rglob("*")) - before)
        assert not [read for read in side.gateway.gets if "checkpoint-1" in read]

    @pytest.mark.parametrize("key", ["../model.safetensors", "/model.safetensors", "./model.safetensors"])
    def test_names_of_children(self, side: Side, saved: Path, key: str) -> None:
        """A child without a name, or named `.` or `..`, is refused."""
        side.put(key, (saved / "export" / "model.safetensors").read_bytes())
        assert [reason for _, reason, _ in side.settle(side.mirror()).refused if "empty, `.` or `..`" in reason] or (
            key.startswith("./") and side.gateway.gets == []
        )

    def test_an_object_named_as_a_folder(self, side: Side, saved: Path) -> None:
        """`checkpoint-7` beside `checkpoint-7/...`: a file system cannot hold both."""
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        side.put("checkpoint-7", b"x")
        assert [r for _, r, _ in side.settle(side.mirror()).refused] == [
            "'checkpoint-7' is both an object and a folder"
        ]

    @pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\0b", "a\ud800b", "a\\b", "a/../b", "", "/", "a//b", "a/."])
    def test_no_such_name_is_written(self, name: str) -> None:
        """Control characters, lone surrogates, backslashes and parts that lead elsewhere have a fault."""
        assert name_fault(name) is not None

    @pytest.mark.parametrize(
        "name", [".metadata", "__0_0.distcp", "epoch=1-step=8.ckpt", "Größe/модель v2.safetensors"]
    )
    def test_names_that_are_written(self, name: str) -> None:
        """What trainers write, and names in other scripts, have none."""
        assert name_fault(name) is None


class TestRoom:
    def test_larger_than_the_disk(self, side: Side, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What would leave less than a tenth of the disk is refused with its size, and fetched once there is room."""
        side.upload(saved / "export", "export")
        usage = SimpleNamespace(total=1_000_000, used=880_000, free=120_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        mirror = side.mirror()
        ((url, reason, remedy),) = side.settle(mirror).refused
        size = sum((saved / "export" / name).stat().st_size for name in wanted_names(saved / "export"))
        assert f"{url} needs {size:,} bytes" in reason
        assert "make room" in remedy
        assert side.gateway.gets == []
        usage.free = 1_000_000
        side.settle(mirror)
        assert complete(mirror.root) == ["export"]

    @pytest.mark.parametrize(
        ("keep_free_gb", "is_fetched"), [(None, False), (0.0, True), (1e-3, True), (1.0, False), (1e9, False)]
    )
    def test_what_stays_free_is_a_setting(
        self, keep_free_gb: float | None, is_fetched: bool, side: Side, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With 0.1 GiB free of 100 it is fetched when the run's setting lets it, else refused with what to lower."""
        side.upload(saved / "export", "export")
        usage = SimpleNamespace(total=100 * 2**30, used=0, free=2**30 // 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        run = RunSettings("run", WatchSettings(path=side.url, settle_seconds=SETTLE, keep_free_gb=keep_free_gb))
        observed = source_of(run, side.folder, "all", once=True, stopping=lambda: False).look(side.now)
        assert [ref.path.name for ref in observed.ready] == (["export"] if is_fetched else [])
        assert len(observed.unreadable) == (0 if is_fetched else 1)
        assert all("lower [watch] keep_free_gb" in unread.words for unread in observed.unreadable)

    @pytest.mark.parametrize(
        "command",
        [
            "scan {url}/export --probe {probe}",
            "scan {export} --since {url}/export --probe {probe}",
            "compare {url}/export {url}/export --probe {probe}",
            "witness {url}/export --probe {probe} --layer 0 --out {new}.safetensors",
            "witness {export} --from {url}/export --probe {probe} --layer 0 --out {new}.safetensors",
            "probe --from {probe} --model {url}/export --out {new}.npy",
        ],
    )
    def test_commands_keep_the_same_free(
        self,
        command: str,
        side: Side,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """A command that fetches a checkpoint for itself goes by the setting too, as the environment gives it."""
        side.upload(saved / "export", "export")
        np.save(tmp_path / "probe.npy", zoo.token_ids(200, 3))
        monkeypatch.setenv("PEEL__WATCH__KEEP_FREE_GB", "1e9")
        places = {"url": side.url, "export": saved / "export", "probe": tmp_path / "probe.npy", "new": tmp_path / "new"}
        assert main(command.format(**places).split()) == 3
        assert "beside the 1000000000.0 GiB that stay free" in capsys.readouterr().err
        assert side.gateway.gets == []

    def test_functions_keep_the_same_free(
        self, side: Side, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So do `peel_agent.scan` and `peel_agent.compare`."""
        side.upload(saved / "export", "export")
        np.save(tmp_path / "probe.npy", zoo.token_ids(200, 3))
        monkeypatch.setenv("PEEL__WATCH__KEEP_FREE_GB", "1e9")
        url = f"{side.url}/export"
        for call in (peel_agent.scan, functools.partial(peel_agent.compare, url)):
            with pytest.raises(NoRoom, match=r"beside the 1000000000\.0 GiB that stay free"):
                call(url, probe=tmp_path / "probe.npy")
        assert side.gateway.gets == []


def remotes(*names: str, size: int = 10) -> tuple[RemoteObject, ...]:
    return tuple(RemoteObject(name, size, "v", 0) for name in names)


class TestWhatIsNeeded:
    @pytest.mark.parametrize(
        ("names", "left_out"),
        [
            (("model.safetensors", "config.json", "tokenizer.json"), ("optimizer.pt", "scheduler.pt", "notes.log")),
            (("model-00001-of-00002.safetensors", "config.json"), ("pytorch_model.bin", "global_step7/x.pt")),
            (("pytorch_model.bin", "config.json"), ("training_args.bin", "rng_state_0.pth", "merges.txt")),
            (("pytorch_model.bin", "random_states_0.pkl"), ("optimizer.bin", "scheduler.bin")),
            ((".metadata", "__0_0.distcp"), ("scaler.pt", "model.safetensors")),
            (("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"), ("optimizer_0/__0_0.distcp",)),
            (("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"), ("zero_to_fp32.py",)),
            (("metadata.json", "common.pt", ".metadata", "__0_0.distcp"), ("latest",)),
        ],
    )
    def test_by_name(self, names: tuple[str, ...], left_out: tuple[str, ...]) -> None:
        """What the format names in its claim is fetched, with the model's own files, and nothing else."""
        inside = [RemoteObject(f"c/{name}", 10, "v", 0) for name in (*names, *left_out)]
        (unit,) = Division("run", FORMATS).units(inside)
        assert {remote.name.removeprefix("c/") for remote in unit.objects} == set(names)

    def test_a_single_file(self) -> None:
        """Of a file of weights, that file; data beside it is no checkpoint."""
        units = Division("run", FORMATS).units(remotes("ckpt.pt", "train.bin", "val.bin"))
        assert [(unit.name, len(unit.objects)) for unit in units] == [("ckpt.pt", 1)]

    def test_by_size(self) -> None:
        """Weights are fetched whatever their size; JSON of a size that no model has is not."""
        (unit,) = Division("run", FORMATS).units(
            (*remotes("c/model.safetensors", "c/config.json", size=10**9), *remotes("c/notes.log"))
        )
        assert [remote.name for remote in unit.objects] == ["c/model.safetensors"]

    @pytest.mark.parametrize(
        "names",
        [
            ("checkpoint-1/model.safetensors",),
            ("checkpoint-1/model-00001-of-00002.safetensors", "checkpoint-1/model.safetensors.index.json"),
            ("checkpoint-1/pytorch_model.bin", "checkpoint-1/config.json", "checkpoint-1/trainer_state.json"),
            ("step-1/.metadata", "step-1/__0_0.distcp"),
            ("accelerate/pytorch_model_fsdp_0/.metadata", "accelerate/pytorch_model_fsdp_0/__0_0.distcp"),
            ("global_step1/mp_rank_00_model_states.pt", "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
            ("checkpoint-1/global_step1/mp_rank_00_model_states.pt", "checkpoint-1/latest"),
            ("iter_0000001/metadata.json", "iter_0000001/common.pt", "iter_0000001/.metadata"),
            ("ckpt-1.pt",),
            ("epoch=1-step=8.ckpt",),
            ("step_1.safetensors",),
        ],
    )
    def test_no_format_finds_fault_with_names_alone(self, names: tuple[str, ...]) -> None:
        """The names alone of a layout that is read make one unit without a fault: only its bytes can be damaged."""
        (unit,) = Division("run", FORMATS).units(remotes(*names))
        assert (unit.name, unit.fault) == (names[0].partition("/")[0], None)
        assert {remote.name for remote in unit.objects} == set(names)


class TestFetch:
    def test_a_checkpoint_and_the_config_above_it(self, side: Side, saved: Path, tmp_path: Path) -> None:
        """A folder comes under its own name; the config.json above it comes when it has none of its own."""
        side.upload(saved / "step-3", "step-3")
        side.upload(saved / "checkpoint-7", "checkpoint-7")
        side.put("config.json", (saved / "export" / "config.json").read_bytes())
        for name in ("step-3", "checkpoint-7"):
            (tmp_path / f"for-{name}").mkdir()
            path = fetch(f"{side.url}/{name}/", tmp_path / f"for-{name}", FORMATS)
            assert path.name == name
            assert are_same_bits(path, saved / "export")
            assert (path.parent / "config.json").exists() == (name == "step-3")
        assert not (path / "optimizer.pt").exists()

    @pytest.mark.parametrize("name", ["step_5.safetensors", "model.safetensors", "pytorch_model.bin"])
    def test_a_single_file(self, side: Side, saved: Path, tmp_path: Path, name: str) -> None:
        """One file comes with the config.json beside it, and nothing else that is there."""
        content = (saved / "export" / "model.safetensors").read_bytes()
        if name.endswith(".bin"):
            torch.save(tensors_of(saved / "export"), tmp_path / "saved.bin")
            content = (tmp_path / "saved.bin").read_bytes()
        side.put(name, content)
        side.put("step_6.safetensors", b"x" * 1000)
        side.put("config.json", (saved / "export" / "config.json").read_bytes())
        path = fetch(f"{side.url}/{name}", side.folder, FORMATS)
        assert are_same_bits(path, saved / "export")
        assert sorted(entry.name for entry in side.folder.iterdir()) == sorted({name, "config.json"})

    def test_what_is_no_checkpoint(self, side: Side, saved: Path) -> None:
        """Nothing there, a folder of checkpoints, a whole bucket and hostile names are each told by name."""
        side.upload(saved / "export", "a/export")
        side.upload(saved / "export", "b")
        side.put("b/../model.safetensors", b"x")
        for name, words in (
            ("none", f"there is no {side.url}/none"),
            ("a", f"{side.url}/a is no checkpoint of a known format"),
            ("b", f"{side.url}/b is refused: the object's name 'b/../model.safetensors'"),
        ):
            with pytest.raises(CheckpointError) as raised:
                fetch(f"{side.url}/{name}", side.folder, FORMATS)
            assert words in raised.value.what
        with pytest.raises(ConfigurationError, match="is a whole bucket"):
            fetch("s3://runs", side.folder, FORMATS)
        assert list(side.folder.iterdir()) == []
        assert side.gateway.gets == []

    def test_one_that_changes_meanwhile(self, side: Side, saved: Path, tmp_path: Path) -> None:
        """Nothing of it is put in place."""
        side.upload(saved / "export", "export")
        shutil.copytree(saved / "export", tmp_path / "other")
        with (tmp_path / "other" / "model.safetensors").open("ab") as file:
            file.write(b" ")
        side.gateway.before = replacing(side, "export/model.safetensors", tmp_path / "other")
        with pytest.raises(TornCheckpoint, match=r"export/model\.safetensors"):
            fetch(f"{side.url}/export", side.folder, FORMATS)
        assert not (side.folder / "export").exists()


def test_large_objects_come_in_blocks(side: Side, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An object of many windows is put together in order, one request a block, and a time of before is kept."""
    monkeypatch.setattr(store, "BLOCK_BYTES", 1000)
    content = random.Random(0).randbytes(9500)
    side.put("big.bin", content)
    reached = Store(side.url)
    (remote,) = reached.list()
    assert reached.download(remote, tmp_path / "big.bin", lambda: False)
    assert (tmp_path / "big.bin").read_bytes() == content
    assert (tmp_path / "big.bin").stat().st_mtime_ns == remote.modified_ns
    assert len(side.gateway.gets) == 10
    side.put("big.bin", content[:5000])
    with pytest.raises(CheckpointError):
        reached.download(remote, tmp_path / "big.bin", lambda: False)
