"""Probes of token ids: every file that holds the same ids gives the same probe, and every other one is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peel_agent.errors import ProbeError
from peel_agent.load import ProbeSizes, load_probe
from peel_agent.load.network import load_samples
from peel_agent.records import Probe
from tests import zoo

IDS = np.arange(1600) % 19
LARGE = (np.arange(1600) * 7919) % 100_000
"""Ids of a vocabulary that needs four bytes."""


def load(path: Path, *, length: int | None = 16, vocabulary: int = 19, dtype: str | None = None, **sizes: int) -> Probe:
    wanted = ProbeSizes(**sizes, sequence_length=length)
    return load_probe(path, wanted, vocabulary=vocabulary, context=32, tokenizer=None, dtype=dtype)


def ids_file(folder: Path, ids: Any = IDS) -> Path:
    np.save(folder / "ids.npy", ids)
    return folder / "ids.npy"


def test_split(tmp_path: Path) -> None:
    """The parts are disjoint sequences in the contract's proportions, the same at every call."""
    path = ids_file(tmp_path, np.arange(16 * 110))
    first, again = (load(path, vocabulary=16 * 110) for _ in range(2))
    assert (len(first.fit), len(first.select), len(first.confirm)) == (80, 10, 20)
    every = np.concatenate([first.fit, first.select, first.confirm])
    assert len({row[0] for row in every.tolist()}) == 110
    assert (np.diff(every, axis=1) == 1).all()
    assert first.fingerprint == again.fingerprint
    assert (first.confirm == again.confirm).all()


def test_sizes_are_upper_limits(tmp_path: Path) -> None:
    """A large probe gives no more than the tokens asked for."""
    probe = load(ids_file(tmp_path, np.arange(16 * 2000) % 19), fit=800, select=160, confirm=320)
    assert (probe.fit.size, probe.select.size, probe.confirm.size) == (800, 160, 320)


# ---------------------------------------------------------------- files that hold the same ids


