"""Two checkpoints on one probe, or two runs by their reports: measured, paired and put side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peel_agent import registry
from peel_agent.contrast import contrast
from peel_agent.errors import ConfigurationError, OtherArchitecture, TornCheckpoint, printable
from peel_agent.pipeline import check_unchanged, located, measure
from peel_agent.probing import probe_for_both, probe_path, tokenizer_of
from peel_agent.records import (
    CheckpointRef,
    Comparable,
    DifferenceReport,
    ModelSettings,
    Peeled,
    PeelSettings,
    Probe,
    ProbeInfo,
    ProbeSettings,
    Progress,
    Snapshot,
)
from peel_agent.watch import USUAL, Reserve

if TYPE_CHECKING:
    from peel_agent.load import ProbeSizes

QUANTITIES = ("margin", "headroom")
"""What two checkpoints are compared by, besides their losses and weights."""


def compare_checkpoints(
    a: str | Path,
    b: str | Path,
    *,
    probe: ProbeSettings,
    peeling: PeelSettings,
    model: ModelSettings | None = None,
    device: str = "cpu",
    clock: Callable[[], float],
    reserve: Reserve = USUAL,
    progress: Progress | None = None,
) -> DifferenceReport:
    """Both measured on the same tokens in this process, and paired by sequence; b - a.

    Raises OtherArchitecture for another vocabulary, CheckpointError for one that is not usable, ConfigurationError.
    """
    other = [name for name in peeling.computed if name not in QUANTITIES]
    if other:
        raise ConfigurationError(
            f"two checkpoints are not compared by {', '.join(other)}",
            remedy=f"give --quantities some of {', '.join(QUANTITIES)}; `peel-agent scan` tells the rest of each one",
        )
    with ExitStack() as places:
        refs = [places.enter_context(located(path, reserve=reserve)) for path in (a, b)]
        job = _Job(probe, peeling, model or ModelSettings(), device, clock, progress or _silence)
        return job.compare(*refs)


def _silence(_stage: str, _done: int, _total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class _Job:
    """One comparison: what both checkpoints are measured with."""

    probe: ProbeSettings
    peeling: PeelSettings
    model: ModelSettings
    device: str
    clock: Callable[[], float]
    progress: Progress

    def compare(self, a: CheckpointRef, b: CheckpointRef) -> DifferenceReport:
        from peel_agent.load import differing_weights
        from peel_agent.peel import paired_differences

        snapshot_a, snapshot_b = self._opened(a), self._opened(b)
        notes = check_vocabularies(snapshot_a, snapshot_b)
        tokens = probe_for_both(snapshot_a, snapshot_b, self.probe, quick=self.peeling.effort == "quick")
        first, second = self._measured(a, tokens, "A"), self._measured(b, tokens, "B")
        try:
            weights = differing_weights(snapshot_a, snapshot_b, partial(self.progress, "weights"))
        except OSError as error:
            raise _gone(error) from error
        for ref in (a, b):
            check_unchanged(ref, registry.formats(ref.format)[0])
        assert first.losses is not None
        assert second.losses is not None
        paired = paired_differences(first.losses, second.losses)
        return contrast(
            Comparable(a.label, first.report),
            Comparable(b.label, second.report),
            paired=paired,
            weights=weights,
            notes=notes,
        )

    def _opened(self, ref: CheckpointRef) -> Snapshot:
        from peel_agent.load import open_snapshot

        (form,) = registry.formats(ref.format)
        sets, factory = self.model.precision, self.model.factory
        try:
            return open_snapshot(ref.in_place(), form, registry.family, sets=sets, factory=factory)
        except FileNotFoundError as error:
            raise _gone(error) from error

    def _measured(self, ref: CheckpointRef, tokens: Probe, side: str) -> Peeled:
        return measure(
            ref,
            probe=self.probe,
            peeling=self.peeling,
            model=self.model,
            device=self.device,
            clock=self.clock,
            tokens=tokens,
            progress=lambda stage, done, total: self.progress(f"{side}: {stage}", done, total),
        )


def _gone(error: OSError) -> TornCheckpoint:
    return TornCheckpoint(
        f"{error.filename} cannot be read any more: {error.strerror}",
        remedy="compare checkpoints that nobody removes meanwhile",
    )


def check_vocabularies(a: Snapshot, b: Snapshot) -> list[str]:
    """What cannot be told of the two vocabularies, in sentences; OtherArchitecture when they differ."""
    from peel_agent.load import difference_of_vocabularies

    remedy = "losses per token of two vocabularies mean two things: compare checkpoints of one vocabulary"
    if a.vocabulary != b.vocabulary:
        raise OtherArchitecture(
            f"{b.ref.label} has a vocabulary of {b.vocabulary:,}, {a.ref.label} one of {a.vocabulary:,}", remedy=remedy
        )
    tokenizer_a, tokenizer_b = tokenizer_of(a), tokenizer_of(b)
    if tokenizer_a is None and tokenizer_b is None:
        return ["neither has a tokenizer.json: that a token id means the same in both is taken for granted"]
    if tokenizer_a is None or tokenizer_b is None:
        which = "A" if tokenizer_a is None else "B"
        return [f"{which} has no tokenizer.json: that a token id means the same in both is taken for granted"]
    try:
        words = difference_of_vocabularies(tokenizer_a, tokenizer_b)
    except ValueError as error:
        return [printable(f"the tokenizers could not be compared: {error}")]
    if words is not None:
        raise OtherArchitecture(f"{b.ref.label} has another vocabulary than {a.ref.label}: {words}", remedy=remedy)
    return []


def check_probe_of_runs(probe: ProbeSettings, measured: ProbeInfo) -> None:
    """Raises ConfigurationError unless the reports of a run were measured on this very probe."""
    from peel_agent.load import load_probe

    given = load_probe(
        probe_path(probe),
        _sizes_of(measured),
        vocabulary=2**31,
        context=2**31,
        tokenizer=probe.tokenizer,
        dtype=probe.dtype,
        text_key=probe.text_key,
    )
    if given.fingerprint != measured.fingerprint:
        raise ConfigurationError(
            f"the runs were measured on another probe than {probe.path}: theirs is {measured.fingerprint}, in "
            f"sequences of {measured.sequence_length}",
            remedy="leave --probe out to compare what their reports hold, or give the probe that they were watched on",
        )


def _sizes_of(measured: ProbeInfo) -> ProbeSizes:
    from peel_agent.load import ProbeSizes

    return ProbeSizes(measured.fit_tokens, measured.select_tokens, measured.confirm_tokens, measured.sequence_length)
