"""Settling: a checkpoint is ready when it is whole and at rest, by the times that it is given."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peel_agent import registry
from peel_agent.config import RunSettings, WatchSettings
from peel_agent.records import FileStamp, Readiness
from peel_agent.sources import source_of
from peel_agent.watch import Folder, Observed, Settling, Sighting, Unread, fingerprint, scan
from tests import s3, servers
from tests.rooms.test_watch_scan import checkpoint_files, safetensors_bytes, write_checkpoint

State = Literal["complete", "incomplete", "damaged"]
START = 1_000_000.0
"""Unix seconds at which the invented checkpoints were last written."""


def sighting(
    name: str = "checkpoint-5",
    *,
    state: State = "complete",
    written: float = START,
    step: int | None = 5,
    size: int = 8,
) -> Sighting:
    """A checkpoint with one file of `size` bytes, written at the time `written`."""
    files = (FileStamp("model.safetensors", size, int(written * 1e9), 1),)
    return Sighting(Path("/runs") / name, "transformers", Readiness(state, f"it is {state}", files, "do that"), step)


class TestReady:
    def test_at_rest_long_enough(self) -> None:
        """A fresh checkpoint waits until settle_seconds have passed without a change, then it is ready."""
        settling = Settling(10)
        for now in (START, START + 9.9):
            observed = settling.observe([sighting()], now)
            assert (observed.ready, len(observed.waiting)) == ((), 1)
            assert "less than 10 s ago" in observed.waiting[0][1]
        (ref,) = settling.observe([sighting()], START + 10).ready
        assert (ref.path, ref.step, ref.format) == (Path("/runs/checkpoint-5"), 5, "transformers")
        assert (ref.committed_at, ref.files) == (START, sighting().readiness.files)

    def test_an_old_one_needs_no_waiting(self) -> None:
        """A checkpoint whose newest file is older than settle_seconds is ready at first sight (`watch --once`)."""
        assert len(Settling(10).observe([sighting()], START + 10).ready) == 1

    def test_it_is_offered_until_the_caller_remembers(self) -> None:
        """Nothing here counts as done: the same checkpoint is ready on every observe, with one fingerprint."""
        settling = Settling(10)
        refs = [settling.observe([sighting()], START + 10 + tick).ready[0] for tick in range(3)]
        assert refs[0] == refs[1] == refs[2]

    def test_a_rewritten_one_settles_anew(self) -> None:
        """A checkpoint rewritten in place waits again, even with old modification times, and is then another."""
        settling = Settling(10)
        (before,) = settling.observe([sighting()], START + 100).ready
        rewritten = sighting(written=START - 50)
        assert settling.observe([rewritten], START + 101).ready == ()
        (after,) = settling.observe([rewritten], START + 111).ready
        assert after.fingerprint != before.fingerprint

    def test_a_file_replaced_by_its_like_settles_anew(self) -> None:
        """A file of the same name, size and time but another inode is a change."""
        settling = Settling(10)
        settling.observe([sighting()], START)
        (stamp,) = sighting().readiness.files
        replaced = dataclasses.replace(
            sighting(), readiness=Readiness("complete", "", (dataclasses.replace(stamp, inode=2),))
        )
        assert settling.observe([replaced], START + 10).ready == ()

    def test_oldest_first(self) -> None:
        """Ready checkpoints come in the order of their steps; those without a step follow in order of time."""
        sightings = [
            sighting("final", step=None, written=START - 5),
            sighting("checkpoint-10", step=10, written=START - 4),
            sighting("export", step=None, written=START - 9),
            sighting("checkpoint-9", step=9, written=START),
        ]
        ready = Settling(10).observe(sightings, START + 60).ready
        assert [ref.path.name for ref in ready] == ["checkpoint-9", "checkpoint-10", "export", "final"]

    def test_a_time_in_the_future(self) -> None:
        """A file server whose clock is ahead delays nothing beyond settle_seconds."""
        settling = Settling(10)
        assert settling.observe([sighting(written=START + 3600)], START).ready == ()
        assert len(settling.observe([sighting(written=START + 3600)], START + 10).ready) == 1

    def test_a_clock_set_back(self) -> None:
        """A clock set back by an hour restarts the waiting and does not lengthen it."""
        settling = Settling(10)
        settling.observe([sighting()], START)
        assert settling.observe([sighting()], START - 3600).ready == ()
        assert len(settling.observe([sighting()], START - 3590).ready) == 1

    @given(
        settle=st.integers(1, 12), ticks=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=25)
    )
    def test_ready_exactly_when_unchanged_for_long_enough(self, settle: int, ticks: list[tuple[int, bool]]) -> None:
        """While its stamps keep changing it is never ready; after settle_seconds without a change it always is."""
        settling, now, changed, size = Settling(settle), START, START, 1
        settling.observe([sighting(size=size)], now)
        for seconds, changes in ticks:
            now += seconds
            if changes:
                changed, size = now, size + 1
            ready = settling.observe([sighting(size=size)], now).ready
            assert bool(ready) == (now - changed >= settle)


class TestNotReady:
    def test_incomplete_waits_then_is_given_up(self) -> None:
        """An incomplete checkpoint waits with its reason; without a change for give_up_seconds it is unreadable."""
        settling = Settling(10, give_up_seconds=60)
        partial = sighting(state="incomplete")
        observed = settling.observe([partial], START + 1)
        assert observed.waiting == (Unread(str(partial.path), "it is incomplete", "do that"),)
        assert settling.observe([partial], START + 59).unreadable == ()
        observed = settling.observe([partial], START + 60)
        assert observed.unreadable == (
            Unread(str(partial.path), "it is incomplete, and nothing changed for 60 s", "do that"),
        )
        assert (observed.ready, observed.waiting) == ((), ())

    def test_an_incomplete_one_that_grows_is_waited_for(self) -> None:
        """As long as something changes an incomplete checkpoint is not given up."""
        settling = Settling(10, give_up_seconds=60)
        for tick in range(10):
            growing = sighting(state="incomplete", size=tick)
            assert settling.observe([growing], START + 50 * tick).unreadable == ()

    def test_given_up_is_not_final(self) -> None:
        """One that was given up and becomes whole is ready once it has settled."""
        settling = Settling(10, give_up_seconds=60)
        assert settling.observe([sighting(state="incomplete")], START + 60).unreadable
        assert settling.observe([sighting()], START + 61).ready == ()
        assert len(settling.observe([sighting()], START + 71).ready) == 1

    def test_damaged_is_unreadable_at_once(self) -> None:
        """A damaged checkpoint is reported with its reason without waiting."""
        broken = sighting(state="damaged")
        assert Settling(10).observe([broken], START).unreadable == (
            Unread(str(broken.path), "it is damaged", "do that"),
        )

    def test_an_empty_folder(self) -> None:
        """An incomplete checkpoint without any file counts from its first sight."""
        settling = Settling(10, give_up_seconds=60)
        empty = dataclasses.replace(sighting(), readiness=Readiness("incomplete", "empty", ()))
        assert len(settling.observe([empty], START).waiting) == 1
        assert len(settling.observe([empty], START + 60).unreadable) == 1

    def test_one_that_vanished_is_forgotten(self) -> None:
        """One that is gone is neither ready nor waiting, and when its name returns it is seen for the first time."""
        settling = Settling(10)
        settling.observe([sighting()], START)
        observed = settling.observe([], START + 10)
        assert (observed.ready, observed.waiting, observed.unreadable) == ((), (), ())
        returned = sighting(size=9)
        assert settling.observe([returned], START + 10).ready == ()
        assert len(settling.observe([returned], START + 20).ready) == 1

    def test_whole_and_removed_before_it_settled_is_told(self) -> None:
        """Such a checkpoint is named once; an incomplete one, one that was offered, or one that moved is not."""
        settling = Settling(10)
        settling.observe([sighting("a"), sighting("b", state="incomplete", size=9)], START)
        observed = settling.observe([sighting("c", size=7)], START + 1)
        assert [ref.path.name for ref in observed.vanished] == ["a"]
        assert settling.observe([sighting("d", size=7)], START + 2).vanished == ()
        assert len(settling.observe([sighting("d", size=7)], START + 20).ready) == 1
        assert settling.observe([], START + 21).vanished == ()

    @pytest.mark.parametrize("skew", [-3600.0, 3600.0])
    def test_the_clock_of_the_machine_that_writes_does_not_matter(self, skew: float) -> None:
        """One that comes while we watch rests for settle_seconds of our clock, whatever its times say."""
        settling = Settling(10)
        settling.observe([], START)
        written = sighting(written=START + skew)
        assert settling.observe([written], START + 1).ready == ()
        assert settling.observe([written], START + 10.9).ready == ()
        assert len(settling.observe([written], START + 11).ready) == 1


class TestFingerprint:
    STAMPS = (FileStamp("a", 1, 2, 3), FileStamp("b", 4, 5, 6))

    @pytest.mark.parametrize("change", [{"name": "c"}, {"size": 9}, {"mtime_ns": 9}])
    def test_it_follows_names_sizes_and_times(self, change: dict[str, Any]) -> None:
        """A change of any name, size or modification time gives another fingerprint."""
        changed = (dataclasses.replace(self.STAMPS[0], **change), self.STAMPS[1])
        assert fingerprint(changed) != fingerprint(self.STAMPS)

    def test_order_and_inodes_do_not_count(self) -> None:
        """The same files in another order or with other inodes have the same fingerprint, of 16 digits."""
        moved = tuple(dataclasses.replace(stamp, inode=99) for stamp in reversed(self.STAMPS))
        assert fingerprint(moved) == fingerprint(self.STAMPS)
        assert len(fingerprint(moved)) == 16

    def test_a_moved_folder_keeps_it(self, tmp_path: Path) -> None:
        """A checkpoint folder moved elsewhere is the same checkpoint."""
        path = write_checkpoint(tmp_path / "a" / "checkpoint-5", 5)
        (before,) = scan(tmp_path / "a", registry.formats())
        (tmp_path / "b").mkdir()
        path.rename(tmp_path / "b" / "checkpoint-5")
        (after,) = scan(tmp_path / "b", registry.formats())
        assert fingerprint(before.readiness.files) == fingerprint(after.readiness.files)
        assert before.path != after.path


def halves(files: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Each file's content in two appended parts, in the order of the files."""
    return [(name, part) for name, data in files.items() for part in (data[: len(data) // 2], data[len(data) // 2 :])]


INDEX = b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}'
SLOWLY = {
    "checkpoint-5": dict(checkpoint_files(5)),
    "step_5": dict(checkpoint_files(None)),
    "sharded": {
        "config.json": b"{}",
        "model-00001-of-00001.safetensors": safetensors_bytes(),
        "model.safetensors.index.json": INDEX,
    },
}


@pytest.mark.parametrize("name", SLOWLY)
@pytest.mark.parametrize("pause", [1.0, 60.0], ids=["shorter than settling", "longer than settling"])
def test_a_slow_writer(tmp_path: Path, name: str, pause: float) -> None:
    """A checkpoint written file by file, in halves, is never ready before its last byte, and is once it has settled.

    Where only Trainer's optimizer and state are to come, it is whole, and the same checkpoint before and after.
    """
    settling, formats = Settling(10), registry.formats()
    early: set[str] = set()
    folder = tmp_path / name
    folder.mkdir()
    now = time.time()
    for file, part in halves(SLOWLY[name]):
        for look in (0.0, pause / 2, pause):
            ready = settling.observe(scan(tmp_path, formats), now + look).ready
            assert ready == () or (file == "optimizer.pt" and pause > 10)
            early |= {ref.fingerprint for ref in ready}
        now += pause
        with (folder / file).open("ab") as stream:
            stream.write(part)
    assert settling.observe(scan(tmp_path, formats), now).ready == ()
    for seconds in itertools.count(1):
        if ready := settling.observe(scan(tmp_path, formats), now + seconds).ready:
            break
    assert (seconds, ready[0].path) == (10, folder)
    assert early <= {ready[0].fingerprint}


# ---------------------------------------------------------------- marker files


class Place(Protocol):
    """A watched place that a test writes to; `look` goes on by half an hour each time."""

    def write(self, name: str, content: bytes) -> None: ...

    def look(self) -> Observed: ...


class Directory:
    def __init__(self, root: Path, markers: tuple[str, ...], *, once: bool = False) -> None:
        watch = WatchSettings(path=str(root), ready_markers=markers)
        self._root, self._now = root, time.time()
        self._source = source_of(RunSettings("run", watch), root, "all", once=once, stopping=lambda: False)

    def write(self, name: str, content: bytes) -> None:
        (self._root / name).parent.mkdir(parents=True, exist_ok=True)
        (self._root / name).write_bytes(content)

    def look(self) -> Observed:
        self._now += 1800
        return self._source.look(self._now)


class ObjectStore:
    def __init__(self, bucket: s3.Bucket, folder: Path, markers: tuple[str, ...], *, once: bool = False) -> None:
        self._bucket, self._prefix, self._now = bucket, folder.name, time.time() + 7200
        watch = WatchSettings(path=f"s3://{bucket.name}/{folder.name}", ready_markers=markers)
        self._source = source_of(RunSettings("run", watch), folder, "latest", once=once, stopping=lambda: False)

    def write(self, name: str, content: bytes) -> None:
        self._bucket.put(f"{self._prefix}/{name}", content)

    def look(self) -> Observed:
        self._now += 1800
        self._source.look(self._now)  # what changed is seen, and settles
        self._now += 1800
        return self._source.look(self._now)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Bucket]:
    with s3.s3_server(tmp_path_factory.mktemp("moto"), servers.free_port()) as url:
        made = s3.Bucket(url, "runs")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3.environment(url).items():
                patch.setenv(name, value)
            yield made
        made.close()


@pytest.fixture(params=[Directory, ObjectStore])
def kind(request: pytest.FixtureRequest) -> Any:
    """How a place of this kind is made: of a folder, markers, and whether it is a single look (`--once`)."""
    if request.param is ObjectStore:
        bucket = request.getfixturevalue("bucket")
        return lambda folder, markers, **more: ObjectStore(bucket, folder, markers, **more)
    return Directory


def put_checkpoint(place: Place, step: int, *more: str) -> None:
    for name, content in (*checkpoint_files(step).items(), *((marker, b"") for marker in more)):
        place.write(f"checkpoint-{step}/{name}", content)


def names(observed: Observed) -> list[str]:
    return [ref.path.name for ref in observed.ready]


class TestMarkers:
    def test_it_waits_for_all_of_them(self, kind: Any, tmp_path: Path) -> None:
        """A whole checkpoint waits, for however long, until every marker is in its folder; it says for which."""
        place = kind(tmp_path, ("STABLE", "EVALUATED"))
        put_checkpoint(place, 5)
        for _ in range(3):
            observed = place.look()
            assert (observed.ready, observed.unreadable) == ((), ())
            assert [reason for _, reason, _ in observed.waiting] == ["waits for STABLE, EVALUATED"]
        place.write("checkpoint-5/STABLE", b"")
        observed = place.look()
        assert (observed.ready, [reason for _, reason, _ in observed.waiting]) == ((), ["waits for EVALUATED"])
        place.write("checkpoint-5/EVALUATED", b"")
        assert names(place.look()) == ["checkpoint-5"]

    def test_one_without_it_holds_up_no_other(self, kind: Any, tmp_path: Path) -> None:
        """The newest lacks its marker: the one before, which has it, is ready."""
        place = kind(tmp_path, ("STABLE",))
        put_checkpoint(place, 5, "STABLE")
        put_checkpoint(place, 10)
        observed = place.look()
        assert names(observed) == ["checkpoint-5"]
        assert [(path[-13:], reason) for path, reason, _ in observed.waiting] == [("checkpoint-10", "waits for STABLE")]

    def test_a_single_look_does_not_wait(self, kind: Any, tmp_path: Path) -> None:
        """With --once nobody waits for a marker that may never come: such a one is unreadable, with the reason."""
        place = kind(tmp_path, ("STABLE",), once=True)
        put_checkpoint(place, 5)
        observed = place.look()
        assert (observed.ready, observed.waiting) == ((), ())
        assert ["waits for STABLE" in reason for _, reason, _ in observed.unreadable] == [True]

    def test_without_markers_none_is_asked_for(self, kind: Any, tmp_path: Path) -> None:
        """The default asks for no file."""
        place = kind(tmp_path, ())
        put_checkpoint(place, 5)
        assert names(place.look()) == ["checkpoint-5"]

    def test_a_marker_ends_the_waiting_at_once(self, tmp_path: Path) -> None:
        """A checkpoint that has been at rest is ready as soon as its marker is there: it does not settle again."""
        write_checkpoint(tmp_path / "checkpoint-5", 5)
        folder, now = Folder(tmp_path, registry.formats(), Settling(10), ("STABLE",)), time.time() + 60
        assert folder.look(now).ready == ()
        (tmp_path / "checkpoint-5" / "STABLE").touch()
        assert names(folder.look(now + 0.1)) == ["checkpoint-5"]

    def test_one_that_goes_without_its_marker_was_never_whole(self, tmp_path: Path) -> None:
        """It is not counted among those that were lost."""
        path = write_checkpoint(tmp_path / "checkpoint-5", 5)
        folder, now = Folder(tmp_path, registry.formats(), Settling(10), ("STABLE",)), time.time()
        assert folder.look(now).vanished == ()
        path.rename(tmp_path / ".aside")
        assert folder.look(now + 1).vanished == ()

    def test_a_single_file_has_no_folder_for_them(self, tmp_path: Path) -> None:
        """One file that is a checkpoint needs no marker."""
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "step-5.safetensors").write_bytes(safetensors_bytes())
        folder = Folder(tmp_path, registry.formats(), Settling(10), ("STABLE",))
        assert names(folder.look(time.time() + 60)) == ["step-5.safetensors"]