def llm_c(path: Path, dtype: str, ids: Any = IDS) -> None:
    """As llm.c's own script writes it: 256 numbers of 32 bits (magic, version, how many ids), then the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype] + (len(ids),)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def megatron(path: Path, code: int, dtype: str, *, gap: int = 0) -> None:
    """A pair as Megatron's builder writes it (held against the builder itself in contracts/test_megatron_format): 16
    documents of 100 ids. With a `gap` the index passes over so many ids after each, as one of a filtered data set does.
    """
    content = np.full((16, 100 + gap), 18)
    content[:, :100] = IDS.reshape(16, 100)
    content.astype(dtype).tofile(path.with_suffix(".bin"))
    head = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([code]) + np.array([16, 17], "<u8").tobytes()
    starts = np.arange(16, dtype="<i8") * (100 + gap) * np.dtype(dtype).itemsize
    lists = (np.full(16, 100, "<i4"), starts, np.arange(17, dtype="<i8"))
    path.with_suffix(".idx").write_bytes(head + b"".join(one.tobytes() for one in lists))


def beside(path: Path, dtype: torch.dtype) -> None:
    """Ids and a tensor of a dtype that numpy does not have, as a caching script stores both."""
    save_file({"input_ids": torch.from_numpy(IDS), "hidden_states": torch.ones(4, 4).to(dtype)}, path)


SAME: dict[str, tuple[str, Callable[[Path], object]]] = {
    "npy": ("p.npy", lambda path: np.save(path, IDS.astype(np.uint16))),
    "npy, column-major": ("p.npy", lambda path: np.save(path, np.asfortranarray(IDS.reshape(100, 16)))),
    "npy, rows": ("p.npy", lambda path: np.save(path, IDS.reshape(100, 16))),
    "npy, one row": ("p.npy", lambda path: np.save(path, IDS[None])),
    "npy, one column": ("p.npy", lambda path: np.save(path, IDS[:, None])),
    "npy of tofile, uint16": ("p.npy", lambda path: IDS.astype(np.uint16).tofile(path)),
    "bin, uint16": ("p.bin", lambda path: IDS.astype(np.uint16).tofile(path)),
    "bin, capital letters": ("p.BIN", lambda path: IDS.astype(np.uint16).tofile(path)),
    "bin, not of whole uint32": ("p.bin", lambda path: np.append(IDS, 0).astype(np.uint16).tofile(path)),
    "llm.c, gpt-2": ("p.bin", lambda path: llm_c(path, "uint16")),
    "llm.c, llama-3": ("p.bin", lambda path: llm_c(path, "uint32")),
    "megatron, uint16": ("p.bin", lambda path: megatron(path, 8, "uint16")),
    "megatron, int32, the index": ("p.idx", lambda path: megatron(path, 4, "int32")),
    "megatron, int64": ("p.bin", lambda path: megatron(path, 5, "int64")),
    "megatron, uint8": ("p.bin", lambda path: megatron(path, 1, "uint8")),
    "megatron, apart": ("p.bin", lambda path: megatron(path, 8, "uint16", gap=100)),
    "safetensors": ("p.safetensors", lambda path: save_file({"input_ids": torch.from_numpy(IDS)}, path)),
    "safetensors, uint16": (
        "p.safetensors",
        lambda path: save_file({"input_ids": torch.from_numpy(IDS.astype(np.uint16))}, path),
    ),
    "safetensors, one row": ("p.safetensors", lambda path: save_file({"input_ids": torch.from_numpy(IDS)[None]}, path)),
    "safetensors, bf16 beside": ("p.safetensors", lambda path: beside(path, torch.bfloat16)),
    "safetensors, fp8 beside": ("p.safetensors", lambda path: beside(path, torch.float8_e4m3fn)),
    "safetensors, mask of ones": (
        "p.safetensors",
        lambda path: save_file({"input_ids": torch.from_numpy(IDS), "attention_mask": torch.ones(1600)}, path),
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_every_kind_of_file_gives_the_same_probe(tmp_path: Path, kind: str) -> None:
    """What holds the same ids gives the same probe, by its content."""
    name, write = SAME[kind]
    write(tmp_path / name)
    assert load(tmp_path / name).fingerprint == load(ids_file(tmp_path)).fingerprint


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("ending", [".bin", ".npy"])
def test_a_dtype_that_is_named_is_used(tmp_path: Path, dtype: str, ending: str) -> None:
    """Whatever the ids were written as, naming it reads them."""
    IDS.astype(dtype).tofile(tmp_path / f"p{ending}")
    assert load(tmp_path / f"p{ending}", dtype=dtype).fingerprint == load(ids_file(tmp_path)).fingerprint


@pytest.mark.parametrize("dtype", ["uint32", "int32", "int64"])
def test_two_widths_that_are_possible_are_refused(tmp_path: Path, dtype: str) -> None:
    """Small ids in a wide type are ids of the model in a narrower one too, half of them 0: nobody guesses, and the
    remedy works.
    """
    path = tmp_path / "p.bin"
    np.maximum(IDS, 1).astype(dtype).tofile(path)
    with pytest.raises(ProbeError, match=r"uint16 or of uint32.* are 0") as caught:
        load(path)
    named = caught.value.remedy.split("--dtype ")[1].split()[0]
    expected = load(ids_file(tmp_path, np.maximum(IDS, 1)))
    assert load(path, dtype=named).fingerprint == expected.fingerprint


def test_a_large_vocabulary_needs_no_dtype(tmp_path: Path) -> None:
    """Ids of a vocabulary of 100,000 are read as uint32, as those who write them do; uint16 is found out as well."""
    LARGE.astype(np.uint32).tofile(tmp_path / "wide.bin")
    (LARGE % 65_536).astype(np.uint16).tofile(tmp_path / "narrow.bin")
    wide, narrow = (load(tmp_path / name, vocabulary=100_000) for name in ("wide.bin", "narrow.bin"))
    assert wide.fingerprint == load(ids_file(tmp_path, LARGE), vocabulary=100_000).fingerprint
    assert narrow.fingerprint == load(ids_file(tmp_path, LARGE % 65_536), vocabulary=100_000).fingerprint


def test_zeros_here_and_there_are_no_second_width(tmp_path: Path) -> None:
    """A uint16 file of which half of the ids are 0, but not every second one, is read as it is."""
    ids = np.where(np.random.default_rng(0).random(1600) < 0.5, 0, IDS)
    ids.astype(np.uint16).tofile(tmp_path / "p.bin")
    assert load(tmp_path / "p.bin").fingerprint == load(ids_file(tmp_path, ids)).fingerprint


def test_a_large_file_is_looked_at_in_stretches(tmp_path: Path) -> None:
    """The width of a file of millions of ids is told as that of a small one."""
    ids = np.arange(5_000_000, dtype=np.uint16) % 19
    ids.tofile(tmp_path / "p.bin")
    assert load(tmp_path / "p.bin").fingerprint == load(ids_file(tmp_path, ids)).fingerprint


# ---------------------------------------------------------------- rows


def test_rows_keep_their_length(tmp_path: Path) -> None:
    """2-D ids that fit the model are sequences as they are, whatever sequence_length says."""
    assert load(ids_file(tmp_path, IDS.reshape(100, 16)), length=8).sequence_length == 16


@pytest.mark.parametrize(
    ("shape", "words"), [((50, 64), "64 tokens do not fit the model, whose context is 32"), ((40, 32), "too few")]
)
def test_the_remedy_for_rows_that_do_not_fit_works(tmp_path: Path, shape: tuple[int, int], words: str) -> None:
    """Rows that are too long for the model, or too few, are refused with a remedy: a sequence_length that cuts each
    of them.
    """
    ids = np.arange(shape[0] * shape[1]).reshape(shape) % 19
    path = ids_file(tmp_path, ids)
    with pytest.raises(ProbeError, match=words) as caught:
        load(path, length=None)
    assert "sequence_length" in caught.value.remedy
    assert load(path, length=16).fingerprint == load(ids_file(tmp_path, ids.reshape(-1, 16))).fingerprint


# ---------------------------------------------------------------- masks


def masked(path: Path, ids: Any, mask: Any) -> Path:
    save_file({"input_ids": torch.from_numpy(ids).contiguous(), "attention_mask": torch.from_numpy(mask)}, path)
    return path


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padding_is_not_seen(tmp_path: Path, side: str) -> None:
    """Rows that are padded by as much give the probe of the rows without padding, and the report says how many tokens
    are masked.
    """
    rows = IDS.reshape(100, 16)
    before, after = {"right": (0, 8), "left": (8, 0), "both": (3, 5)}[side]
    ids = np.pad(rows, ((0, 0), (before, after)), constant_values=-100)  # an id that no model has
    mask = np.pad(np.ones_like(rows), ((0, 0), (before, after)))
    probe = load(masked(tmp_path / "p.safetensors", ids, mask), length=None)
    assert probe.fingerprint == load(ids_file(tmp_path, rows)).fingerprint
    (left_out,) = probe.left_out
    assert left_out.what == "800 masked tokens of the probe"
    assert "neither fitted nor scored" in left_out.why


def test_texts_of_several_lengths_are_cut_each_by_itself(tmp_path: Path) -> None:
    """No sequence goes over the end of a text; what is too short, and what is left at the ends, is counted."""
    lengths = np.array([16, 20, 4] * 60)
    mask = (np.arange(24) < lengths[:, None]).astype(np.int64)
    ids = np.broadcast_to(np.arange(24), (180, 24)).copy()
    probe = load(masked(tmp_path / "p.safetensors", ids, mask), vocabulary=24)
    every = np.concatenate([probe.fit, probe.select, probe.confirm])
    assert len(every) == 120
    assert (every == np.arange(16)).all()  # each begins where its text does
    words = [one.what for one in probe.left_out]
    assert words == [
        "1,920 masked tokens of the probe",
        "60 of 180 texts of the probe, 240 tokens",
        "240 tokens at the ends of the probe's texts",
    ]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([16] * 100, 16), ([16] * 90 + [5] * 10, 16), ([30] * 100, 30), ([63] * 50, 31), ([12, 20] * 100, 12)],
)
def test_the_length_keeps_three_quarters(tmp_path: Path, lengths: list[int], expected: int) -> None:
    """Without a sequence_length the longest is taken that leaves three quarters of what is not masked in use."""
    mask = (np.arange(64) < np.array(lengths)[:, None]).astype(np.uint8)
    ids = np.zeros((len(lengths), 64), np.int64)
    assert load(masked(tmp_path / "p.safetensors", ids, mask), length=None).sequence_length == expected


def test_a_long_text_with_padding_is_a_stream(tmp_path: Path) -> None:
    """One row, padded at its end, is cut as it would be without its padding, not at the length of the context."""
    ids, mask = np.pad(IDS, (0, 400))[None], np.pad(np.ones(1600, np.int64), (0, 400))[None]
    probe = load(masked(tmp_path / "p.safetensors", ids, mask))
    assert probe.fingerprint == load(ids_file(tmp_path)).fingerprint
    assert [one.what for one in probe.left_out] == ["400 masked tokens of the probe"]


def test_a_mask_with_a_gap_separates_texts(tmp_path: Path) -> None:
    """No sequence goes over what is masked in the middle of a row."""
    ids = np.broadcast_to(np.arange(32), (80, 32)).copy()
    mask = np.ones((80, 32), np.int64)
    mask[:, 16] = 0
    probe = load(masked(tmp_path / "p.safetensors", ids, mask), length=15, vocabulary=32)
    every = np.concatenate([probe.fit, probe.select, probe.confirm])
    assert (np.diff(every, axis=1) == 1).all()
    assert set(every[:, 0].tolist()) == {0, 17}


def test_long_texts_are_cut_as_a_stream_is(tmp_path: Path) -> None:
    """Texts of several lengths, far longer than usual, are cut to the usual length, not to the model's context."""
    rows, lengths = np.zeros((30, 9000), np.int64), np.arange(8000, 8030)
    mask = (np.arange(9000) < lengths[:, None]).astype(np.int64)
    path = masked(tmp_path / "p.safetensors", rows, mask)
    usual = load_probe(path, ProbeSizes(), vocabulary=19, context=8192, tokenizer=None)
    assert usual.sequence_length == 1024


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_is_that_of_transformers_with_the_mask(tmp_path: Path, kind: str, side: str) -> None:
    """The loss is that of transformers with the mask, labels of -100 under it and for a text's first token, which
    nothing precedes, and positions that count what is not masked.
    """
    model = zoo.build(kind, steps=3)
    rng = np.random.default_rng(0)
    texts = zoo.token_ids(60, 7)
    before, after = (0, 6) if side == "right" else (6, 0)
    ids = np.pad(texts, ((0, 0), (before, after)), constant_values=5)
    mask = np.pad(np.ones_like(texts), ((0, 0), (before, after)))
    ids[mask == 0] = rng.integers(0, 19, int((mask == 0).sum()))  # whatever stands there
    probe = load(masked(tmp_path / "p.safetensors", ids, mask), length=None)
    rows = [int(np.flatnonzero((texts == row).all(axis=1))[0]) for row in probe.confirm]
    tokens, attended = torch.from_numpy(ids[rows]), torch.from_numpy(mask[rows])
    with torch.no_grad():
        ours = model(torch.from_numpy(probe.confirm), labels=torch.from_numpy(probe.confirm)).loss
        labels = tokens.masked_fill((attended == 0) | (attended.cumsum(1) == 1), -100)
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        theirs = model(tokens, attention_mask=attended, position_ids=positions, labels=labels).loss
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


