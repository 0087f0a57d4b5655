"""Reads a probe: token ids or text, cut into sequences and split by sequence into fit, select and confirm."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.load.text import tokenise
from peel_agent.records import Probe, TokenIds

Ids: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.integer]]

SPLIT_SEED = 0
MIN_CONFIRM_SEQUENCES = 8
"""Fewer sequences than this give no usable bootstrap interval."""

_TEXT = {".txt", ".jsonl", ".parquet"}


@dataclass(frozen=True)
class ProbeSizes:
    """Most tokens in each part; a smaller probe is split in the same proportions (CONTRACT, Probe).

    1-D ids are cut into `sequence_length` tokens or, without it, into `usual_length`, or the context where that is
    shorter. Sequences of 2-D ids are as long as they are.
    """

    fit: int = 65_536
    select: int = 8_192
    confirm: int = 16_384
    sequence_length: int | None = None
    usual_length: int = 1024
    least_fit: int = 0
    """Tokens that a fit needs: however long the sequences are, `fit` takes enough of them to hold so many."""

    @property
    def total(self) -> int:
        return self.fit + self.select + self.confirm

    def cut_length(self, context: int) -> int:
        """Tokens of a sequence that 1-D ids are cut into, for a model of this context."""
        return self.sequence_length or min(context, self.usual_length)

    def in_sequences(self, length: int) -> tuple[int, int, int]:
        """The sizes in whole sequences of `length` tokens; an interval needs a least number of them in confirm."""
        return (
            max(1, self.fit // length, -(-self.least_fit // length)),
            max(1, self.select // length),
            max(MIN_CONFIRM_SEQUENCES, self.confirm // length),
        )


def load_probe(path: Path, sizes: ProbeSizes, *, vocabulary: int, context: int, tokenizer: Path | None) -> Probe:
    """The probe at `path` for a model of this vocabulary and context length.

    Token ids: .npy (1-D or 2-D integers), .safetensors (`input_ids`), .bin (uint16, or uint32 when the vocabulary
    needs it). Text: .txt, .jsonl (key `text`), .parquet (column `text`), tokenised with `tokenizer`. Raises ProbeError
    that names the value and the number needed.
    """
    if not path.is_file():
        raise ProbeError(
            f"no probe at {path}",
            remedy="give --probe a file of held-out token ids (.npy, .bin, .safetensors) or text (.txt, .jsonl)",
        )
    is_text = path.suffix in _TEXT
    length = sizes.cut_length(context)
    wanted = length * sum(sizes.in_sequences(length))
    ids: Ids = tokenise(path, tokenizer, limit=4 * wanted) if is_text else _read_ids(path, vocabulary)
    sequences = _cut(ids, sizes, context)
    return _split(sequences, path, sizes, vocabulary)


def _read_ids(path: Path, vocabulary: int) -> Ids:
    try:
        if path.suffix == ".npy":
            ids: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".bin":
            ids = np.memmap(path, dtype=np.uint32 if vocabulary > 65_536 else np.uint16, mode="r")
        elif path.suffix == ".safetensors":
            ids = _from_safetensors(path)
        else:
            raise ProbeError(
                f"{path} has an ending that no probe has: `{path.suffix}`",
                remedy="use .npy, .safetensors or .bin for token ids, .txt, .jsonl or .parquet for text",
            )
    except (ValueError, EOFError, OSError) as error:
        raise ProbeError(
            f"{path} cannot be read as token ids: {error}", remedy="write it again with numpy.save"
        ) from error
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise ProbeError(
            f"{path} holds {ids.dtype} of {ids.ndim} dimensions", remedy="token ids are integers in 1 or 2 dimensions"
        )
    return ids


def _from_safetensors(path: Path) -> Ids:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ProbeError(f"{path} is not a whole safetensors file: {error}", remedy="write it again") from error
    if "input_ids" not in tensors:
        raise ProbeError(
            f"{path} has no tensor `input_ids` (it has {', '.join(sorted(tensors)[:4]) or 'none'})",
            remedy="store the token ids under the name `input_ids`",
        )
    ids: Ids = tensors["input_ids"]
    return ids


def _cut(ids: Ids, sizes: ProbeSizes, context: int) -> Ids:
    """Sequences [N, S]: 2-D ids as they are, 1-D ids cut into windows."""
    length = int(ids.shape[1]) if ids.ndim == 2 else sizes.cut_length(context)
    if not 2 <= length <= context:
        raise ProbeError(
            f"sequences of {length} tokens do not fit the model, whose context is {context}",
            remedy=f"set sequence_length between 2 and {context}, or give ids cut that way",
        )
    if ids.ndim == 2:
        return ids
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def _split(sequences: Ids, path: Path, sizes: ProbeSizes, vocabulary: int) -> Probe:
    """Sequences drawn by a fixed seed, so that the parts are exchangeable and the same at every checkpoint."""
    available, length = sequences.shape
    fit, select, confirm = _counts(available, path, sizes, length)
    used = fit + select + confirm
    order = np.random.default_rng(SPLIT_SEED).permutation(available)[:used]
    chosen: TokenIds = np.ascontiguousarray(sequences[np.sort(order)], dtype=np.int64)[np.argsort(np.argsort(order))]
    _check_vocabulary(chosen, path, vocabulary)
    digest = hashlib.sha256(chosen.tobytes() + f"{length}/{select}/{confirm}".encode()).hexdigest()[:16]
    return Probe(
        confirm=chosen[:confirm],
        select=chosen[confirm : confirm + select],
        fit=chosen[confirm + select :],
        fingerprint=digest,
    )


def _counts(available: int, path: Path, sizes: ProbeSizes, length: int) -> tuple[int, int, int]:
    """Sequences in fit, select and confirm: the sizes in whole sequences, or their proportions of what there is."""
    fit, select, confirm = sizes.in_sequences(length)
    wanted = fit + select + confirm
    if available >= wanted:
        return fit, select, confirm
    least = -(-MIN_CONFIRM_SEQUENCES * wanted // confirm)
    if available < least:
        raise ProbeError(
            f"{path} has {available} sequences of {length} tokens, too few for an interval",
            remedy=f"at least {least} sequences are needed: {least * length:,} tokens, or a shorter sequence_length",
        )
    confirm = max(MIN_CONFIRM_SEQUENCES, available * confirm // wanted)
    select = max(1, available * select // wanted)
    return available - select - confirm, select, confirm


def _check_vocabulary(ids: TokenIds, path: Path, vocabulary: int) -> None:
    worst, least = int(ids.max()), int(ids.min())
    if worst >= vocabulary or least < 0:
        raise ProbeError(
            f"{path} has token id {worst if worst >= vocabulary else least}; the model's vocabulary is {vocabulary:,}",
            remedy=f"ids must be between 0 and {vocabulary - 1}: tokenise with the tokenizer of this very model",
        )
