"""Text probes: documents read one by one and tokenised until there are enough tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.records import TokenIds

_TXT_BYTES = 64_000_000


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
    encoder = Tokenizer.from_file(str(tokenizer))
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
            yield file.read(_TXT_BYTES)
    elif path.suffix == ".jsonl":
        yield from _json_lines(path)
    else:
        yield from _parquet(path)


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield str(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ProbeError(
                    f"{path} line {number} is no JSON object with a key `text`",
                    remedy='each line looks like {"text": "..."}',
                ) from error


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"], batch_size=256)
        for batch in batches:
            for value in batch.column("text"):
                yield str(value)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise ProbeError(
            f"{path} is no parquet file with a column `text`: {error}", remedy="store the text in a column `text`"
        ) from error
