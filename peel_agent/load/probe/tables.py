"""Probes in tables: parquet, arrow, and folders that `datasets` saved with `save_to_disk`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peel_agent.errors import ProbeError, printable
from peel_agent.load.probe.masks import unmasked
from peel_agent.load.probe.text import checked, string
from peel_agent.load.probe.tokens import Ids, Tokens
from peel_agent.records import Skipped

_BATCH_ROWS = 256
_IDS, _MASK = "input_ids", "attention_mask"
_SPLITS, _STATE = "dataset_dict.json", "state.json"
_AGAIN = "write it again"


def is_dataset(path: Path) -> bool:
    """Whether this is a folder as `datasets` saves one."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


class Table:
    """The rows of a parquet or arrow file, or of a folder of arrow files, in batches; ProbeError for a damaged one."""

    def __init__(self, path: Path) -> None:
        self.path = _split_of(path) if path.is_dir() else path
        self._files = _files_of(self.path) if self.path.is_dir() else [self.path]
        self.columns = self._columns()

    def _columns(self) -> tuple[str, ...]:
        for _, schema in self._opened(self._files[:1]):
            return tuple(schema.names)
        return ()

    def _opened(self, files: list[Path]) -> Iterator[tuple[Any, Any]]:
        """A reader of each file, and its schema."""
        import pyarrow

        for file in files:
            try:
                with file.open("rb") as stream:
                    reader = _reader(stream, file)
                    yield reader, getattr(reader, "schema_arrow", None) or reader.schema
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise ProbeError(f"{file} is no whole {file.suffix[1:]} file: {error}", remedy=_AGAIN) from error

    def rows(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """The values of these columns, row by row; ProbeError for one that is not there."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise ProbeError(
                f"{self.path} has no column `{missing[0]}` (it has {printable(', '.join(self.columns[:8])) or 'none'})",
                remedy="name the column of the text with --text-key, or [probe] text_key",
            )
        for reader, _ in self._opened(self._files):
            for batch in _batches(reader, names):
                yield from zip(*(batch.column(name) for name in names), strict=True)

    @property
    def holds_ids(self) -> bool:
        return _IDS in self.columns

    def documents(self, text_key: str) -> Iterator[str]:
        """The texts of one column; ProbeError names the row of what is none."""
        for number, (value,) in enumerate(self.rows(text_key), 1):
            text = value.as_py()
            if isinstance(text, bytes):
                text = _decoded(text, self.path, number)
            if text is not None:
                where = f"row {number}"
                yield checked(string(text, self.path, where, text_key), self.path, where)

    def tokens(self, limit: int) -> Tokens:
        """The ids of the column `input_ids` that `attention_mask`, if there is one, leaves; about `limit` of them."""
        names = (_IDS, _MASK) if _MASK in self.columns else (_IDS,)
        texts: list[Ids] = []
        rows: set[int] = set()
        masked = count = 0
        for number, values in enumerate(self.rows(*names), 1):
            if not values[0].is_valid:
                continue
            ids, *masks = (_numbers(value, self.path, number) for value in values)
            left = unmasked(ids, masks[0], self.path) if masks else Tokens(ids)
            rows.add(len(ids))
            pieces = left.ids if isinstance(left.ids, tuple) else (left.ids,)
            texts += pieces
            masked += len(ids) - sum(map(len, pieces))
            count += sum(map(len, pieces))
            if count >= limit:
                break
        why = "`attention_mask` is 0 for them: they are neither fitted nor scored, and no other token attends to them"
        left_out = (Skipped(f"{masked:,} masked tokens of the probe", why),) if masked else ()
        row_length = rows.pop() if len(rows) == 1 else None
        return Tokens(
            np.stack(texts) if len({len(text) for text in texts}) == 1 else tuple(texts), left_out, row_length
        )


def _reader(stream: Any, file: Path) -> Any:
    import pyarrow.ipc
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        return pyarrow.parquet.ParquetFile(stream)
    is_feather = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return pyarrow.ipc.open_file(stream) if is_feather else pyarrow.ipc.open_stream(stream)


def _batches(reader: Any, names: tuple[str, ...]) -> Iterator[Any]:
    if hasattr(reader, "iter_batches"):
        yield from reader.iter_batches(columns=list(names), batch_size=_BATCH_ROWS)
    elif hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from reader


def _split_of(folder: Path) -> Path:
    """The folder of the one split that a saved DatasetDict has; ProbeError names them when there are several."""
    if not (folder / _SPLITS).is_file():
        return folder
    splits = _json(folder / _SPLITS).get("splits")
    names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
    if len(names) == 1 and is_dataset(folder / names[0]) and Path(names[0]).name == names[0]:
        return folder / names[0]
    raise ProbeError(
        f"{folder} holds several splits: {printable(', '.join(names[:8])) or 'none that is named'}",
        remedy=f"name the held-out one: {folder}/{printable(names[-1]) if names else 'SPLIT'}",
    )


def _files_of(folder: Path) -> list[Path]:
    """The arrow files that the folder's state names, in their order."""
    state = _json(folder / _STATE)
    listed = state.get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if state.get("_indices_files"):
        raise ProbeError(
            f"{folder} was saved with a selection of its rows, by an old release of datasets",
            remedy="save it again: load_from_disk(...).flatten_indices().save_to_disk(...)",
        )
    files = [folder / name for name in names if isinstance(name, str) and Path(name).name == name]
    missing = [file for file in files if not file.is_file()]
    if not files or len(files) != len(names) or missing:
        what = f"{missing[0].name} is not there" if missing else "its state.json names no arrow files in it"
        raise ProbeError(f"{folder} is no whole data set: {what}", remedy="save it again with save_to_disk")
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        form = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{file} is no JSON", remedy="save the data set again with save_to_disk") from error
    return form if isinstance(form, dict) else {}


def _numbers(value: Any, path: Path, number: int) -> Ids:
    """The list of one row as whole numbers [T]."""
    numbers = np.asarray(value.as_py())
    if numbers.size == 0:
        numbers = numbers.astype(np.int64)
    if numbers.dtype == np.bool_:
        numbers = numbers.astype(np.int8)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ProbeError(
            f"{path} row {number} has no list of whole numbers under `{_IDS}` or `{_MASK}`",
            remedy="store the token ids of one text as one list of integers",
        )
    ids: Ids = numbers
    return ids


def _decoded(text: bytes, path: Path, number: int) -> str:
    try:
        return text.decode()
    except UnicodeError as error:
        raise ProbeError(
            f"{path} row {number} is not UTF-8: {error}", remedy="store the text as a column of strings"
        ) from error
