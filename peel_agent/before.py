"""The checkpoint before, opened beside the one that is peeled; and a report without it when it turns out unusable."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peel_agent import registry
from peel_agent.errors import CheckpointError, NotEarlier, TornCheckpoint
from peel_agent.records import (
    Before,
    CheckpointRef,
    LayerReport,
    LocalListing,
    ModelSettings,
    Past,
    PeelReport,
    Skipped,
)
from peel_agent.watch import fingerprint

if TYPE_CHECKING:
    from peel_agent.capture.trace import BlockwiseTrace
    from peel_agent.peel import Comparison

WHAT = "change and progress"


@dataclass(frozen=True)
class Opened:
    """A comparison for the peel room (None: nothing to compare with) and what is said of it."""

    comparison: Comparison | None
    skipped: tuple[Skipped, ...] = ()


def open_before(
    before: Before | None, trace: BlockwiseTrace, *, model: ModelSettings, keep_sketches: bool, required: bool
) -> Opened:
    """The weights of the checkpoint before, or their sketches where its files are gone.

    What cannot be compared is said, or raised as CheckpointError when the comparison is `required`.
    """
    from peel_agent.peel import Comparison

    if before is None and not keep_sketches:
        return Opened(None)
    before = before or Before()
    past: Past | None = None
    why_not = before.why_not
    if before.ref is not None:
        try:
            past = open_past(before.ref, before.step, trace, model)
        except CheckpointError as error:
            if required:
                raise
            why_not = error.what
    elif before.sketches is not None:
        why_not = "the files of the checkpoint before are gone"
    skipped: tuple[Skipped, ...] = ()
    if past is None and before.sketches is not None:
        skipped = (Skipped("progress", f"{why_not}; change is estimated from sketches of its weights"),)
    elif past is None and why_not is not None:
        skipped = (Skipped(WHAT, why_not),)
    dtype = str(trace.stored_dtype).removeprefix("torch.")
    if past is not None and past.rounding is not None:
        why = f"the two checkpoints differ in dtype: both are compared as {str(past.rounding).removeprefix('torch.')}"
        skipped = (*skipped, Skipped("changes smaller than a rounding", why))
    comparison = Comparison(past, before.sketches, dtype=dtype, keep=keep_sketches)
    return Opened(comparison, skipped)


def open_past(ref: CheckpointRef, step: int | None, trace: BlockwiseTrace, model: ModelSettings) -> Past:
    """The weights of another checkpoint of the same model, block by block. Raises CheckpointError."""
    from peel_agent.capture import PastBlocks
    from peel_agent.load import open_snapshot

    (form,) = registry.formats(ref.format)
    gone = TornCheckpoint(f"{ref.label} is gone or was overwritten", remedy="give an earlier checkpoint that is there")
    if not _is_there(ref):
        raise gone
    try:
        snapshot = open_snapshot(ref.in_place(), form, registry.family, sets=model.precision, factory=model.factory)
    except OSError as error:
        raise gone from error
    return PastBlocks(snapshot, step, trace)


def check_earlier(since: CheckpointRef, ref: CheckpointRef, flag: str = "--since") -> None:
    """Raises NotEarlier when `since`, given by this flag, is the checkpoint itself, or of a later step."""
    if since.fingerprint == ref.fingerprint:
        raise NotEarlier(
            f"{flag} {since.label} is the checkpoint itself",
            remedy="give an earlier checkpoint of the same run",
        )
    if since.step is not None and ref.step is not None and since.step >= ref.step:
        raise NotEarlier(
            f"{flag} {since.label} is of step {since.step}, which is not before step {ref.step} of {ref.label}",
            remedy="give an earlier checkpoint of the same run, or change the two places",
        )


def still_whole(ref: CheckpointRef) -> bool:
    """Whether the checkpoint before is what it was; one that is gone was held open, so that it was read whole."""
    return not ref.in_place().path.exists() or _is_there(ref)


def _is_there(ref: CheckpointRef) -> bool:
    """Whether the very files are at hand: one rewritten in place, or a link to it, holds other weights now."""
    (form,) = registry.formats(ref.format)
    now = form.inspect(LocalListing(ref.in_place().path))
    return now.state == "complete" and fingerprint(now.files) == ref.fingerprint


def without_comparison(report: PeelReport, why: str) -> PeelReport:
    """The report without change and progress, which is said."""

    def bare(layer: LayerReport) -> LayerReport:
        parts = {name: dataclasses.replace(part, change=None, progress=None) for name, part in layer.parts.items()}
        return dataclasses.replace(layer, parts=parts, change=None, progress=None)

    return dataclasses.replace(
        report,
        layers=tuple(map(bare, report.layers)),
        since_step=None,
        skipped=(*report.skipped, Skipped(WHAT, why)),
    )
