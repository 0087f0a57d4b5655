"""One piece of the work on a checkpoint that another worker peels: what that one would compute itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peel_agent import registry
from peel_agent.pipeline import check_unchanged, reading
from peel_agent.probing import probe_for
from peel_agent.records import CheckpointRef, ModelSettings, PeelSettings, Piece, ProbeSettings, Progress


def measure_piece(
    ref: CheckpointRef,
    piece: Piece,
    *,
    probe: ProbeSettings,
    peeling: PeelSettings,
    model: ModelSettings,
    device: str,
    patch: Path | None = None,
    progress: Progress | None = None,
) -> Sequence[float]:
    """The losses of a piece of what `pipeline.measure` with the same arguments computes. Raises as that does."""
    from peel_agent.capture import open_trace
    from peel_agent.load import open_snapshot
    from peel_agent.peel import losses_of_piece
    from peel_agent.precision import float32_products

    (form,) = registry.formats(ref.format)
    with reading(ref):
        snapshot = open_snapshot(
            ref.in_place(), form, registry.family, sets=model.precision, patch=patch, factory=model.factory
        )
        trace = open_trace(snapshot, probe_for(snapshot, probe, quick=peeling.effort == "quick"), device=device)
        tell = progress or (lambda _stage, _done, _total: None)
        with float32_products(trace.device):
            losses = losses_of_piece(trace, piece, lambda: tell("a piece", 0, 1))
    check_unchanged(ref, form)
    return [float(loss) for loss in losses]
