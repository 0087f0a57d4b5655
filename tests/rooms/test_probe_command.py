"""`peel-agent probe`: what it writes is what a peel of the source would use, and it is held against the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peel_agent
from peel_agent.cli import main
from peel_agent.load import ProbeSizes, load_probe
from peel_agent.records import Probe
from tests import zoo
from tests.rooms.test_probe_text import WORDS, dataset, table, write_tokenizer

IDS = np.arange(1600) % 19


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama with vocabulary 19, context 32 and a tokenizer beside it; not to be written to."""
    folder = tmp_path_factory.mktemp("model")
    zoo.save(zoo.build("llama", steps=0), folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Text of 1,600 tokens."""
    path = tmp_path / "held_out.txt"
    path.write_text(" ".join(WORDS))
    return path


def make(*arguments: object) -> int:
    return main(["probe", *map(str, arguments)])


def load(path: Path, length: int | None = None, tokenizer: Path | None = None) -> Probe:
    return load_probe(path, ProbeSizes(sequence_length=length), vocabulary=19, context=32, tokenizer=tokenizer)


def test_text_becomes_a_probe(tmp_path: Path, source: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file gives the probe that the text itself gives; the line says what was written and how it is split."""
    out = tmp_path / "heldout.npy"
    assert make("--from", source, "--tokenizer", model / "tokenizer.json", "--out", out, "--model", model) == 0
    (line,) = capsys.readouterr().out.splitlines()
    probe = load(out)
    assert probe.fingerprint == load(source, tokenizer=model / "tokenizer.json").fingerprint
    assert np.load(out).dtype == np.uint16
    counts = f"{len(probe.fit)} to fit, {len(probe.select)} to select, {len(probe.confirm)} to confirm"
    assert f"wrote {out}: 1,600 token ids; a peel uses 1,600 of them in sequences of 32: {counts}" in line
    assert "they suit llama, vocabulary 19, context 32" in line
    assert {path.name for path in tmp_path.iterdir()} == {"heldout.npy", "held_out.txt"}


def test_the_models_tokenizer_is_the_default(tmp_path: Path, source: Path, model: Path) -> None:
    """With --model its own tokenizer is taken."""
    assert make("--from", source, "--out", tmp_path / "p.npy", "--model", model) == 0
    assert load(tmp_path / "p.npy").fingerprint == load(source, tokenizer=model).fingerprint


def test_sequences_of_a_length(tmp_path: Path, source: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --sequence-length the file holds sequences, which later need no setting."""
    out = tmp_path / "p.npy"
    assert make("--from", source, "--tokenizer", model, "--out", out, "--sequence-length", 16, "--tokens", 1000) == 0
    assert np.load(out).shape == (62, 16)
    assert load(out).sequence_length == 16
    assert "held against no model" in capsys.readouterr().out


def wide(path: Path) -> None:
    IDS.astype(np.uint32).tofile(path)


def masked(path: Path) -> None:
    ids = np.pad(IDS.reshape(100, 16), ((0, 0), (0, 4)))
    mask = np.pad(np.ones((100, 16), np.int64), ((0, 0), (0, 4)))
    save_file({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}, path)


@pytest.mark.parametrize(
    ("name", "write", "more", "shape"),
    [
        ("p.bin", wide, ["--dtype", "uint32"], (1600,)),
        ("p.bin", wide, ["--dtype", "uint32", "--tokens", "1500"], (1500,)),
        ("row.npy", lambda path: np.save(path, IDS[None]), [], (1600,)),
        ("rows.npy", lambda path: np.save(path, IDS.reshape(100, 16)), [], (100, 16)),
        ("p.safetensors", masked, [], (100, 16)),
        (
            "set",
            lambda path: dataset(path, [table({"content": [" ".join(WORDS)]})]),
            ["--text-key", "content"],
            (1600,),
        ),
    ],
)
def test_every_source(tmp_path: Path, name: str, write: Any, more: list[str], shape: Any, model: Path) -> None:
    """What can be a probe can be the source of one, and is written as it comes."""
    write(tmp_path / name)
    assert make("--from", tmp_path / name, "--out", tmp_path / "out.npy", "--model", model, *more) == 0
    written = np.load(tmp_path / "out.npy")
    assert written.shape == shape
    assert (written.reshape(-1) == IDS[: written.size]).all()


def test_what_is_left_out_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masked tokens are counted on stderr; stdout has its one line."""
    masked(tmp_path / "p.safetensors")
    assert make("--from", tmp_path / "p.safetensors", "--out", tmp_path / "out.npy", "--model", model) == 0
    captured = capsys.readouterr()
    assert "left out: 400 masked tokens of the probe" in captured.err
    assert len(captured.out.splitlines()) == 1


def test_a_file_is_not_written_over(
    tmp_path: Path, source: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there stays as it is, until --force says otherwise."""
    out = tmp_path / "p.npy"
    out.write_text("mine")
    arguments = ("--from", source, "--out", out, "--model", model)
    assert make(*arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert make(*arguments, "--force") == 0
    assert np.load(out).size == 1600


@pytest.mark.parametrize("force", [False, True])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, source: Path, model: Path, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves the folder as it was."""
    out = tmp_path / "p.npy"
    if force:
        out.write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert make("--from", source, "--out", out, "--model", model, *(["--force"] if force else [])) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not force or out.read_text() == "mine"


REFUSED: dict[str, tuple[list[str], str]] = {
    "vocabulary": (["--from", "{other}", "--model", "{model}"], "token id 19; the model's vocabulary is 19"),
    "length": (["--from", "{text}", "--model", "{model}", "--sequence-length", "64"], "whose context is 32"),
    "no length": (["--from", "{text}", "--model", "{model}", "--sequence-length", "0"], "between 2 and 32"),
    "too few": (["--from", "{text}", "--tokenizer", "{model}"], "1 sequences of 1024 tokens, too few"),
    "few tokens": (["--from", "{text}", "--model", "{model}", "--tokens", "100"], "3 sequences of 32 tokens, too few"),
    "no tokenizer": (["--from", "{text}"], "there is no tokenizer"),
    "no tokens": (["--from", "{text}", "--model", "{model}", "--tokens", "0"], "--tokens is 0"),
    "ending": (["--from", "{text}", "--model", "{model}", "--out", "{folder}/p.bin"], "does not end in .npy"),
    "folder": (["--from", "{text}", "--model", "{model}", "--out", "{folder}/no/p.npy"], "cannot write"),
    "two widths": (["--from", "{wide}", "--model", "{model}"], "--dtype uint32"),
    "nothing": (["--from", "{folder}/nothing.txt", "--model", "{model}"], "no probe at"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_suit_is_not_written(
    tmp_path: Path, kind: str, source: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A probe that the model could not use is refused with exit status 2, the value and the remedy; nothing is
    written.
    """
    np.save(tmp_path / "other.npy", np.append(IDS, [19] * 100))
    wide(tmp_path / "wide.bin")
    places = {"text": source, "model": model, "other": tmp_path / "other.npy", "wide": tmp_path / "wide.bin"}
    given, words = REFUSED[kind]
    arguments = [text.format(folder=tmp_path, **places) for text in given]
    out = [] if "--out" in arguments else ["--out", tmp_path / "out.npy"]
    assert make(*arguments, *out) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "->" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.txt", "other.npy", "wide.bin"]


def test_what_it_writes_is_peeled(
    tmp_path: Path, source: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peel takes the file, and reads as many tokens as were promised."""
    out = tmp_path / "p.npy"
    assert make("--from", source, "--out", out, "--model", model) == 0
    said = capsys.readouterr().out
    probe = peel_agent.scan(model, probe=out, quantities=()).probe
    assert f"a peel uses {probe.fit_tokens + probe.select_tokens + probe.confirm_tokens:,} of them" in said
    assert f"in sequences of {probe.sequence_length}:" in said
