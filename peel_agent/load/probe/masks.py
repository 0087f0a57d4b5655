"""Masked token ids: only what the mask leaves is used.

The sweep knows no masks: it fits and scores every token that it gets. So the tokens that `attention_mask` leaves are
taken out of their rows before anything else. Each run of them is a piece of its own, which begins where its text
begins: neither padding before it nor after it is seen, fitted or scored, and its positions count from 0. For the same
tokens the loss is that of transformers with the mask, positions that count what is not masked, and `labels` of -100
where the mask is 0 and at the first token of each text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.load.probe.tokens import Ids, Tokens
from peel_agent.records import Skipped


def unmasked(ids: Ids, mask: np.ndarray[tuple[int, ...], np.dtype[np.generic]], path: Path) -> Tokens:
    """The ids [T] or [N, S] whose mask, of the same shape, is 1; ProbeError for any other mask."""
    if mask.shape != ids.shape or mask.ndim not in (1, 2):
        raise ProbeError(
            f"{path} has an `attention_mask` of shape {list(mask.shape)} for `input_ids` of {list(ids.shape)}",
            remedy="store a mask of the shape of `input_ids`, 0 for padding and 1 for text, or none",
        )
    others = np.setdiff1d(mask, [0, 1])
    if others.size:
        raise ProbeError(
            f"{path} has an `attention_mask` with the value {others[0]}",
            remedy="0 masks a token and 1 leaves it; several texts in a row are several rows",
        )
    kept = mask.astype(bool)
    if kept.all():
        return Tokens(ids)
    rows, kept_rows = np.atleast_2d(ids), np.atleast_2d(kept)
    edges = np.diff(np.pad(kept_rows, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    pieces = tuple(rows[row, start:end] for (row, start), (_, end) in zip(starts, ends, strict=True))
    why = "`attention_mask` is 0 for them: they are neither fitted nor scored, and no other token attends to them"
    left_out = (Skipped(f"{kept.size - int(kept.sum()):,} masked tokens of the probe", why),)
    if len(pieces) == 1:
        return Tokens(pieces[0], left_out)
    return Tokens(pieces, left_out, int(rows.shape[1]) if len(rows) > 1 else None)
