"""What the model loses when one refitted block stands in for a run of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.oracles.references import loss_after, refit

if TYPE_CHECKING:
    from tests.oracles.decoder import Array, Decoder, Ids


def redundancy(decoder: Decoder, fit: Ids, select: Ids, confirm: Ids) -> Array:
    """matrix[l, j], l < j: mean loss on confirm with block l refitted in place of blocks l..j, minus the trained one.

    Zero on the diagonal and below it.
    """
    h_fit, h_select, h_confirm = (decoder.streams(ids) for ids in (fit, select, confirm))
    trained = decoder.nll(h_confirm[-1], confirm)
    matrix = np.zeros((decoder.block_count, decoder.block_count))
    for first in range(decoder.block_count):
        for last in range(first + 1, decoder.block_count):
            attention, mlp = refit(decoder, first, h_fit[first], h_fit[last + 1], h_select[first], h_select[last + 1])
            stream = decoder.block(first, h_confirm[first], attention=attention, mlp=mlp)
            matrix[first, last] = loss_after(decoder, last, stream, confirm).mean() - trained.mean()
    return matrix
