"""The ledger beside others: one agent holds it, readers come and go, and it stays bounded."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peel_agent.errors import LedgerError
from peel_agent.ledger import Lane, Ledger, Reader, database, is_held
from peel_agent.ledger import ledger as keeping
from peel_agent.records import Event, RuleState, Verdict
from tests.rooms.test_ledger import DEBTS, KEY, PLACE, VERDICT, checkpoint, everything, opened, record, tallies


def test_one_agent_at_a_time(tmp_path: Path) -> None:
    """A second agent on the same state is refused while the first is there, and not after."""
    assert not is_held(tmp_path)
    first = Ledger(tmp_path)
    assert is_held(tmp_path)
    with pytest.raises(LedgerError, match="another peel-agent is at work") as caught:
        Ledger(tmp_path)
    assert caught.value.exit_code == 2
    assert "--state" in caught.value.remedy
    first.close()
    assert not is_held(tmp_path)
    Ledger(tmp_path).close()


def _fork(work: Callable[[Any], None]) -> tuple[Any, Any]:
    """A child process that does this with its end of a pipe, and our end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(theirs,))
    child.start()
    return child, ours


def _write_until_told(folder: Path) -> Callable[[Any], None]:
    def write(pipe: Any) -> None:
        with opened(folder) as run:
            for step in itertools.count():
                record(run, checkpoint(step, float(step)), debts=DEBTS[:2])
                run.await_turn(checkpoint(step + 10_000, 1.0))
                run.forget(checkpoint(step + 10_000, 1.0))
                if step == 0:
                    pipe.send("going")
                if pipe.poll():
                    pipe.send(step + 1)
                    return

    return write


@pytest.mark.parametrize(("file_system", "mode"), [("ext4", "wal"), ("nfs4", "delete")])
def test_a_reader_beside_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str, mode: str) -> None:
    """While another process writes, a reader finds whole transactions and is never refused, whatever the journal."""
    monkeypatch.setattr(database, "kind_of", lambda path: file_system)
    child, pipe = _fork(_write_until_told(tmp_path))
    assert pipe.recv() == "going"
    seen = []
    while len(set(seen)) < 5:
        with closing(Reader(tmp_path)) as reader:
            peeled = reader.runs()[0].tallies["peeled"]
            due = reader.owed()
            assert reader._database.query("PRAGMA journal_mode") == [(mode,)]
        lanes = {lane.kind: count for lane, (count, _) in due.items()}
        assert set(lanes) == {"numbers", "files"}
        assert lanes["numbers"] == lanes["files"] >= peeled
        seen.append(peeled)
    pipe.send("enough")
    written = pipe.recv()
    child.join()
    assert seen == sorted(seen)
    with closing(Reader(tmp_path)) as reader:
        assert reader.runs()[0].tallies["peeled"] == written


def test_a_reader_beside_an_agent_that_was_killed(tmp_path: Path) -> None:
    """What was committed before a SIGKILL is read, also what is in the write-ahead log alone."""
    child, pipe = _fork(_write_until_told(tmp_path))
    assert pipe.recv() == "going"
    child.kill()
    child.join()
    assert (tmp_path / "ledger.sqlite-wal").stat().st_size > 0
    with closing(Reader(tmp_path)) as reader:
        (run,) = reader.runs()
    assert run.tallies["peeled"] >= 1
    with opened(tmp_path) as again:
        assert again.count("peeled") == run.tallies["peeled"]


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user of the machine may look into, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("is_there", [True, False], ids=["beside the agent", "beside its last files"])
def test_somebody_else_may_read_what_they_cannot_write(public: Path, is_there: bool) -> None:
    """Another user without the right to write reads what stands now, also beside a running agent."""

    def read(pipe: Any) -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        pipe.recv()
        try:
            with closing(Reader(public)) as reader:
                pipe.send([run.tallies for run in reader.runs()])
        except Exception as error:
            pipe.send(error)

    child, pipe = _fork(read)  # before this process opens anything: a child must not share what SQLite keeps
    with opened(public) as run:
        record(run)
        if os.getuid() != 0:
            public.chmod(0o555)
        if is_there:
            pipe.send("now")
            answer = pipe.recv()
    if not is_there:
        pipe.send("now")
        answer = pipe.recv()
    child.join()
    public.chmod(0o755)
    assert answer == [{"peeled": 1.0}]


