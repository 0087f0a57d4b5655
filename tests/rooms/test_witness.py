"""Where a patch is left, and where none is: the file at --out is there only once it is proven."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peel_agent import registry
from peel_agent.errors import ConfigurationError, NoWitness, PeelError, WorkerError
from peel_agent.records import Estimate, ModelSettings, Peeled, ProbeSettings, Request
from peel_agent.witness import Witness, witness
from tests import zoo


class Engine:
    """Answers what it is told to, and notes what lay at the patch's place by then."""

    def __init__(self, answer: Exception | float) -> None:
        self.answer = answer
        self.patch: Path | None = None

    settings = registry.engine("local").settings

    def open(self, environment: object, settings: object) -> Engine:
        return self

    def submit(self, request: Request) -> Future[Peeled]:
        self.patch = request.patch
        assert self.patch is not None
        assert self.patch.is_file()
        future: Future[Peeled] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        else:
            loss = Estimate(self.answer, self.answer, self.answer)
            future.set_result(type("Peeled", (), {"report": type("Report", (), {"loss": loss})})())
        return future

    def close(self, seconds: float) -> None:
        """Nothing runs here."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    np.save(folder / "probe.npy", zoo.token_ids(400, 1))
    return zoo.save(zoo.build("llama", steps=40), folder / "run", step=10)


def written(checkpoint: Path, out: Path) -> Witness:
    return witness(
        checkpoint,
        layer=2,
        out=out,
        probe=ProbeSettings(path=checkpoint.parents[1] / "probe.npy"),
        model=ModelSettings(),
        device="cpu",
        clock=itertools.count().__next__,
    )


FAULTS: list[tuple[Any, type[PeelError]]] = [
    (WorkerError("the worker ended with signal SIGKILL", remedy="more memory"), WorkerError),
    (1000.0, NoWitness),
    (RuntimeError("of an engine"), RuntimeError),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("answer", "error"), FAULTS, ids=["it dies", "it does not win", "it breaks"])
def test_nothing_is_left_of_what_is_not_proven(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, error: type[Exception]
) -> None:
    """Whatever becomes of the process that measures the patch, no file of it stays."""
    engine = Engine(answer)
    monkeypatch.setattr(registry, "engine", lambda _: engine)
    with pytest.raises(error):
        written(checkpoint, tmp_path / "patch.safetensors")
    assert engine.patch is not None
    assert list(tmp_path.iterdir()) == []


def test_a_proven_patch_takes_its_place_when_it_is_measured(checkpoint: Path, tmp_path: Path) -> None:
    """By the real engine: the file is there under its name, and nothing beside it."""
    proven = written(checkpoint, tmp_path / "patch.safetensors")
    assert proven.patched.value == pytest.approx(proven.trained.value - proven.headroom.value, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["patch.safetensors"]


@pytest.mark.parametrize("kind", ["a file", "a folder", "a link to nothing"])
def test_what_is_there_is_not_written_over(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """It is refused before anything is computed, and stays what it was."""
    out = tmp_path / "patch.safetensors"
    if kind == "a file":
        out.write_text("mine")
    elif kind == "a folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="is there already") as caught:
        written(checkpoint / "no such checkpoint", out)
    assert "--out" in caught.value.remedy
    assert kind != "a file" or out.read_text() == "mine"


def test_a_file_that_came_meanwhile_stays(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands with one --out: the second to end does not take the first one's place."""
    out = tmp_path / "patch.safetensors"
    real = registry.engine("local")

    class Meanwhile:
        settings = real.settings

        def open(self, environment: Any, settings: Any) -> Any:
            out.write_text("another's")
            return real.open(environment, settings)

    monkeypatch.setattr(registry, "engine", lambda _: Meanwhile())
    with pytest.raises(ConfigurationError, match="is there already"):
        written(checkpoint, out)
    assert out.read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["patch.safetensors"]
