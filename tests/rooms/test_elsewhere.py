"""Pieces of a checkpoint's work that are computed elsewhere: whatever becomes of them, the numbers are the same."""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.elsewhere import Elsewhere, received
from peel_agent.errors import WorkerError
from peel_agent.peel import losses_of_piece, peel
from peel_agent.pipeline import locate
from peel_agent.records import (
    DeviceLease,
    Findings,
    HandedOut,
    HeadPiece,
    Helpers,
    ModelSettings,
    PeelSettings,
    Piece,
    Plan,
    ProbeSettings,
    Request,
    TailPiece,
    Timing,
    packed,
    unpacked,
)
from peel_agent.testing.engines import numbers
from peel_plugins.engines.local import LocalEngine
from peel_plugins.engines.ray_pieces import Doorway, given
from tests import zoo

PLAN = Plan(frozenset({"margin", "bounds"}), ("skip", "affine", "previous"), "ends")

PIECES: list[Piece] = [
    TailPiece(2, 3, np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32), np.arange(15).reshape(3, 5)),
    HeadPiece(4, np.ones((3, 5, 4), np.float32), np.full((2, 5, 4), np.nan, np.float32), 1),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save(zoo.build("llama", steps=20), tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def alone(path: Path) -> Findings:
    return findings(zoo.trace_of(path))


def findings(trace: BlockwiseTrace, helpers: Helpers | None = None) -> Findings:
    found = peel(trace, PLAN, itertools.count().__next__, **({} if helpers is None else {"helpers": helpers}))
    return replace(found, timing=Timing(), work={})


class OtherEnd:
    """What an engine has at the other end: it has pieces computed, by `losses`, or lets them fall.

    `fates` say what becomes of one piece after the other: `answered`, `silent` (nobody ever begins it), `lost` with who
    had begun it and then `waiting`, `gone` (nobody will), `hung up`. The last one goes for the others.
    """

    def __init__(self, losses: Callable[[bytes], Sequence[str]], fates: tuple[str, ...]) -> None:
        self._losses = losses
        self._fates = fates
        self._folder = tempfile.TemporaryDirectory(prefix="peel-")
        self.place = Path(self._folder.name) / "pieces"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.place))
        self._socket.listen(1)
        self.came: Counter[type[Piece]] = Counter()
        self.most = 0
        self.dropped: set[int] = set()
        self._out: set[int] = set()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        accepted, _ = self._socket.accept()
        with Connection(accepted.detach()) as connection:
            while True:
                try:
                    message = json.loads(connection.recv_bytes())
                    if "drop" in message:
                        self.dropped.add(message["drop"])
                        self._out.discard(message["drop"])
                        continue
                    piece = connection.recv_bytes()
                except (OSError, EOFError):
                    return
                self.came[type(unpacked(piece))] += 1
                self._out.add(message["id"])
                self.most = max(self.most, len(self._out))
                fate = self._fates[min(sum(self.came.values()), len(self._fates)) - 1]
                if fate == "hung up":
                    return
                for answer in self._answers(fate, piece):
                    with suppress(OSError):  # nobody waits for it any more
                        connection.send_bytes(json.dumps({"id": message["id"], **answer}).encode())
                if fate == "answered":
                    self._out.discard(message["id"])

    def _answers(self, fate: str, piece: bytes) -> Iterator[Mapping[str, object]]:
        if fate == "silent":
            return
        if fate == "gone":
            yield {"lost": "no room"}
            return
        yield {"begun": "a node"}
        if fate == "lost":
            yield {"waiting": True}
        else:
            yield {"losses": self._losses(piece)}

    def close(self) -> None:
        self._thread.join()
        self._socket.close()
        self._folder.cleanup()


def by_a_trace(path: Path) -> Callable[[bytes], Sequence[str]]:
    """Computes pieces with a trace of its own."""
    trace = zoo.trace_of(path)
    return lambda piece: [float(loss).hex() for loss in losses_of_piece(trace, unpacked(piece), lambda: None)]


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: type(piece).__name__)
def test_a_piece_on_its_way(piece: Piece) -> None:
    """A piece comes out of its bytes as it went in, to the last bit."""
    again = unpacked(packed(piece))
    assert type(again) is type(piece)
    for name, value in vars(piece).items():
        np.testing.assert_array_equal(getattr(again, name), value)
        assert np.asarray(getattr(again, name)).dtype == np.asarray(value).dtype