# ---------------------------------------------------------------- what is refused


def cut_short(path: Path) -> None:
    llm_c(path, "uint16")
    path.write_bytes(path.read_bytes()[:-200])


def megatron_cut(path: Path, ending: str, left: int) -> None:
    megatron(path, 8, "uint16")
    file = path.with_suffix(ending)
    file.write_bytes(file.read_bytes()[:left])


def fairseq(path: Path) -> None:
    IDS.astype(np.uint16).tofile(path)
    path.with_suffix(".idx").write_bytes(b"TNTIDX\x00\x00" + bytes(64))


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, ids=IDS)


def mask_of(values: Any) -> Callable[[Path], object]:
    return lambda path: masked(path, IDS.reshape(100, 16), values)


UNUSABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "vocabulary": ("p.npy", lambda p: np.save(p, np.full(1600, 19)), "token id 19.*vocabulary is 19"),
    "negative": ("p.npy", lambda p: np.save(p, np.full(1600, -1)), "token id -1"),
    "few": (
        "p.npy",
        lambda p: np.save(p, np.zeros(16 * 43, dtype=int)),
        r"43 sequences of 16 tokens(.|\n)*44 sequences are needed: 704 tokens",
    ),
    "none": ("p.npy", lambda p: np.save(p, np.zeros(0, dtype=int)), r"0 sequences(.|\n)*704 tokens"),
    "empty": ("p.npy", lambda p: p.write_bytes(b""), r"is empty"),
    "empty bin": ("p.bin", lambda p: p.write_bytes(b""), r"is empty"),
    "cut short": ("p.npy", lambda p: (np.save(p, IDS), p.write_bytes(p.read_bytes()[:900])), "cannot be read as token"),
    "floats": ("p.npy", lambda p: np.save(p, np.zeros(1600)), "float64"),
    "objects": ("p.npy", lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), "cannot be read as"),
    "archive": ("p.npy", archive, "archive of several arrays"),
    "text in npy": ("p.npy", lambda p: p.write_text("some held out text " * 200), "holds text"),
    "text in bin": ("p.bin", lambda p: p.write_text("some held out text " * 200), "holds text"),
    "other ids": (
        "p.bin",
        lambda p: np.arange(1600, dtype=np.uint16).tofile(p),
        "no ids of this model, whose vocabulary is 19: as uint16 the largest id is 1599; as uint32",
    ),
    "odd": ("p.bin", lambda p: p.write_bytes(bytes(1601)), "1,601 bytes long, no whole number of ids"),
    "name": ("p.safetensors", lambda p: save_file({"tokens": torch.zeros(4)}, p), "no tensor `input_ids`.*tokens"),
    "torn": ("p.safetensors", lambda p: p.write_bytes(b"\x10\0\0\0"), "not a whole safetensors file"),
    "bf16 ids": (
        "p.safetensors",
        lambda p: save_file({"input_ids": torch.zeros(1600, dtype=torch.bfloat16)}, p),
        "`input_ids` as BF16",
    ),
    "mask's shape": ("p.safetensors", mask_of(np.ones(100, int)), r"shape \[100\] for `input_ids` of \[100, 16\]"),
    "mask's values": ("p.safetensors", mask_of(np.full((100, 16), 2)), "with the value 2"),
    "all masked": ("p.safetensors", mask_of(np.zeros((100, 16), int)), "no text of two tokens or more"),
    "llm.c cut": ("p.bin", cut_short, r"header of version 1 for 1,600 ids of uint16, and 3,000 bytes"),
    "megatron's ids cut": ("p.bin", lambda p: megatron_cut(p, ".bin", 3000), "reach to byte 3,200"),
    "megatron's index cut": ("p.bin", lambda p: megatron_cut(p, ".idx", 60), "16 sequences"),
    "megatron's head cut": ("p.bin", lambda p: megatron_cut(p, ".idx", 20), "cut short after 20 bytes"),
    "megatron's floats": ("p.bin", lambda p: megatron(p, 7, "float32"), "dtype code 7"),
    "megatron's ids gone": ("p.idx", lambda p: (megatron(p, 8, "uint16"), p.with_suffix(".bin").unlink()), "not there"),
    "fairseq": ("p.bin", fairseq, "an index of fairseq"),
    "ending": ("p.csv", lambda p: p.write_text("a b c"), "`.csv`"),
    "folder": ("p", lambda p: p.mkdir(), "a folder, and none that `datasets` saved"),
    "nothing": ("p.npy", lambda p: None, "no probe at"),
    "a named pipe": ("p.npy", os.mkfifo, "neither a file nor a folder"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_probe(tmp_path: Path, kind: str) -> None:
    """Each unusable probe is refused with the value that is wrong and what to do."""
    name, write, words = UNUSABLE[kind]
    write(tmp_path / name)
    with pytest.raises(ProbeError, match=words) as caught:
        load(tmp_path / name)
    assert caught.value.exit_code == 2
    assert caught.value.remedy


@pytest.mark.parametrize("write", [lambda p: llm_c(p, "uint32"), lambda p: megatron(p, 4, "int32")])
def test_a_dtype_that_the_file_contradicts(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """A file that says what it holds is not read as something else."""
    write(tmp_path / "p.bin")
    with pytest.raises(ProbeError, match="and not uint16"):
        load(tmp_path / "p.bin", dtype="uint16")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permission is said to be missing; nobody is told to write the file again."""
    path = ids_file(tmp_path)

    def denied(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np, "load", denied)
    with pytest.raises(ProbeError, match="may not be read") as caught:
        load(path)
    assert "chmod" in caught.value.remedy


def test_samples_beside_a_tensor_that_numpy_does_not_have(tmp_path: Path) -> None:
    """Samples of a fully connected network are read whatever else is in their file, and in bfloat16 too."""
    inputs, targets = torch.randn(200, 3), torch.randn(200, 2)
    save_file({"inputs": inputs, "targets": targets}, tmp_path / "plain.safetensors")
    other = torch.ones(3, dtype=torch.bfloat16)
    save_file({"inputs": inputs, "targets": targets, "other": other}, tmp_path / "beside.safetensors")
    halves = {"inputs": inputs.bfloat16(), "targets": targets.bfloat16()}
    save_file(halves, tmp_path / "halves.safetensors")
    plain, beside_one, half = (
        load_samples(tmp_path / f"{name}.safetensors", ProbeSizes()) for name in ("plain", "beside", "halves")
    )
    assert beside_one.fingerprint == plain.fingerprint
    assert torch.allclose(half.fit.X, plain.fit.X, rtol=1e-2)
