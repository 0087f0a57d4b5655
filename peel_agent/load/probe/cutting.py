"""Token ids cut into sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.load.probe.splitting import ProbeSizes
from peel_agent.load.probe.tokens import Ids, Tokens
from peel_agent.records import Skipped

LEAST_KEPT = 0.75
"""Pieces of several lengths are cut at the greatest length that leaves this share of their tokens in use."""


def cut(tokens: Tokens, path: Path, sizes: ProbeSizes, context: int) -> tuple[Ids, Tokens]:
    """Sequences [N, S], and the tokens with what was left out of them. ProbeError for a length that does not fit.

    A stream is cut into windows of the sizes' `sequence_length`, by default as `ProbeSizes` says. Rows
    keep their length, unless it is beyond the context or there are too few of them to split: then a `sequence_length`
    cuts each of them; or the sizes shorten them. Pieces are cut each by itself, by default at the greatest length, of a
    row or of a sequence cut from a stream, that leaves three quarters of their tokens in use.
    """
    ids, length = tokens.ids, sizes.sequence_length
    if isinstance(ids, tuple):
        row = tokens.row_length
        longest = row if row is not None and row <= context else sizes.cut_length(context)
        return _of_pieces(tokens, ids, path, length=length, longest=longest, context=context)
    if (stream := tokens.stream) is not None:
        return _windows(stream, _fitting(sizes.cut_length(context), context)), tokens
    columns = int(ids.shape[1])
    if length is not None and length < columns and (columns > context or len(ids) < sizes.least(columns)):
        return _of_pieces(tokens, tuple(ids), path, length=length, longest=columns, context=context)
    _fitting(columns, context)
    return ids[:, : sizes.row_length(len(ids), columns)], tokens


def _fitting(length: int, context: int) -> int:
    if not 2 <= length <= context:
        raise ProbeError(
            f"sequences of {length} tokens do not fit the model, whose context is {context}",
            remedy=f"set sequence_length (--sequence-length) between 2 and {context}",
        )
    return length


def _windows(ids: Ids, length: int) -> Ids:
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def _of_pieces(
    tokens: Tokens, pieces: Sequence[Ids], path: Path, *, length: int | None, longest: int, context: int
) -> tuple[Ids, Tokens]:
    lengths = np.asarray([len(piece) for piece in pieces], dtype=np.int64)
    if not lengths.size or lengths.max() < 2:
        raise ProbeError(
            f"{path} has no text of two tokens or more, once what is masked is left out",
            remedy="give held-out text of the training distribution; in `attention_mask` 1 stands for text",
        )
    length = _fitting(_best_length(lengths, longest) if length is None else length, context)
    sequences = np.concatenate([np.empty((0, length), pieces[0].dtype), *(_windows(piece, length) for piece in pieces)])
    short, ends = lengths[lengths < length], lengths[lengths >= length] % length
    why = f"sequences have {length} tokens, and none goes over the end of a text; a smaller sequence_length uses more"
    left_out = [
        Skipped(
            f"{short.size:,} of {lengths.size:,} texts of the probe, {int(short.sum()):,} tokens", f"too short: {why}"
        )
        if short.size
        else None,
        Skipped(f"{int(ends.sum()):,} tokens at the ends of the probe's texts", why) if ends.any() else None,
    ]
    return sequences, Tokens(tokens.ids, (*tokens.left_out, *(one for one in left_out if one is not None)))


def _best_length(lengths: Ids, longest: int) -> int:
    """The greatest length at which whole sequences hold LEAST_KEPT of all tokens; 2 when none does."""
    several, counts = np.unique(lengths, return_counts=True)
    total = int((several * counts).sum())
    for length in range(min(longest, int(several[-1])), 2, -1):
        if int((several // length * length * counts).sum()) >= LEAST_KEPT * total:
            return length
    return 2
