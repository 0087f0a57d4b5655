"""Probes of text: every file with the same text gives the same probe, and what is no text is refused by its line."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from peel_agent.errors import ProbeError
from peel_agent.load import ProbeSizes, load_probe
from peel_agent.load.probe.tokenizing import open_tokenizer
from peel_agent.records import Probe

WORDS = [chr(97 + index % 19) for index in range(1600)]
TEXTS = [" ".join(WORDS[start : start + 50]) for start in range(0, 1600, 50)]
IDS = np.arange(1600) % 19


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json that gives letter number n the id n."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(97 + index): index for index in range(19)}
    made = Tokenizer(models.WordLevel(letters | {"?": 18}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(path: Path, tokenizer: Path | None, *, length: int | None = 16, vocabulary: int = 19, **options: Any) -> Probe:
    sizes = ProbeSizes(sequence_length=length)
    return load_probe(path, sizes, vocabulary=vocabulary, context=32, tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the probe of these ids."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, IDS)
    return load(path, None).fingerprint


# ---------------------------------------------------------------- files with the same text


def jsonl(path: Path, *, key: str = "text", encoding: str = "utf-8", between: str = "\n") -> None:
    path.write_bytes(between.join(json.dumps({key: text}) for text in TEXTS).encode(encoding))


def table(columns: dict[str, Any] | None = None) -> Any:
    return pyarrow.table({"text": TEXTS} if columns is None else columns)


def dataset(folder: Path, parts: list[Any], **state: Any) -> None:
    """A folder as `datasets` saves one with save_to_disk: arrow streams, and state.json that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, part.schema) as writer:
            writer.write_table(part, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]} | state))
    (folder / "dataset_info.json").write_text("{}")


def datasets_of_one_split(folder: Path) -> None:
    dataset(folder / "validation", [table()])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["validation"]}))


def stream(path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table().schema) as writer:
        writer.write_table(table())


HALVES = [table({"text": TEXTS[:16]}), table({"text": TEXTS[16:]})]
STRINGS = {"large": pyarrow.large_string(), "view": pyarrow.string_view(), "binary": pyarrow.binary()}

SAME: dict[str, tuple[str, Callable[[Path], object]]] = {
    "txt": ("p.txt", lambda path: path.write_text("\n".join(TEXTS))),
    "txt, Windows lines": ("p.txt", lambda path: path.write_bytes("\r\n".join(TEXTS).encode())),
    "txt, one line": ("p.TXT", lambda path: path.write_text(" ".join(TEXTS))),
    "txt, UTF-8 with a mark": ("p.txt", lambda path: path.write_text("\n".join(TEXTS), encoding="utf-8-sig")),
    "jsonl": ("p.jsonl", jsonl),
    "jsonl, UTF-8 with a mark": ("p.jsonl", lambda path: jsonl(path, encoding="utf-8-sig")),
    "jsonl, empty lines": ("p.jsonl", lambda path: jsonl(path, between="\n\n")),
    "jsonl, a null": ("p.jsonl", lambda path: (jsonl(path), path.write_text('{"text": null}\n' + path.read_text()))),
    "parquet": ("p.parquet", lambda path: pyarrow.parquet.write_table(table(), path, row_group_size=7)),
    "parquet, other columns": (
        "p.parquet",
        lambda path: pyarrow.parquet.write_table(table({"n": [{"a": 1}] * 32, "text": TEXTS}), path),
    ),
    "parquet, dictionary": (
        "p.parquet",
        lambda path: pyarrow.parquet.write_table(table({"text": pyarrow.array(TEXTS).dictionary_encode()}), path),
    ),
    **{
        f"parquet, {name}": (
            "p.parquet",
            lambda path, kind=kind: pyarrow.parquet.write_table(table({"text": pyarrow.array(TEXTS, kind)}), path),
        )
        for name, kind in STRINGS.items()
    },
    "arrow, a stream": ("p.arrow", stream),
    "arrow, a file": ("p.arrow", lambda path: pyarrow.feather.write_feather(table(), str(path))),
    "data set": ("p", lambda path: dataset(path, HALVES)),
    "data set of one split": ("p", datasets_of_one_split),
    "data set of rows of ids": ("p", lambda path: dataset(path, [table({"input_ids": IDS.reshape(100, 16).tolist()})])),
    "data set of ids and text": (
        "p",
        lambda path: dataset(path, [table({"text": ["?"] * 100, "input_ids": IDS.reshape(100, 16).tolist()})]),
    ),
    "parquet of rows of ids": (
        "p.parquet",
        lambda path: pyarrow.parquet.write_table(
            table({"input_ids": pyarrow.array(IDS.reshape(100, 16).tolist(), pyarrow.list_(pyarrow.uint16()))}), path
        ),
    ),
    "data set of masked ids": (
        "p",
        lambda path: dataset(
            path,
            [
                table(
                    {
                        "input_ids": np.pad(IDS.reshape(100, 16), ((0, 0), (3, 0))).tolist(),
                        "attention_mask": [[0] * 3 + [1] * 16] * 100,
                    }
                )
            ],
        ),
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_every_file_with_the_same_text_gives_the_same_probe(
    tmp_path: Path, kind: str, tokenizer: Path, expected: str
) -> None:
    """Whatever file a text is in, and however it is encoded, the probe is the same."""
    name, write = SAME[kind]
    write(tmp_path / name)
    probe = load(tmp_path / name, tokenizer)
    assert probe.fingerprint == expected
    masked = [one.what for one in probe.left_out]
    assert masked == (["300 masked tokens of the probe"] if "masked" in kind else [])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.jsonl", lambda path: jsonl(path, key="content")),
        ("p.parquet", lambda path: pyarrow.parquet.write_table(table({"content": TEXTS}), path)),
        ("p", lambda path: dataset(path, [table({"content": TEXTS, "input_ids": [[1]] * 32})])),
    ],
)
def test_another_key(tmp_path: Path, name: str, write: Any, tokenizer: Path, expected: str) -> None:
    """The text may be under another key, or in another column."""
    write(tmp_path / name)
    assert load(tmp_path / name, tokenizer, text_key="content").fingerprint == expected


