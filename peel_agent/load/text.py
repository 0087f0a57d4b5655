"""Text probes: documents read one by one and tokenised until there are enough tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.records import TokenIds

_PIECE_CHARACTERS = 1_000_000
"""A long text is tokenised in pieces of about so many characters, cut between lines."""


def tokenise(path: Path, tokenizer: Path | None, *, limit: int) -> TokenIds:
    """Token ids [T] of the documents in `path`, in order, at most about `limit`.

    `tokenizer` is a `tokenizer.json` of the tokenizers library. Raises ProbeError.
    """
    from tokenizers import Tokenizer

    if tokenizer is None or not tokenizer.is_file():
        raise ProbeError(
            f"{path.name} is text, and there is no tokenizer" + (f" at {tokenizer}" if tokenizer else ""),
            remedy="give --tokenizer a tokenizer.json, or a probe of token ids (.npy)",
        )
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises nothing narrower
        raise ProbeError(f"{tokenizer} cannot be read as a tokenizer: {error}", remedy="save it again") from error
    encoder.no_truncation()  # a tokenizer is saved with what its last user set
    encoder.no_padding()
    pieces: list[int] = []
    for document in _documents(path):
        pieces.extend(encoder.encode(document).ids)
        if len(pieces) >= limit:
            break
    if not pieces:
        raise ProbeError(f"{path} holds no text", remedy="give a file with held-out text of the training distribution")
    return np.asarray(pieces, dtype=np.int64)


def _documents(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        with path.open(encoding="utf-8", errors="replace") as file:
            while lines := "".join(file.readlines(_PIECE_CHARACTERS)):
                yield lines
    elif path.suffix == ".jsonl":
        yield from _json_lines(path)
    else:
        yield from _parquet(path)


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ProbeError(
                    f"{path} line {number} is no JSON object with a key `text`",
                    remedy='each line looks like {"text": "..."}',
                ) from error
            if text is not None:
                yield str(text)


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"], batch_size=256)
        for batch in batches:
            for value in batch.column("text"):
                if value.is_valid:
                    yield str(value)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise ProbeError(
            f"{path} is no parquet file with a column `text`: {error}", remedy="store the text in a column `text`"
        ) from error
