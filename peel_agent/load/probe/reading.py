"""Reads a probe: which kind of file it is, and the token ids in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.load.probe.cutting import cut
from peel_agent.load.probe.masks import unmasked
from peel_agent.load.probe.megatron_pair import index_of, read_pair
from peel_agent.load.probe.raw import read_raw
from peel_agent.load.probe.splitting import ProbeSizes, split
from peel_agent.load.probe.tables import Table, is_dataset
from peel_agent.load.probe.text import documents
from peel_agent.load.probe.tokenizing import tokenised
from peel_agent.load.probe.tokens import Ids, Tokens
from peel_agent.records import Probe

_KINDS = "a file of held-out token ids (.npy, .bin, .safetensors) or text (.txt, .jsonl, .parquet)"
_NUMPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"


def load_probe(
    path: Path,
    sizes: ProbeSizes,
    *,
    vocabulary: int,
    context: int,
    tokenizer: Path | None,
    dtype: str | None = None,
    text_key: str = "text",
) -> Probe:
    """The probe at `path` for a model of this vocabulary and context length. ProbeError names what is wrong.

    As `read_tokens` reads it, `cut` cuts it and `split` splits it.
    """
    limit = 4 * sizes.tokens(sizes.cut_length(context))
    tokens = read_tokens(path, vocabulary=vocabulary, tokenizer=tokenizer, dtype=dtype, text_key=text_key, limit=limit)
    sequences, used = cut(tokens, path, sizes, context)
    return split(sequences, used, path, sizes, vocabulary)


def read_tokens(
    path: Path,
    *,
    vocabulary: int | None,
    tokenizer: Path | None,
    dtype: str | None,
    text_key: str,
    limit: int,
) -> Tokens:
    """The token ids at `path`; of a text or a table at least `limit`, where it has so many.

    Token ids: .npy, with numpy's header or without; .bin of `dtype`, by default of the width that the content shows for
    this `vocabulary` (None: not known), with llm.c's header, or with Megatron's .idx beside it; .safetensors with
    `input_ids` and, perhaps, `attention_mask`; tables with a column `input_ids`. Text, tokenised with `tokenizer`:
    .txt, .jsonl (key `text_key`), and tables with that column. Tables are .parquet, .arrow, and folders that `datasets`
    saved. Raises ProbeError.
    """
    if not path.exists():
        raise ProbeError(f"no probe at {path}", remedy=f"check the path; it must be {_KINDS}")
    if path.is_dir() and not is_dataset(path):
        raise ProbeError(f"{path} is a folder, and none that `datasets` saved", remedy=f"give --probe {_KINDS}")
    if not (path.is_dir() or path.is_file()):  # a named pipe would hold the reader for ever
        raise ProbeError(f"{path} is neither a file nor a folder", remedy=f"give --probe {_KINDS}")
    suffix = path.suffix.lower()
    with _readable(path):
        if path.is_dir() or suffix in (".parquet", ".arrow"):
            table = Table(path)
            if table.holds_ids and text_key == "text":
                return table.tokens(limit)
            return _tokenised(table.documents(text_key), path, tokenizer, limit)
        if suffix in (".txt", ".jsonl"):
            return _tokenised(documents(path, text_key), path, tokenizer, limit)
        return _of_ids(path, suffix, vocabulary, dtype, limit)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says what kept the system from reading."""
    try:
        yield
    except PermissionError as error:
        raise ProbeError(f"{path} may not be read", remedy=f"let this user read it: chmod a+r {path}") from error
    except OSError as error:
        raise ProbeError(f"{path} cannot be read: {error}", remedy="look at the file system that it is on") from error


def _tokenised(texts: Iterable[str], path: Path, tokenizer: Path | None, limit: int) -> Tokens:
    return Tokens(tokenised(texts, path, tokenizer, limit))


def _of_ids(path: Path, suffix: str, vocabulary: int | None, dtype: str | None, limit: int) -> Tokens:
    if suffix == ".safetensors":
        return _of_safetensors(path)
    if suffix in (".bin", ".idx") and (index := index_of(path)) is not None:
        return Tokens(read_pair(index, dtype, limit))
    if suffix == ".npy":
        return Tokens(_of_numpy(path, vocabulary, dtype))
    if suffix == ".bin":
        return Tokens(read_raw(path, vocabulary, dtype))
    raise ProbeError(
        f"{path} has an ending that no probe has: `{path.suffix}`",
        remedy="use .npy, .safetensors or .bin for token ids, .txt, .jsonl or .parquet for text",
    )


def _of_numpy(path: Path, vocabulary: int | None, dtype: str | None) -> Ids:
    with path.open("rb") as file:
        head = file.read(len(_NUMPY))
    if head.startswith(_ZIP):
        raise ProbeError(f"{path} is an archive of several arrays", remedy="write one array with numpy.save")
    if head != _NUMPY:  # written with tofile
        return read_raw(path, vocabulary, dtype)
    try:
        ids: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ProbeError(
            f"{path} cannot be read as token ids: {error}", remedy="write it again with numpy.save"
        ) from error
    return _checked(ids, path)


def _checked(ids: Ids, path: Path) -> Ids:
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise ProbeError(
            f"{path} holds {ids.dtype} of {ids.ndim} dimensions", remedy="token ids are integers in 1 or 2 dimensions"
        )
    return ids


def _of_safetensors(path: Path) -> Tokens:
    """`input_ids` as `attention_mask` leaves them; no other tensor of the file is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if "input_ids" not in names:
                raise ProbeError(
                    f"{path} has no tensor `input_ids` (it has {', '.join(sorted(names)[:4]) or 'none'})",
                    remedy="store the token ids under the name `input_ids`",
                )
            ids = _checked(_tensor(file, "input_ids", path), path)
            mask = _tensor(file, "attention_mask", path) if "attention_mask" in names else None
    except SafetensorError as error:
        raise ProbeError(f"{path} is not a whole safetensors file: {error}", remedy="write it again") from error
    return Tokens(ids) if mask is None else unmasked(ids, mask, path)


def _tensor(file: Any, name: str, path: Path) -> Ids:
    try:
        tensor: Ids = file.get_tensor(name)
    except (TypeError, AttributeError) as error:  # a dtype that numpy does not have
        dtype = file.get_slice(name).get_dtype()
        raise ProbeError(f"{path} has `{name}` as {dtype}", remedy="store whole numbers: int64 or int32") from error
    return tensor
