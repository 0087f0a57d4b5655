"""The probe that the settings name, as large as a model and an effort need it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peel_agent.errors import ConfigurationError, ProbeError
from peel_agent.records import Probe, ProbeSettings, Snapshot

if TYPE_CHECKING:
    from peel_agent.load import ProbeSizes

QUICK_SEQUENCE_LENGTH = 64
"""Longer rows are shortened to it where there are enough of them: of so long sequences 10,000 tokens' worth of work are
enough for the margins of 124 M parameters.
"""
QUICK_FIT_TOKENS = 3072
QUICK_FIT_TOKENS_PER_COLUMN = 4
"""The larger of the two. An affine map of few tokens is worse than that of effort standard, as if the block earned more
than it does: the intervals allow for it (`fit_share`).
"""
QUICK_SELECT_SEQUENCES = 4
"""With fewer the worse of two stand-ins is picked too often, and the block seems to earn more than it does."""
QUICK_SELECT_TOKENS = 256
QUICK_CONFIRM_TOKENS = 1024


def probe_for(snapshot: Snapshot, settings: ProbeSettings, *, quick: bool = False) -> Probe:
    """The probe of the settings, for this model."""
    from peel_agent.load import load_probe

    sizes = probe_sizes(settings)
    if quick:
        sizes = quick_sizes(sizes, snapshot.width)
    return load_probe(
        probe_path(settings),
        sizes,
        vocabulary=snapshot.vocabulary,
        context=snapshot.context,
        tokenizer=settings.tokenizer or _folder(snapshot) / "tokenizer.json",
        dtype=settings.dtype,
        text_key=settings.text_key,
    )


def probe_for_both(a: Snapshot, b: Snapshot, settings: ProbeSettings, *, quick: bool = False) -> Probe:
    """One probe for two models of one vocabulary: as long as both contexts allow, as large as the wider one needs.

    A text is tokenised with the tokenizer beside the first, or beside the second where only that has one. Raises
    ProbeError for a text of which the two tokenizers make other tokens.
    """
    context, width = min(a.context, b.context), max(a.width, b.width)
    one, other = (replace(snapshot, context=context, width=width) for snapshot in (a, b))
    if settings.tokenizer is not None or tokenizer_of(b) is None:
        return probe_for(one, settings, quick=quick)
    if tokenizer_of(a) is None:
        return probe_for(other, settings, quick=quick)
    probe, check = probe_for(one, settings, quick=quick), probe_for(other, settings, quick=quick)
    if probe.fingerprint != check.fingerprint:
        raise ProbeError(
            f"the tokenizers of {a.ref.label} and {b.ref.label} make other tokens of {settings.path}",
            remedy="their losses per token cannot be compared; name one tokenizer with --tokenizer, if both learned it",
        )
    return probe


def tokenizer_of(snapshot: Snapshot) -> Path | None:
    """The tokenizer.json beside a checkpoint, if there is one."""
    file = _folder(snapshot) / "tokenizer.json"
    return file if file.is_file() else None


def _folder(snapshot: Snapshot) -> Path:
    return snapshot.ref.path if snapshot.ref.path.is_dir() else snapshot.ref.path.parent


def quick_sizes(sizes: ProbeSizes, width: int) -> ProbeSizes:
    """As few tokens as a model of this width allows, none more than `sizes`; of long rows the first tokens."""
    fit = min(sizes.fit, max(QUICK_FIT_TOKENS, QUICK_FIT_TOKENS_PER_COLUMN * (width + 1)))
    return replace(
        sizes,
        fit=fit,
        least_fit=fit,
        select=min(sizes.select, QUICK_SELECT_TOKENS),
        confirm=min(sizes.confirm, QUICK_CONFIRM_TOKENS),
        least_select=QUICK_SELECT_SEQUENCES,
        usual_length=QUICK_SEQUENCE_LENGTH,
        shorten_rows=True,
    )


def probe_path(settings: ProbeSettings) -> Path:
    """The file of the settings; ConfigurationError when they name none."""
    if settings.path is None:
        raise ConfigurationError(
            "no probe is named", remedy="give --probe FILE, or [probe] path, with held-out tokens of the training data"
        )
    return settings.path


def probe_sizes(settings: ProbeSettings) -> ProbeSizes:
    """How many tokens of each part the settings ask for."""
    from peel_agent.load import ProbeSizes

    return ProbeSizes(settings.fit_tokens, settings.select_tokens, settings.confirm_tokens, settings.sequence_length)
