"""Sequences split into fit, select and confirm, by sequence."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.load.probe.tokens import Ids, Tokens
from peel_agent.records import Probe, TokenIds

SPLIT_SEED = 0
MIN_CONFIRM_SEQUENCES = 8
"""Fewer sequences than this give no usable bootstrap interval."""

LEAST_SEQUENCES = 44
"""With the default sizes so many are needed, to have enough in confirm: with others never more."""


@dataclass(frozen=True)
class ProbeSizes:
    """Most tokens in each part; a smaller probe is split in the same proportions (CONTRACT, Probe).

    A stream is cut into `sequence_length` tokens or, without it, into `usual_length`, or the context where that is
    shorter. Rows are as long as they are.
    """

    fit: int = 65_536
    select: int = 8_192
    confirm: int = 16_384
    sequence_length: int | None = None
    usual_length: int = 1024
    least_fit: int = 0
    """Tokens that a fit needs: however long the sequences are, `fit` takes enough of them to hold so many."""
    least_select: int = 1
    """Sequences in select, however long they are."""
    shorten_rows: bool = False
    """Whether rows longer than `usual_length` are cut to their first tokens, if no `sequence_length` is asked for."""

    @property
    def total(self) -> int:
        return self.fit + self.select + self.confirm

    def cut_length(self, context: int) -> int:
        """Tokens of a sequence that a stream is cut into, for a model of this context."""
        return min(context, self.usual_length) if self.sequence_length is None else self.sequence_length

    def row_length(self, rows: int, columns: int) -> int:
        """How many tokens of so many rows, `columns` long each, are used: all, or as few as give every part its own."""
        if not self.shorten_rows or self.sequence_length is not None:
            return columns
        lengths = range(self.usual_length, columns, self.usual_length)
        return next((length for length in lengths if sum(self.in_sequences(length)) <= rows), columns)

    def in_sequences(self, length: int) -> tuple[int, int, int]:
        """The sizes in whole sequences of `length` tokens; an interval needs a least number of them in confirm."""
        return (
            max(1, self.fit // length, -(-self.least_fit // length)),
            max(self.least_select, self.select // length),
            max(MIN_CONFIRM_SEQUENCES, self.confirm // length),
        )

    def tokens(self, length: int) -> int:
        """Tokens in all parts, in whole sequences of `length` tokens; none for a length that cannot be."""
        return length * sum(self.in_sequences(length)) if length > 0 else 0

    def least(self, length: int) -> int:
        """The fewest sequences of `length` tokens that can be split in these proportions, or nearly."""
        fit, select, confirm = self.in_sequences(length)
        return min(LEAST_SEQUENCES, -(-MIN_CONFIRM_SEQUENCES * (fit + select + confirm) // confirm))


def split(sequences: Ids, tokens: Tokens, path: Path, sizes: ProbeSizes, vocabulary: int) -> Probe:
    """A probe of sequences [N, S], drawn by a fixed seed: the parts are exchangeable and the same at every checkpoint.

    `tokens` say what was left out of them. ProbeError when there are too few, or an id that the vocabulary has not.
    """
    available, length = sequences.shape
    fit, select, confirm = _counts(available, path, sizes, length)
    used = fit + select + confirm
    order = np.random.default_rng(SPLIT_SEED).permutation(available)[:used]
    chosen: TokenIds = np.ascontiguousarray(sequences[np.sort(order)], dtype=np.int64)[np.argsort(np.argsort(order))]
    check_vocabulary(chosen, path, vocabulary)
    digest = hashlib.sha256(chosen.tobytes() + f"{length}/{select}/{confirm}".encode()).hexdigest()[:16]
    return Probe(
        confirm=chosen[:confirm],
        select=chosen[confirm : confirm + select],
        fit=chosen[confirm + select :],
        fingerprint=digest,
        left_out=tokens.left_out,
    )


def _counts(available: int, path: Path, sizes: ProbeSizes, length: int) -> tuple[int, int, int]:
    """Sequences in fit, select and confirm: the sizes in whole sequences, or their proportions of what there is."""
    fit, select, confirm = sizes.in_sequences(length)
    wanted = fit + select + confirm
    if available >= wanted:
        return fit, select, confirm
    least = sizes.least(length)
    if available < least:
        raise ProbeError(
            f"{path} has {available} sequences of {length} tokens, too few for an interval",
            remedy=f"at least {least} sequences are needed: {least * length:,} tokens, or a shorter sequence_length",
        )
    confirm = max(MIN_CONFIRM_SEQUENCES, available * confirm // wanted)
    select = max(1, available * select // wanted)
    return available - select - confirm, select, confirm


def check_vocabulary(ids: Ids, path: Path, vocabulary: int) -> None:
    """Raises ProbeError for an id that the vocabulary has not."""
    worst, least = int(ids.max()), int(ids.min())
    if worst >= vocabulary or least < 0:
        raise ProbeError(
            f"{path} has token id {worst if worst >= vocabulary else least}; the model's vocabulary is {vocabulary:,}",
            remedy=f"ids must be between 0 and {vocabulary - 1}: tokenise with the tokenizer of this very model",
        )