@pytest.mark.parametrize("place", ["/proc/peel-agent", "file/below", "file"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A read-only folder, and one that cannot be, are errors that name it and say what to give instead."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(LedgerError, match=f"{place} cannot be used") as caught:
        Ledger(Path(place))
    assert "--state" in caught.value.remedy
    assert caught.value.exit_code == 2


def test_no_ledger_to_read(tmp_path: Path) -> None:
    """Reading where there is none makes none, and says what to give."""
    with pytest.raises(LedgerError, match="there is no ledger in") as caught:
        Reader(tmp_path)
    assert "--state" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is told, and what is dropped


def test_a_reader_tells_how_things_stand(tmp_path: Path) -> None:
    """What waits, what is in work, since when, what fires, what is owed and why it was put off."""
    with closing(Ledger(tmp_path)) as ledger:
        run = ledger.run(KEY, "mine", PLACE)
        fires = RuleState("layer_below", "model.layers.3", "firing", 0, 4)
        record(run, verdict=Verdict((*VERDICT.states, fires), ()), debts=DEBTS[:1])
        for number, at in ((7, 30.0), (6, 20.0), (8, 40.0)):
            run.await_turn(checkpoint(number, at))
        run.begin(checkpoint(6, 20.0))
        run.await_turn(replace(checkpoint(9, 50.0), url="s3://bucket/9"))
        head = ledger.outbox.head(Lane(KEY, "mlflow", "numbers"))
        assert head is not None
        ledger.outbox.postpone(head, 99.0, "away")
        ledger.note(Event("found", "first", 1.0, "mine", 5))
        ledger.note(Event("missed", "second", 2.0, None, None, "warning"))
        with closing(Reader(tmp_path)) as reader:
            (state,) = reader.runs()
            assert (state.name, state.place, state.last_step, state.last_committed) == ("mine", PLACE, 5, 12.5)
            assert (state.waiting, state.working) == (("/run/7", "/run/8", "s3://bucket/9"), ("/run/6",))
            assert state.oldest_waiting == 20.0
            assert state.firing == (("layer_below", "model.layers.3", 4),)
            assert reader.owed() == {Lane(KEY, "mlflow", "numbers"): (1, 0)}
            assert reader.why_postponed() == {Lane(KEY, "mlflow", "numbers"): "away"}
            assert [event.words for event in reader.events(9)] == ["first", "second"]
            assert reader.events(1) == (Event("missed", "second", 2.0, None, None, "warning"),)


def test_retention_keeps_every_alert_and_everything_peeled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old events, and old rows of checkpoints that came to nothing, are dropped; what was found stays."""
    monkeypatch.setattr(keeping, "EVENTS_KEPT", 3)
    monkeypatch.setattr(keeping, "CHECKPOINTS_KEPT", 4)
    with closing(Ledger(tmp_path)) as ledger:
        run = ledger.run(KEY, KEY, PLACE)
        record(run, checkpoint(0, 0.0))
        for step in range(1, 10):
            run.pass_over(checkpoint(step, float(step)), "why")
            ledger.note(Event("found", str(step), float(step)))
        ledger.tend(1000.0, every=600.0)
        assert (run.count("peeled"), run.count("passed over")) == (1, 4)
        assert run.outcome("f9") == "passed over"
        with closing(Reader(tmp_path)) as reader:
            assert [event.words for event in reader.events(99)] == ["7", "8", "9"]
        assert [line for *_, line in everything(tmp_path)["alerts"]] == ['{"id": "n1"}']
        assert tallies(tmp_path)["passed_over"] == 9.0