def test_a_piece_that_was_taken_leaves_nothing_behind() -> None:
    """The worker gets the piece; the folder of its socket is gone by then, for who gave it may be killed."""
    with given(packed(PIECES[0])) as place:
        assert isinstance(received(place), TailPiece)
        assert not place.parent.exists()


def test_a_socket_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder whose path is too long for a socket is named with the way out, and left as it was."""
    (deep := tmp_path / ("n" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(WorkerError, match=r"no socket at (.|\n)*nnn(.|\n)*shorter TMPDIR"):
        Doorway()
    assert list(deep.iterdir()) == []


class Answered:
    """A piece that was answered at once."""

    def __init__(self, piece: Piece, answer: NDArray[np.float64]) -> None:
        self.piece = piece
        self.losses = lambda: answer
        self.withdraw = lambda: False


class Everybody:
    """Helpers that take whatever there is, and answer at once with a trace of their own."""

    def __init__(self, path: Path) -> None:
        self._trace = zoo.trace_of(path)
        self.came: Counter[type[Piece]] = Counter()

    def hand_out(self, make: Callable[[], Piece]) -> HandedOut:
        piece = unpacked(packed(make()))
        self.came[type(piece)] += 1
        return Answered(piece, losses_of_piece(self._trace, piece, lambda: None))

    def wait(self, seconds: float) -> None:
        raise AssertionError("everything was answered")


@pytest.mark.parametrize("chunk", [None, 2])
def test_everything_elsewhere(path: Path, alone: Findings, chunk: int | None) -> None:
    """Each block's stand-ins and each head are computed by others, as many sequences at once as here: the same bits."""
    trace = zoo.trace_of(path)
    if chunk is not None:
        trace.chunk.sequences = chunk
        expected = findings(trace)
    helpers = Everybody(path)
    found = findings(trace, helpers)
    assert found == (alone if chunk is None else expected)
    assert helpers.came[TailPiece] >= zoo.BLOCKS
    assert helpers.came[HeadPiece] == len(found.bounds)


@pytest.mark.parametrize(
    "fates",
    [
        ("answered",),
        ("silent",),
        ("lost",),
        ("gone",),
        ("hung up",),
        ("answered", "lost", "silent", "answered", "gone"),
    ],
    ids="-".join,
)
def test_the_same_numbers(path: Path, alone: Findings, fates: tuple[str, ...]) -> None:
    """Margins, bounds and what is remembered are those of one process, whatever becomes of the pieces."""
    end = OtherEnd(by_a_trace(path), fates)
    helpers = Elsewhere(end.place, most=2)
    try:
        assert findings(zoo.trace_of(path), helpers) == alone
    finally:
        helpers.close()
        end.close()
    assert 1 <= end.most <= 2
    assert end.came[TailPiece] > 0


def test_what_a_late_helper_has_not_begun_is_taken_back(path: Path) -> None:
    """Each piece that nobody begins is dropped at the other end, and computed here."""
    end = OtherEnd(by_a_trace(path), ("silent",))
    helpers = Elsewhere(end.place, most=3)
    findings(zoo.trace_of(path), helpers)
    helpers.close()
    end.close()
    assert len(end.dropped) == sum(end.came.values())


def test_workers(path: Path, tmp_path: Path) -> None:
    """A worker hands out pieces at the socket that its request names, and another computes one: the same report."""
    np.save(tmp_path / "probe.npy", zoo.token_ids(65, 1))
    request = Request(
        ref=locate(path),
        probe=ProbeSettings(path=tmp_path / "probe.npy"),
        peel=PeelSettings(quantities=("margin",)),
        model=ModelSettings(),
        lease=DeviceLease("cpu", "", "cpu", "the test's"),
        nice=0,
        threads=1,
    )
    engine = LocalEngine(lambda _: os.environ)
    answers = []

    def by_a_worker(piece: bytes) -> Sequence[str]:
        with given(piece) as place:
            answers.append(engine.answer(replace(request, piece=place))["losses"])
        return answers[-1]

    end = OtherEnd(by_a_worker, ("answered", "silent"))
    try:
        helped = engine.submit(replace(request, helpers=end.place, pieces=1)).result()
        assert numbers(helped) == numbers(engine.submit(request).result())
    finally:
        end.close()
        engine.close(60)
    assert answers
