"""Token ids as bare numbers: nanoGPT's `.bin`, what numpy's `tofile` writes, and llm.c's files with their header."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.load.probe.tokens import Ids

LARGEST_VOCABULARY = 2**20
"""No id is as large as this, where the model's vocabulary is not known."""

WIDTHS = ("uint16", "uint32", "int64")
"""What is tried where nobody says. `int32` has the bytes of `uint32` for every id that a model can have."""

_STRETCHES, _STRETCH_IDS = 64, 65_536
"""A large file is looked at in so many stretches of so many ids."""

_LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""The first number of llm.c's header: its version and the ids' dtype, of gpt-2 and of llama-3."""
_LLM_C_NUMBERS = 256

_TEXT_BYTES = frozenset(string.printable.encode())


def read_raw(path: Path, vocabulary: int | None, dtype: str | None) -> Ids:
    """Ids [T] of a file without a header, or with llm.c's; memory-mapped.

    Without a `dtype` the width is the one that gives ids of the `vocabulary`. ProbeError when none does or several do.
    """
    size = path.stat().st_size
    if size == 0:
        raise ProbeError(f"{path} is empty", remedy="give a file with held-out tokens of the training distribution")
    headed = _after_header(path, size, dtype)
    if headed is not None:
        return headed
    if dtype is not None:
        return _mapped(path, size, dtype)
    _refuse_text(path)
    return _by_content(path, size, LARGEST_VOCABULARY if vocabulary is None else vocabulary)


def check_dtype(path: Path, stored: str, dtype: str | None, who: str) -> None:
    """Raises ProbeError when the user names another dtype than the one that the file itself states."""
    if dtype not in (None, stored):
        raise ProbeError(
            f"{path} holds {stored}, as {who} says, and not {dtype}", remedy="leave out --dtype and [probe] dtype"
        )


def _after_header(path: Path, size: int, dtype: str | None) -> Ids | None:
    """What follows llm.c's header; None where there is none."""
    header = np.fromfile(path, "<i4", _LLM_C_NUMBERS)
    if len(header) < _LLM_C_NUMBERS or int(header[0]) not in _LLM_C:
        return None
    version, stored = _LLM_C[int(header[0])]
    check_dtype(path, stored, dtype, "its header of llm.c")
    offset, count = 4 * _LLM_C_NUMBERS, int(header[2])
    if header[1] != version or size - offset != count * np.dtype(stored).itemsize:
        raise ProbeError(
            f"{path} has llm.c's header of version {header[1]} for {count:,} ids of {stored}, and {size - offset:,} "
            "bytes after it",
            remedy=f"write it again with llm.c's script (version {version}): it is cut short, or of another release",
        )
    ids: Ids = np.memmap(path, dtype=_little(stored), mode="r", offset=offset)
    return ids


def _mapped(path: Path, size: int, dtype: str) -> Ids:
    width = np.dtype(dtype).itemsize
    if size % width:
        raise ProbeError(
            f"{path} is {size:,} bytes long, no whole number of {dtype} ids",
            remedy="name the dtype that it was written with: --dtype, or [probe] dtype",
        )
    ids: Ids = np.memmap(path, dtype=_little(dtype), mode="r")
    return ids


def _little(dtype: str) -> np.dtype[np.integer]:
    return np.dtype(dtype).newbyteorder("<")


def _refuse_text(path: Path) -> None:
    """Letters read as uint16 are ids of a large vocabulary: such a file would be peeled as other text."""
    with path.open("rb") as file:
        head = file.read(4096)
    if _TEXT_BYTES.issuperset(head):
        raise ProbeError(
            f"{path} holds text, and its ending says token ids",
            remedy="name it .txt or .jsonl, and give a --tokenizer; for ids name their --dtype",
        )


def _by_content(path: Path, size: int, bound: int) -> Ids:
    """The ids in the one width that gives ids below `bound`."""
    readings = {name: _mapped(path, size, name) for name in WIDTHS if size % np.dtype(name).itemsize == 0}
    samples = {name: _sample(ids) for name, ids in readings.items()}
    fitting = [name for name, ids in samples.items() if ids.min() >= 0 and ids.max() < bound]
    # Whoever writes ids of a large vocabulary takes a type that holds them all.
    possible = [name for name in fitting if np.iinfo(name).max >= bound - 1] or fitting
    if len(possible) == 1:
        return readings[possible[0]]
    if possible:
        zeros = {name: float((samples[name] == 0).mean()) for name in possible}
        narrowest, likely = possible[0], possible[1] if len(possible) == 2 else possible[-1]
        raise ProbeError(
            f"{path} may hold ids of {' or of '.join(possible)}: each gives ids of the vocabulary, and as {narrowest} "
            f"{zeros[narrowest]:.0%} of them are 0",
            remedy=f"say which: --dtype {likely} is likely ([probe] dtype in peel.toml)",
        )
    if not readings:
        raise ProbeError(
            f"{path} is {size:,} bytes long, no whole number of ids of any type",
            remedy="write it again with numpy.save, or with ndarray.tofile",
        )
    seen = "; ".join(f"as {name} the largest id is {int(ids.max())}" for name, ids in samples.items())
    raise ProbeError(
        f"{path} holds no ids of this model, whose vocabulary is {bound:,}: {seen}",
        remedy="tokenise with the tokenizer of this very model, or name the --dtype that the file was written with",
    )


def _sample(ids: Ids) -> Ids:
    """The whole of a small file, stretches spread over a large one."""
    if len(ids) <= _STRETCHES * _STRETCH_IDS:
        return ids
    starts = np.linspace(0, len(ids) - _STRETCH_IDS, _STRETCHES).astype(np.int64)
    sample: Ids = np.concatenate([ids[start : start + _STRETCH_IDS] for start in starts])
    return sample
