"""Margins and statuses of every block and of its two parts (method.md 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.oracles.intervals import paired
from tests.oracles.references import (
    PARTS,
    References,
    Streams,
    block_references,
    loss_after,
    part_references,
    stream_share,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.oracles.decoder import Array, Decoder, Ids
    from tests.oracles.intervals import Interval


def block_margins(decoder: Decoder, fit: Ids, select: Ids, confirm: Ids) -> list[dict[str, Any]]:
    """One dict per block, from token ids [N, S].

    `index`; `margin` (Interval), `best_reference`, `status`; `references` name -> loss - trained loss on confirm;
    `select_losses` name -> mean loss on select; `left_out`: names without enough fit tokens; `stream_share`;
    `parts` "attention" and "mlp" -> dict of the same keys without `index`, `stream_share`, `parts`.
    """
    streams = Streams(decoder.streams(fit), decoder.streams(select), decoder.streams(confirm))
    trained = decoder.nll(streams.confirm[-1], confirm)
    blocks = []
    for i in range(decoder.block_count):
        report = margin(decoder, i, block_references(decoder, i, streams), select, confirm, trained)
        report["index"] = i
        report["stream_share"] = stream_share(streams.confirm[i], streams.confirm[i + 1])
        report["parts"] = {}
        for part in PARTS:
            references = part_references(decoder, i, part, streams)
            report["parts"][part] = margin(decoder, i, references, select, confirm, trained)
        blocks.append(report)
    set_statuses(blocks)
    for part in PARTS:
        set_statuses([block["parts"][part] for block in blocks])
    return blocks


def margin(
    decoder: Decoder, i: int, references: References, select: Ids, confirm: Ids, trained: Array
) -> dict[str, Any]:
    """The winner by mean loss on select (the first of equals), measured on confirm against `trained` [N].

    Where confirm says that others are certainly better, the interval spans theirs too.
    """
    select_losses, differences = {}, {}
    for name, spliced in references.trusted.items():
        select_losses[name] = float(loss_after(decoder, i, spliced.select, select).mean())
        differences[name] = loss_after(decoder, i, spliced.confirm, confirm) - trained
    winner = min(select_losses, key=lambda name: select_losses[name])
    intervals = [paired(differences[winner])]
    intervals += [
        paired(difference) for difference in differences.values() if paired(difference - differences[winner]).high < 0.0
    ]
    low, high = min(interval.low for interval in intervals), max(interval.high for interval in intervals)
    return {
        "margin": intervals[0]._replace(low=low, high=high),
        "best_reference": winner,
        "references": {name: float(difference.mean()) for name, difference in differences.items()},
        "select_losses": select_losses,
        "left_out": references.left_out,
    }


def set_statuses(reports: Sequence[dict[str, Any]]) -> None:
    """Adds `status` to each report, judged against the margins of the others."""
    for i, report in enumerate(reports):
        others = [other["margin"].value for j, other in enumerate(reports) if j != i]
        report["status"] = status(report["margin"], others, bool(report["left_out"]))


def status(estimate: Interval, others: Sequence[float], left_out: bool) -> str:
    """`below`, `above` or `undecided` against max(0, a tenth of the median margin of the others)."""
    threshold = max(0.0, 0.1 * float(np.median(others))) if others else 0.0
    if estimate.high < threshold:
        return "below"
    if estimate.low > threshold and not left_out:
        return "above"
    return "undecided"
