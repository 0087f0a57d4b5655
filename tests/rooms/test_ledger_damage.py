"""A damaged ledger: put back from its last good copy, or refused with the way out, and never silently begun anew."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from peel_agent.errors import LedgerError
from peel_agent.ledger import COPY, FILE, Ledger, Reader, RunLedger, database
from tests.rooms.test_ledger import DEBTS, KEY, PLACE, SKETCHES, VERDICT, checkpoint, everything, opened, record

DAMAGED = "ledger.damaged.sqlite"


def overwritten(file: Path) -> None:
    """As a stray writer leaves it: noise over the middle of every page."""
    noise = random.Random(0)
    content = bytearray(file.read_bytes())
    for start in range(0, len(content), 4096):
        content[start + 200 : start + 3000] = noise.randbytes(2800)
    file.write_bytes(content)


def without_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 100 + content[100:])


def cut_in_the_middle(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2 + 100)


def cut_to_a_page(file: Path) -> None:
    os.truncate(file, 4096)


def emptied(file: Path) -> None:
    """As a power cut leaves it: SQLite itself takes an empty file for a new database."""
    os.truncate(file, 0)


def zeroed(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def zeroed_behind_its_first_page(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\0" * (len(content) - 4096))


DAMAGES = (
    overwritten,
    without_header,
    cut_in_the_middle,
    cut_to_a_page,
    emptied,
    zeroed,
    zeroed_behind_its_first_page,
)

damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


def filled(folder: Path, *, copied: bool) -> None:
    """A ledger with five checkpoints, and with one more than in its copy."""
    with closing(Ledger(folder)) as ledger:
        run = ledger.run(KEY, KEY, PLACE)
        for step in range(5):
            record(run, checkpoint(step, float(step)), observed=True, sketches=SKETCHES)
        if copied:
            ledger.tend(1000.0, every=600.0)
        record(run, checkpoint(5, 5.0))


def check_copy(run: RunLedger) -> None:
    """All that was known when the copy was made, and nothing of what came later."""
    assert [run.outcome(f"f{step}") for step in range(6)] == ["peeled"] * 5 + [None]
    assert run.rule_states() == VERDICT.states
    last = run.last_observed()
    assert last is not None
    assert last.fingerprint == "f4"


@damages
def test_a_damaged_ledger_is_put_back_from_its_copy(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """The next start goes on from the last copy, says so once, and keeps the damaged file."""
    filled(tmp_path, copied=True)
    damage(tmp_path / FILE)
    bytes_then = (tmp_path / FILE).read_bytes()
    with closing(Ledger(tmp_path)) as ledger:
        assert ledger.repaired is not None
        assert "peeled again" in ledger.repaired
        assert DAMAGED in ledger.repaired
        run = ledger.run(KEY, KEY, PLACE)
        check_copy(run)
        record(run, checkpoint(5, 5.0))
        assert ledger.outbox.owed() != {}
    assert (tmp_path / DAMAGED).read_bytes() == bytes_then
    with closing(Ledger(tmp_path)) as ledger:
        assert ledger.repaired is None
        assert ledger.run(KEY, KEY, PLACE).count("peeled") == 6


@damages
@pytest.mark.parametrize("copy", ["none", "damaged"])
def test_without_a_good_copy_it_is_refused_with_the_way_out(
    tmp_path: Path, damage: Callable[[Path], None], copy: str
) -> None:
    """Nothing is begun anew by itself; moved away as the message says, the ledger is, and works."""
    filled(tmp_path, copied=copy == "damaged")
    if copy == "damaged":
        overwritten(tmp_path / COPY)
    damage(tmp_path / FILE)
    bytes_then = (tmp_path / FILE).read_bytes()
    for _ in range(2):
        with pytest.raises(LedgerError, match="is damaged, and there is no good copy") as caught:
            Ledger(tmp_path)
    assert caught.value.exit_code == 2
    assert f"move {tmp_path / FILE} away" in caught.value.remedy
    assert (tmp_path / FILE).read_bytes() == bytes_then
    (tmp_path / FILE).rename(tmp_path / "away")
    with opened(tmp_path) as run:
        assert run.count("peeled") == 0
        record(run)
    with opened(tmp_path) as run:
        assert run.count("peeled") == 1


def test_a_ledger_that_is_gone_is_put_back_too(tmp_path: Path) -> None:
    """Removed, or moved away by a repair that was cut short, it is not begun anew while there is a good copy."""
    filled(tmp_path, copied=True)
    (tmp_path / FILE).unlink()
    with closing(Ledger(tmp_path)) as ledger:
        assert ledger.repaired is not None
        check_copy(ledger.run(KEY, KEY, PLACE))


@pytest.mark.parametrize("at", range(4))
def test_a_repair_that_was_cut_short_is_ended(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends before the n-th file was moved leaves a ledger that the next start repairs."""
    filled(tmp_path, copied=True)
    overwritten(tmp_path / FILE)
    for suffix in ("-wal", "-journal"):
        (tmp_path / f"{FILE}{suffix}").write_bytes(b"of the damaged one")
    moved = 0

    def cut_before(move: str) -> Callable[[Path, Path], Path]:
        real: Callable[[Path, Path], Path] = getattr(Path, move)

        def cut(self: Path, target: Path) -> Path:
            nonlocal moved
            if not self.exists():
                raise FileNotFoundError
            if moved == at:
                raise KeyboardInterrupt
            moved += 1
            return real(self, target)

        return cut

    with monkeypatch.context() as patched:
        patched.setattr(database, "_is_damaged", lambda file: file.name == FILE)
        patched.setattr(Path, "rename", cut_before("rename"))
        patched.setattr(Path, "replace", cut_before("replace"))
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path)
    with opened(tmp_path) as run:
        check_copy(run)
    assert not (tmp_path / f"{FILE}-journal").exists()


