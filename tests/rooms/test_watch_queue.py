"""Waiting checkpoints: their files are held, and a policy says which is next."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from peel_agent.errors import NoRoom, TornCheckpoint
from peel_agent.pipeline import locate
from peel_agent.records import CheckpointRef, LocalListing
from peel_agent.watch import Pins, Queue, Reserve, fingerprint, pins, scan
from tests.rooms.test_watch_scan import FORMATS, write_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def checkpoint(root: Path, step: int) -> CheckpointRef:
    return locate(write_checkpoint(root / f"checkpoint-{step}", step))


def is_whole(ref: CheckpointRef) -> bool:
    """Whether the format finds the same checkpoint at the place where it is to be read."""
    (form,) = (known for known in FORMATS if known.name == ref.format)
    readiness = form.inspect(LocalListing(ref.in_place().path))
    return readiness.state == "complete" and fingerprint(readiness.files) == ref.fingerprint


class TestPins:
    def test_a_rotated_checkpoint_can_still_be_read(self, root: Path, state: Path) -> None:
        """Held, its files outlive the trainer's rmtree; released, nothing of it is left."""
        held = Pins(root, state)
        ref = held.pin(checkpoint(root, 5))
        shutil.rmtree(ref.path)
        assert ref.held is not None
        assert is_whole(ref)
        held.release(ref)
        assert not ref.held.exists()

    def test_pins_cost_no_space(self, root: Path, state: Path) -> None:
        """A pin shares the trainer's blocks: the same inode, or a clone of it."""
        ref = Pins(root, state).pin(checkpoint(root, 5))
        assert ref.held is not None
        ours, theirs = (ref.held / "model.safetensors").stat(), (ref.path / "model.safetensors").stat()
        assert (ours.st_ino, ours.st_mtime_ns) == (theirs.st_ino, theirs.st_mtime_ns)

    def test_a_single_file_is_held_with_the_config_beside_it(self, root: Path, state: Path) -> None:
        """So is a config.json that several checkpoints share."""
        folder = write_checkpoint(root / "run")
        ref = Pins(root, state).pin(locate(folder / "model.safetensors"))
        shutil.rmtree(folder)
        assert is_whole(ref)

    @pytest.mark.parametrize("removed", [True, False])
    def test_what_changed_meanwhile_is_not_held(self, root: Path, state: Path, removed: bool) -> None:
        """A checkpoint removed or rewritten since it was seen is torn, and leaves nothing behind."""
        ref, held = checkpoint(root, 5), Pins(root, state)
        if removed:
            shutil.rmtree(ref.path)
        else:
            os.utime(ref.path / "model.safetensors", ns=(1, 1))
        with pytest.raises(TornCheckpoint, match="checkpoint-5"):
            held.pin(ref)
        assert not held.folder.exists() or list(held.folder.iterdir()) == []

    def test_without_links_it_is_read_in_place(self, root: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the file system has no links, or forbids them, nothing is held, nothing fails, and it is said why."""

        def forbidden(*_: Any, **__: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", forbidden)
        held = Pins(root, state)
        ref = held.pin(checkpoint(root, 5))
        assert (ref.held, held.why_not) == (None, "Operation not permitted")
        assert is_whole(ref)
        assert held.pin(ref, copy=True).held is not None
        assert held.why_not is None

    def test_a_copy_does_not_follow_what_is_rewritten_in_place(self, root: Path, state: Path) -> None:
        """A link does: the same bytes are the trainer's, and the pins know that it is not whole any more."""
        (state / "copies").mkdir()
        ref, held, copies = checkpoint(root, 5), Pins(root, state), Pins(root, state / "copies")
        linked, copy = held.pin(ref), copies.pin(ref, copy=True)
        assert is_whole(linked)
        assert held.is_whole(linked)
        (root / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
        assert (is_whole(linked), held.is_whole(linked)) == (False, False)
        assert (is_whole(copy), copies.is_whole(copy)) == (True, True)

    def test_no_copy_where_it_would_fill_the_disk(
        self, root: Path, state: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The training needs what is left: such a checkpoint is read where it is."""
        ref, held = checkpoint(root, 5), Pins(root, state)
        total = shutil.disk_usage(state).total
        usage = shutil.disk_usage(state)._replace(free=Reserve().of(total) + sum(one.size for one in ref.files))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        assert held.pin(ref, copy=True).held is not None
        held.release(ref)
        usage = usage._replace(free=usage.free - 1)
        with pytest.raises(NoRoom):
            held.pin(ref, copy=True)
        assert not held.folder.exists() or list(held.folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("gib", "total_gib", "kept_gib"),
        [
            (None, 100, 10),
            (None, 500, 50),
            (None, 10_000, 50),
            (0.0, 100, 0),
            (2.5, 100, 2.5),
            (70.0, 10_000, 70),
            (200.0, 100, 200),
        ],
    )
    def test_what_stays_free(
        self,
        gib: float | None,
        total_gib: int,
        kept_gib: float,
        root: Path,
        state: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """By default a tenth, at most 50 GiB, else what the user says, on a small disk and on a large one: links are
        kept while that is free, and copies are made while it stays free; never where it is more than the disk has.
        """
        ref, held = checkpoint(root, 5), Pins(root, state, reserve=Reserve(gib))
        size, total, kept = sum(file.size for file in ref.files), total_gib * 2**30, int(kept_gib * 2**30)
        held.pin(ref)
        for free in sorted({0, kept - 1, kept, kept + size - 1, kept + size, total}):
            if 0 <= free <= total:
                usage = shutil.disk_usage(state)._replace(total=total, free=free)
                monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
                assert held.crowded() == (free < kept)
                if free < kept + size:
                    with pytest.raises(NoRoom):
                        held.pin(ref, copy=True)
                else:
                    assert held.pin(ref, copy=True).held is not None

    def test_a_copy_ends_with_the_agent(self, root: Path, state: Path) -> None:
        """A large one does not hold the agent back when it is stopped; nothing of it is left."""
        held = Pins(root, state)
        assert held.pin(checkpoint(root, 5), copy=True, stopping=lambda: True).held is None
        assert held.why_not == "the agent ends"
        assert list(held.folder.iterdir()) == []

    @pytest.mark.parametrize("when", ["before the first byte", "after the last byte"])
    def test_a_copy_is_whole_or_torn(self, root: Path, state: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
        """A save that begins while the files are copied is noticed, whatever the copy holds by then."""
        ref, held, copy = checkpoint(root, 5), Pins(root, state), pins._copy
        save = (ref.path / "model.safetensors").write_bytes

        def interrupted(descriptor: int, target: Path, stopping: Any) -> None:
            if when == "before the first byte":
                save(b"another")
            copy(descriptor, target, stopping)
            if when == "after the last byte":
                save(b"another")

        monkeypatch.setattr(pins, "_copy", interrupted)
        with pytest.raises(TornCheckpoint, match="changed"):
            held.pin(ref, copy=True)
        assert list(held.folder.iterdir()) == []

    def test_a_copy_without_exact_times_is_none(self, root: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Modification times tell one save from the next: where they are rounded, a checkpoint is read in place."""
        ref, held, utime = checkpoint(root, 5), Pins(root, state), os.utime
        os.utime(ref.path / "model.safetensors", ns=(1, 1_000_000_001))
        ref = locate(ref.path)

        def rounded(path: Path, ns: tuple[int, int]) -> None:
            utime(path, ns=(ns[0], ns[1] // 10**9 * 10**9))

        monkeypatch.setattr(os, "utime", rounded)
        assert held.pin(ref, copy=True).held is None
        assert held.why_not == "its file system rounds modification times"

    def test_what_is_left_can_be_taken_up(self, root: Path, state: Path) -> None:
        """What a daemon that was killed had pinned is known to the next one; half a pin and a foreign note are not."""
        ref = Pins(root, state).pin(checkpoint(root, 5))
        half = Pins(root, state).pin(checkpoint(root, 10))
        (state / "pins" / f"{half.fingerprint}.json").unlink()
        (state / "pins" / "x.json").write_text('{"held": "/etc/passwd"}')
        again = Pins(root, state)
        assert again.left() == (ref,)
        again.release_all(but=again.left())
        assert is_whole(ref)
        assert sorted(path.name for path in (state / "pins").iterdir()) == [ref.fingerprint, f"{ref.fingerprint}.json"]
        again.release_all()
        assert not (state / "pins").exists()

    def test_two_agents_on_one_root(self, root: Path, tmp_path: Path) -> None:
        """Each lets go of its own pins only, though both are in the root and their state folders have one name."""
        homes = [Path("/dev/shm") / tmp_path.name / name / "state" for name in "ab"]
        for home in homes:
            home.mkdir(parents=True)
        try:
            first, second = (Pins(root, home) for home in homes)
            ref = first.pin(checkpoint(root, 5))
            second.release_all()
            second.pin(ref.released())
            second.release(ref)
            assert is_whole(ref)
        finally:
            shutil.rmtree(homes[0].parents[1])

    def test_what_an_earlier_state_folder_held(self, root: Path, tmp_path: Path) -> None:
        """Pins in the root that version 0.1 made for the whole state folder are taken over by the run."""
        state = Path("/dev/shm") / tmp_path.name / "state"
        (state / "runs" / "key").mkdir(parents=True)
        try:
            ref = Pins(root, state).pin(checkpoint(root, 5))
            assert ref.held is not None
            (left,) = Pins(root, state / "runs" / "key", state).left()
            assert left.fingerprint == ref.fingerprint
            assert is_whole(left)
            assert not ref.held.exists()
        finally:
            shutil.rmtree(state.parent)

    def test_a_link_in_place_of_the_folder(self, root: Path, tmp_path: Path) -> None:
        """Nothing is written or removed through a link of the folder's name: then nothing is held."""
        other, victim = Path("/dev/shm") / tmp_path.name, tmp_path / "victim"
        other.mkdir()
        (victim / "precious").mkdir(parents=True)
        (root / pins.FOLDER).symlink_to(victim)
        try:
            held = Pins(root, other)
            assert held.pin(checkpoint(root, 5)).held is None
            held.release_all()
            assert [path.name for path in victim.iterdir()] == ["precious"]
        finally:
            shutil.rmtree(other)

    @pytest.mark.parametrize("what", ["pipe", "link"])
    def test_a_file_exchanged_for_something_else(self, root: Path, state: Path, what: str) -> None:
        """A named pipe does not hold the daemon, and a link does not bring a file from outside in."""
        ref = checkpoint(root, 5)
        file = ref.path / "model.safetensors"
        status = file.stat()
        if what == "link":
            secret = root.parent / "secret"
            shutil.copy2(file, secret)
            file.unlink()
            file.symlink_to(secret)
            os.utime(secret, ns=(status.st_atime_ns, status.st_mtime_ns))
        else:
            file.unlink()
            os.mkfifo(file)
        with pytest.raises(TornCheckpoint, match=r"model\.safetensors changed"):
            Pins(root, state).pin(ref)

    def test_another_file_system_means_a_folder_of_the_root(self, root: Path, tmp_path: Path) -> None:
        """Links do not cross file systems: pins then lie in the root, unseen by the scan, and go with their owner."""
        other = Path("/dev/shm") / tmp_path.name
        other.mkdir()
        try:
            held = Pins(root, other)
            ref = held.pin(checkpoint(root, 5))
            assert ref.held is not None
            assert ref.held.is_relative_to(root / pins.FOLDER)
            assert [seen.path.name for seen in scan(root, FORMATS)] == ["checkpoint-5"]
            held.release_all()
            assert not (root / pins.FOLDER).exists()
        finally:
            shutil.rmtree(other)


class TestQueue:
    @pytest.mark.parametrize(
        ("policy", "chosen", "passed", "left"),
        [
            ("all", 10, [], [20, 30, 40, 50]),
            ("latest", 50, [10, 20, 30, 40], []),
            ("every:2", 20, [10], [30, 40, 50]),
            ("every:9", 50, [10, 20, 30, 40], []),
        ],
    )
    def test_which_is_next(
        self, root: Path, state: Path, policy: str, chosen: int, passed: list[int], left: list[int]
    ) -> None:
        """By policy, oldest first whatever the order they came in; those before it are passed over, still held."""
        held = Pins(root, state)
        queue = Queue(held, policy)
        refs = {step: checkpoint(root, step) for step in (10, 20, 30, 40, 50)}
        for step in (30, 10, 50, 20, 40):
            queue.add(held.pin(refs[step]))
        ref, older = queue.next()
        assert (ref.step, [passed_ref.step for passed_ref in older], len(queue)) == (chosen, passed, len(left))
        assert all(map(is_whole, (ref, *older)))

    @pytest.mark.parametrize("policy", ["all", "latest", "every:3"])
    def test_one_alone_is_taken(self, root: Path, state: Path, policy: str) -> None:
        """While peeling keeps up nothing is passed over."""
        queue = Queue(Pins(root, state), policy)
        queue.add(checkpoint(root, 10))
        ref, older = queue.next()
        assert (ref.step, older, len(queue)) == (10, [], 0)

    def test_latest_is_what_was_written_last(self, root: Path, state: Path) -> None:
        """A training resumed from an earlier step counts from there; an export without a step overtakes nothing."""
        queue = Queue(Pins(root, state), "latest")
        old = checkpoint(root, 1000)
        queue.add(dataclasses.replace(old, committed_at=old.committed_at - 100))
        queue.add(checkpoint(root, 600))
        queue.add(locate(write_checkpoint(root / "final")))
        ref, passed = queue.next()
        assert (ref.step, [passed_ref.step for passed_ref in passed], len(queue)) == (600, [1000], 1)
        assert queue.next()[0].step is None

    def test_a_full_disk_frees_what_waits(self, root: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pins keep rotated checkpoints on the disk: when it is nearly full they are given up, once, and told."""
        held = Pins(root, state)
        queue = Queue(held, "all")
        queue.add(held.pin(checkpoint(root, 10)))
        assert not queue.make_room()
        usage = shutil.disk_usage(state)._replace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        assert queue.make_room()
        assert not queue.make_room()
        assert queue.lost() == ()
        shutil.rmtree(root / "checkpoint-10")
        assert [ref.step for ref in queue.lost()] == [10]
        assert len(queue) == 0

    def test_what_is_lost(self, root: Path, state: Path) -> None:
        """A save that was written over while it waited, held by a link or not at all, is not to be peeled; one that was
        rotated while a link held it, or written over while a copy did, is.
        """
        held = Pins(root, state)
        queue = Queue(held, "all")
        refs = {step: checkpoint(root, step) for step in (10, 20, 30, 40)}
        for step, ref in refs.items():
            queue.add(ref if step == 10 else held.pin(ref, copy=step == 40))
        for step in (10, 20, 40):
            (refs[step].path / "model.safetensors").write_bytes(b"half")
        shutil.rmtree(refs[30].path)
        assert [ref.step for ref in queue.lost()] == [10, 20]
        assert [queue.next()[0].step for _ in range(2)] == [30, 40]

    def test_one_that_is_put_off(self, root: Path, state: Path) -> None:
        """It waits and is held, but it is not its turn before; a pause longer than any was set by a wrong clock."""
        held = Pins(root, state)
        queue = Queue(held, "all")
        refs = [held.pin(checkpoint(root, step)) for step in (10, 20)]
        queue.put_off(refs[0], 100.0)
        queue.put_off(refs[1], 10_000.0)
        assert (len(queue), refs[0] in queue, queue.held()) == (2, True, tuple(refs))
        for now, turns in ((50.0, [20]), (99.0, []), (100.0, [10])):
            queue.come_due(now, longest=120.0)
            assert [queue.next()[0].step for _ in turns] == turns
            assert not queue.has_next

    @pytest.mark.parametrize(("policy", "overtaken"), [("latest", [10, 20]), ("all", []), ("every:2", [])])
    def test_earlier_saves_of_one_file(self, root: Path, state: Path, policy: str, overtaken: list[int]) -> None:
        """By `latest` each is overtaken by the next: only one copy is needed at a time."""
        queue = Queue(Pins(root, state), policy)
        saves = [
            dataclasses.replace(checkpoint(root, 5), step=step, fingerprint=str(step), committed_at=float(step))
            for step in (10, 20, 30)
        ]
        for save in saves[:2]:
            queue.add(save)
        queue.add(checkpoint(root, 7))
        assert [ref.step for ref in queue.overtaken(saves[2])] == overtaken