def test_texts_as_rows_of_several_lengths(tmp_path: Path) -> None:
    """A data set that was tokenised text by text gives sequences that go over no text's end."""
    rows = [list(range(19))[: 16 + index % 3] for index in range(120)]
    dataset(tmp_path / "p", [table({"input_ids": rows})])
    probe = load(tmp_path / "p", None, length=None)
    assert probe.sequence_length == 16
    assert (np.concatenate([probe.fit, probe.select, probe.confirm])[:, 0] == 0).all()


# ---------------------------------------------------------------- tokenizers


def test_what_a_tokenizer_was_last_set_to_does_not_matter(tmp_path: Path, tokenizer: Path) -> None:
    """Truncation and padding saved with a tokenizer would cut or dilute the probe: they are switched off."""
    from tokenizers import Tokenizer

    (tmp_path / "probe.txt").write_text("a b c d " * 400)
    plain = load(tmp_path / "probe.txt", tokenizer)
    changed = Tokenizer.from_file(str(tokenizer))
    changed.enable_truncation(8)
    changed.enable_padding(length=100_000)
    changed.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path / "probe.txt", tmp_path / "tokenizer.json").fingerprint == plain.fingerprint


PROSE = [
    f"The {noun} number {index} is {colour}."
    for index in range(40)
    for noun in ("house", "tree", "river")
    for colour in ("red", "blue")
]


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.model as sentencepiece trains one for Llama, and a config.json."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}))
    return folder


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise AssertionError(f"something connects to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.usefixtures("without_network")
@pytest.mark.parametrize("named", ["tokenizer.model", "", "tokenizer.json"])
@pytest.mark.parametrize(
    "settings", [None, {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": "x.y"}}]
)
def test_a_tokenizer_of_sentencepiece(
    tmp_path: Path, named: str, settings: dict[str, Any] | None, sentencepiece_folder: Path
) -> None:
    """A tokenizer.model, named, in a folder that is named, or beside the checkpoint, gives what sentencepiece gives,
    with transformers' settings beside it or without.
    """
    import sentencepiece

    folder = shutil.copytree(sentencepiece_folder, tmp_path / "model")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "p.txt").write_text("\n".join(PROSE))
    probe = load(tmp_path / "p.txt", folder / named, vocabulary=300)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    np.save(tmp_path / "ids.npy", pieces.encode("\n".join(PROSE)))
    assert probe.fingerprint == load(tmp_path / "ids.npy", None, vocabulary=300).fingerprint


def test_what_transformers_adds_is_added(tmp_path: Path, sentencepiece_folder: Path) -> None:
    """Where transformers' settings put a token before each text, the probe has it."""
    folder = shutil.copytree(sentencepiece_folder, tmp_path / "model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_tokenizer(folder, tmp_path)("The house")[0] == 1


def test_without_sentencepiece(tmp_path: Path, sentencepiece_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library is not installed, its extra is named."""
    (tmp_path / "p.txt").write_text("a b c d")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ProbeError, match="needs sentencepiece") as caught:
        load(tmp_path / "p.txt", sentencepiece_folder)
    assert "peel-agent[sentencepiece]" in caught.value.remedy


@pytest.mark.usefixtures("without_network")
def test_a_vocabulary_and_merges(tmp_path: Path) -> None:
    """GPT-2's vocab.json and merges.txt, as older checkpoints have them, are a tokenizer too."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(PROSE, vocab_size=300, show_progress=False)
    made.save_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "p.txt").write_text("\n".join(PROSE))
    np.save(tmp_path / "ids.npy", made.encode("\n".join(PROSE)).ids)
    expected = load(tmp_path / "ids.npy", None, vocabulary=300).fingerprint
    assert load(tmp_path / "p.txt", tmp_path / "tokenizer.json", vocabulary=300).fingerprint == expected


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot be read as a tokenizer"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"no model"), "cannot be read by sentencepiece"),
        (lambda folder: (folder / "vocab.json").write_text("{}"), "transformers makes no tokenizer of"),
        (lambda folder: None, r"p\.txt is text, and there is no tokenizer at"),
    ],
)
@pytest.mark.usefixtures("without_network")
def test_a_tokenizer_that_cannot_be_used(tmp_path: Path, spoil: Any, words: str) -> None:
    """A tokenizer that is damaged or not there is a probe error, with its path."""
    (tmp_path / "p.txt").write_text("a b c d")
    spoil(tmp_path)
    with pytest.raises(ProbeError, match=words):
        load(tmp_path / "p.txt", tmp_path / "tokenizer.json")


def test_a_text_that_the_tokenizer_cannot_encode(tmp_path: Path) -> None:
    """A tokenizer without a token for what it does not know is refused with the text, not with a traceback."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "p.txt").write_text("b")
    with pytest.raises(ProbeError, match=r"cannot encode a text of p\.txt"):
        load(tmp_path / "p.txt", tmp_path)


# ---------------------------------------------------------------- what is refused


def lines(*values: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text("".join(json.dumps({"text": value}) + "\n" for value in ("a", *values)))


def column(values: Any) -> Callable[[Path], object]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)


def two_splits(path: Path) -> None:
    path.mkdir()
    (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))


def outside(path: Path) -> None:
    dataset(path / "inner", [table()])
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "inner/data-00000-of-00001.arrow"}]}))


def one_file_gone(path: Path) -> None:
    dataset(path, HALVES)
    (path / "data-00001-of-00002.arrow").unlink()


UNUSABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "Latin 1": ("p.txt", lambda p: p.write_bytes("a b\nc é d".encode("latin-1")), "not UTF-8 in line 2.*0xe9"),
    "Latin 1 after a mark": ("p.txt", lambda p: p.write_bytes(b"\xef\xbb\xbfa \xe9 b"), "not UTF-8 in line 1"),
    "Latin 1 in jsonl": ("p.jsonl", lambda p: p.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}'), "not UTF-8 in line 2"),
    "UTF-16 without a mark": ("p.txt", lambda p: p.write_bytes("a b c".encode("utf-16-le")), "NUL characters"),
    "UTF-16": ("p.txt", lambda p: p.write_text("a b c", encoding="utf-16"), "is UTF-16, by its byte order mark"),
    "UTF-16 big endian": ("p.txt", lambda p: p.write_bytes(b"\xfe\xff\0a\0b"), "is UTF-16, by its byte order mark"),
    "UTF-32": ("p.txt", lambda p: p.write_text("a b c", encoding="utf-32"), "is UTF-32, by its byte order mark"),
    "UTF-16 in jsonl": ("p.jsonl", lambda p: jsonl(p, encoding="utf-16"), "is UTF-16, by its byte order mark"),
    "zeros": ("p.txt", lambda p: p.write_bytes(bytes(1000)), "NUL characters"),
    "half a pair": ("p.jsonl", lambda p: p.write_text('{"text": "\\ud800"}'), "line 1 holds half of a surrogate pair"),
    "a list": ("p.jsonl", lines(["a"]), "line 2 has a list under `text`"),
    "an object": ("p.jsonl", lines({"value": "a"}), "line 2 has an object under `text`"),
    "a number": ("p.jsonl", lines("b", 3), "line 3 has a number under `text`"),
    "true": ("p.jsonl", lines(True), "line 2 has true or false under `text`"),
    "key": ("p.jsonl", lambda p: p.write_text('{"txt": "a"}'), r"line 1 is no JSON object with a key `text` .*txt"),
    "an array": ("p.jsonl", lambda p: p.write_text('["a"]'), "line 1 is no JSON object with a key `text`"),
    "no JSON": ("p.jsonl", lambda p: p.write_text("{text: a}"), "line 1 is no JSON"),
    "nested": ("p.jsonl", lambda p: p.write_text("[" * 100_000), "line 1 is no JSON"),
    "no parquet": ("p.parquet", lambda p: p.write_text("no parquet"), "no whole parquet file"),
    "no arrow": ("p.arrow", lambda p: p.write_text("no arrow file"), "no whole arrow file"),
    "column": ("p.parquet", lambda p: pyarrow.parquet.write_table(table({"body": TEXTS}), p), "no column `text`.*body"),
    "column of lists": ("p.parquet", column([["a"], ["b"]]), "row 1 has a list under `text`"),
    "column of objects": ("p.parquet", column([{"a": "b"}]), "row 1 has an object under `text`"),
    "column of bytes": ("p.parquet", column([b"a", b"\xe9"]), "row 2 is not UTF-8"),
    "floats as ids": ("p", lambda p: dataset(p, [table({"input_ids": [[0.5]]})]), "row 1 has no list of whole numbers"),
    "ids as text": ("p", lambda p: dataset(p, [table({"input_ids": ["1 2 3"]})]), "row 1 has no list of whole numbers"),
    "two splits": ("p", two_splits, "several splits: train, validation"),
    "outside": ("p", outside, "names no arrow files in it|no whole data set"),
    "a file gone": ("p", one_file_gone, "data-00001-of-00002.arrow is not there"),
    "a selection": ("p", lambda p: dataset(p, [table()], _indices_files=[{"filename": "i.arrow"}]), "selection of its"),
    "no state": ("p", lambda p: (p.mkdir(), (p / "state.json").write_text("no JSON")), "state.json is no JSON"),
    "no text": ("p.txt", lambda p: p.write_text(""), "holds no text"),
    "no rows": (
        "p",
        lambda p: dataset(p, [table({"input_ids": pyarrow.array([], pyarrow.list_(pyarrow.int64()))})]),
        "no text of two",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_text_that_is_none(tmp_path: Path, kind: str, tokenizer: Path) -> None:
    """What is no text is refused by its line or row, with what to do."""
    name, write, words = UNUSABLE[kind]
    write(tmp_path / name)
    with pytest.raises(ProbeError, match=words) as caught:
        load(tmp_path / name, tokenizer)
    assert caught.value.remedy


def test_the_remedy_for_several_splits_works(tmp_path: Path, tokenizer: Path, expected: str) -> None:
    """The split that the refusal names can be given."""
    two_splits(tmp_path / "p")
    dataset(tmp_path / "p" / "validation", HALVES)
    with pytest.raises(ProbeError) as caught:
        load(tmp_path / "p", tokenizer)
    assert load(Path(caught.value.remedy.split(": ")[1]), tokenizer).fingerprint == expected


def test_a_model_beside_which_there_is_no_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    """No tokenizer of a folder above or beside is taken for one that is not there."""
    (tmp_path / "model").mkdir()
    shutil.copy(tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "p.txt").write_text("a b c")
    with pytest.raises(ProbeError, match="no tokenizer at"):
        load(tmp_path / "p.txt", tmp_path / "model" / "tokenizer.json")