def test_a_journal_of_the_damaged_file_is_not_rolled_into_the_copy(tmp_path: Path) -> None:
    """What SQLite left beside a damaged file goes with it."""
    filled(tmp_path, copied=True)
    whole = (tmp_path / COPY).read_bytes()
    for suffix in ("-wal", "-shm", "-journal"):
        (tmp_path / f"{FILE}{suffix}").write_bytes(b"x" * 5000)
    database._put_back_copy(tmp_path)
    assert (tmp_path / FILE).read_bytes() == whole
    assert not list(tmp_path.glob(f"{FILE}-*"))


# ---------------------------------------------------------------- while it is open


def spoiled_under_our_hands(ledger: Ledger, damage: Callable[[Path], None]) -> None:
    """The file is damaged while the agent has it open, with nothing of it left in the agent's own cache."""
    ledger._database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._database._connection.execute("PRAGMA cache_size = 0")
    damage(ledger.state_dir / FILE)


@pytest.mark.parametrize("damage", [overwritten, without_header, zeroed, zeroed_behind_its_first_page, cut_to_a_page])
def test_a_ledger_that_is_damaged_while_open_is_mended(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """The copy takes its place under the same objects, which go on; a second look finds it sound."""
    filled(tmp_path, copied=True)
    with closing(Ledger(tmp_path)) as ledger:
        run = ledger.run(KEY, KEY, PLACE)
        assert ledger.is_sound()
        assert ledger.mend() is None
        spoiled_under_our_hands(ledger, damage)
        assert not ledger.is_sound()
        said = ledger.mend()
        assert said is not None
        assert "peeled again" in said
        check_copy(run)
        record(run, checkpoint(5, 5.0), debts=DEBTS)
        assert ledger.outbox.owed() != {}
        assert ledger.mend() is None
        with closing(Reader(tmp_path)) as reader:
            assert reader.runs()[0].last_step == 5
    with opened(tmp_path) as run:
        assert run.count("peeled") == 6


def test_without_a_good_copy_a_ledger_that_is_open_is_refused(tmp_path: Path) -> None:
    """Each time, and the damaged file is left where it is."""
    filled(tmp_path, copied=False)
    with closing(Ledger(tmp_path)) as ledger:
        spoiled_under_our_hands(ledger, overwritten)
        for _ in range(2):
            with pytest.raises(LedgerError, match="there is no good copy"):
                ledger.mend()
    assert (tmp_path / FILE).exists()


# ---------------------------------------------------------------- copies


def test_a_copy_is_whole_and_made_at_intervals(tmp_path: Path) -> None:
    """The copy has every row of every table as they stand, and is made again once it is older than the interval."""
    with closing(Ledger(tmp_path)) as ledger:
        run = ledger.run(KEY, KEY, PLACE)
        for now, is_copied in ((1000.0, True), (1599.0, False), (1600.0, True), (1000.0, True), (1001.0, False)):
            record(run, checkpoint(int(now), now), observed=True, sketches=SKETCHES)
            before = (tmp_path / COPY).read_bytes() if (tmp_path / COPY).exists() else b""
            ledger.tend(now, every=600.0)
            assert ((tmp_path / COPY).read_bytes() != before) == is_copied
            if is_copied:
                (tmp_path / "as a ledger").mkdir(exist_ok=True)
                (tmp_path / "as a ledger" / FILE).write_bytes((tmp_path / COPY).read_bytes())
                assert everything(tmp_path / "as a ledger") == everything(tmp_path)
    with closing(sqlite3.connect(tmp_path / COPY)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_damaged_ledger_never_takes_the_place_of_its_good_copy(tmp_path: Path) -> None:
    """Copying fails where the ledger cannot be read, and the last good copy stays."""
    filled(tmp_path, copied=True)
    whole = (tmp_path / COPY).read_bytes()
    with closing(Ledger(tmp_path)) as ledger:
        spoiled_under_our_hands(ledger, zeroed_behind_its_first_page)
        with pytest.raises(sqlite3.DatabaseError):
            ledger.tend(9999.0, every=600.0)
        assert (tmp_path / COPY).read_bytes() == whole
        assert ledger.mend() is not None


def test_a_copy_that_is_cut_short_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends, or a disk that is full, in the middle of copying leaves the copy before whole."""
    filled(tmp_path, copied=True)
    whole = (tmp_path / COPY).read_bytes()
    with closing(Ledger(tmp_path)) as ledger:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                ledger.tend(1000.0, every=600.0)
        assert (tmp_path / COPY).read_bytes() == whole
        ledger.tend(1001.0, every=600.0)
        assert (tmp_path / COPY).read_bytes() != whole
