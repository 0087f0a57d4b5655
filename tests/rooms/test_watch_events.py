"""Hints: events of a real folder end a wait; without them the wait is a timer."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from watchdog.observers.inotify import InotifyObserver

from peel_agent.errors import ConfigurationError
from peel_agent.mounts import file_system_of
from peel_agent.watch import Hints

LONG = 240.0
"""Seconds; a wait that takes this long has failed."""


def later(action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(0.2, action)
    timer.start()
    return timer


def calm(hints: Hints) -> None:
    """Waits until the events of what was written before have come in."""
    while hints.wait(0.5):
        pass


class TestEvents:
    def test_a_file_ends_the_wait(self, tmp_path: Path) -> None:
        """A wait ends early when a file is created in a folder that is created below the root."""
        with Hints(tmp_path) as hints:
            assert hints.status == "events and timed scans"
            began = time.monotonic()
            timer = later(lambda: write_below(tmp_path))
            assert hints.wait(LONG)
            assert time.monotonic() - began < LONG
            timer.join()

    @pytest.mark.parametrize("action", ["modify", "move"])
    def test_a_change_below_the_root(self, tmp_path: Path, action: str) -> None:
        """Appending to a file and renaming a folder, as trainers do, are hints too."""
        file = write_below(tmp_path)
        with Hints(tmp_path) as hints:
            calm(hints)
            if action == "modify":
                with file.open("a") as stream:
                    stream.write("more")
            else:
                file.parent.rename(tmp_path / "checkpoint-5")
            assert hints.wait(LONG)

    @pytest.mark.parametrize("how", ["removed", "moved"])
    def test_a_root_that_is_made_again(self, tmp_path: Path, how: str) -> None:
        """After `refresh` a folder of the same name is heard of again; while there is none, nothing fails."""
        root = tmp_path / "run"
        root.mkdir()
        with Hints(root) as hints:
            if how == "removed":
                root.rmdir()
            else:
                root.rename(tmp_path / "old")
            hints.refresh()
            root.mkdir()
            time.sleep(0.2)
            hints.refresh()
            calm(hints)
            write_below(root)
            assert hints.wait(LONG)

    def test_an_object_store_has_none(self) -> None:
        """Without a folder the wait is a timer, which `wake` ends."""
        with Hints(None) as hints:
            assert "object store" in hints.status
            assert not hints.wait(0.1)
            timer = later(hints.wake)
            assert hints.wait(LONG)
            timer.join()

    def test_reading_is_no_hint(self, tmp_path: Path) -> None:
        """Opening, reading and listing, which peel-agent does itself, raise no hint."""
        file = write_below(tmp_path)
        with Hints(tmp_path) as hints:
            calm(hints)
            assert file.read_text() == "text"
            assert list(tmp_path.iterdir())
            assert not hints.wait(0.5)

    def test_a_single_file_as_root(self, tmp_path: Path) -> None:
        """A watched file is watched through its folder, so that replacing it is seen."""
        file = tmp_path / "model.safetensors"
        file.write_text("1")
        with Hints(file) as hints:
            calm(hints)
            (tmp_path / "new").write_text("2")
            (tmp_path / "new").replace(file)
            assert hints.wait(LONG)

    def test_a_link_as_root(self, tmp_path: Path) -> None:
        """A root that is a link is watched where it leads."""
        (tmp_path / "real").mkdir()
        (tmp_path / "current").symlink_to("real")
        with Hints(tmp_path / "current") as hints:
            calm(hints)
            write_below(tmp_path / "real")
            assert hints.wait(LONG)

    def test_no_thread_is_left(self, tmp_path: Path) -> None:
        """Leaving the context ends every thread that it started."""
        before = threading.active_count()
        with Hints(tmp_path):
            assert threading.active_count() > before
        assert threading.active_count() == before


def write_below(root: Path) -> Path:
    folder = root / "tmp-5"
    folder.mkdir()
    (folder / "file").write_text("text")
    return folder / "file"


class TestWake:
    def test_from_another_thread(self, tmp_path: Path) -> None:
        """`wake` from another thread ends the wait."""
        with Hints(tmp_path) as hints:
            timer = later(hints.wake)
            assert hints.wait(LONG)
            timer.join()

    def test_many_hints_end_one_wait(self, tmp_path: Path) -> None:
        """All that came before a wait ends that wait, and not the next one as well."""
        with Hints(tmp_path) as hints:
            for _ in range(5):
                hints.wake()
            assert hints.wait(LONG)
            assert not hints.wait(0.0)

    def test_from_a_signal_handler(self, tmp_path: Path) -> None:
        """`wake` from a signal handler, which interrupts the waiting thread itself, ends the wait."""
        with Hints(tmp_path) as hints:
            before = signal.signal(signal.SIGALRM, lambda *_: hints.wake())
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                assert hints.wait(LONG)
            finally:
                signal.signal(signal.SIGALRM, before)


class TestWithoutEvents:
    def test_a_root_that_does_not_exist(self, tmp_path: Path) -> None:
        """A missing root is a configuration error that names it and says what to do."""
        with pytest.raises(ConfigurationError, match=str(tmp_path / "gone")) as caught:
            Hints(tmp_path / "gone")
        assert "mkdir -p" in caught.value.remedy

    @pytest.mark.parametrize(
        ("kind", "told"), [("nfs4", "nfs4"), ("lustre", "lustre"), ("fuse.sshfs", "fuse"), ("fuse", "fuse")]
    )
    def test_a_network_file_system(self, tmp_path: Path, kind: str, told: str) -> None:
        """On a file system without events nothing is started, the status says so, and the wait is a timer."""
        mountinfo = tmp_path / "mountinfo"
        mountinfo.write_text(f"36 25 0:32 / {tmp_path.resolve()} rw shared:1 - {kind} server:/x rw\n")
        before = threading.active_count()
        with Hints(tmp_path, mountinfo) as hints:
            assert hints.status == f"timed scans only: {told} reports no events"
            assert threading.active_count() == before
            (tmp_path / "file").write_text("x")
            assert not hints.wait(0.05)
            hints.wake()
            assert hints.wait(LONG)

    def test_an_inotify_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An observer that cannot start is reported with the remedy, leaves no thread, and the wait is a timer."""

        def full(observer: object) -> None:
            raise OSError(28, "inotify watch limit reached")

        before = threading.active_count()
        monkeypatch.setattr(InotifyObserver, "start", full)
        with Hints(tmp_path) as hints:
            assert hints.status.startswith("timed scans only: inotify watch limit reached; raise fs.inotify.max_user_")
            assert threading.active_count() == before
            (tmp_path / "file").write_text("x")
            assert not hints.wait(0.05)

    def test_no_mountinfo(self, tmp_path: Path) -> None:
        """Where there is no /proc, events are tried."""
        with Hints(tmp_path, tmp_path / "nothing") as hints:
            assert hints.status == "events and timed scans"


MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
40 27 0:50 / /data rw,relatime shared:5 master:2 - nfs4 server:/export rw,vers=4.2
41 40 0:51 / /data/local\040disk rw,relatime - xfs /dev/vdb rw
42 27 0:52 / /home/me/remote rw,nosuid - fuse.sshfs me@host: rw
43 27 0:53 / /over rw - ext4 /dev/vdc rw
44 43 0:54 / /over rw - lustre mgs:/fs rw
a line that is no mount
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/runs", "ext4"),
        ("/data", "nfs4"),
        ("/data/runs/checkpoint-5", "nfs4"),
        ("/database", "ext4"),
        ("/data/local disk/runs", "xfs"),
        ("/data/local", "nfs4"),
        ("/home/me/remote/x", "fuse.sshfs"),
        ("/over/runs", "lustre"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    """The longest mount point above a path decides, whole names only; of two at one place, the later."""
    assert file_system_of(Path(path), MOUNTINFO) == kind


def test_the_file_system_is_unknown_without_mounts() -> None:
    """Without any mount the type is empty."""
    assert file_system_of(Path("/runs"), "") == ""
