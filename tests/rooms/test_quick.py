"""Effort quick is honest: enough tokens for its stand-ins at any length of sequences, nothing judged that was not
measured, and no margin that the standard effort would deny.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peel_agent.load import ProbeSizes, load_probe
from peel_agent.probing import QUICK_TOKENS_PER_COLUMN, quick_sizes
from tests.rooms.test_probe_text import write_tokenizer

IDS = np.random.default_rng(0).integers(0, 19, 120_000)

# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("row", [None, 2, 32, 64, 93, 128, 512, 1024])
@pytest.mark.parametrize("width", [16, 128, 768])
def test_a_fit_gets_whole_sequences_enough(width: int, row: int | None, tmp_path: Path) -> None:
    """1-D ids and rows of any length give the fit its tokens, rounded up to whole sequences, and confirm eight."""
    path = tmp_path / "probe.npy"
    np.save(path, IDS if row is None else IDS[: len(IDS) // row * row].reshape(-1, row))
    probe = load_probe(path, quick_sizes(ProbeSizes(), width), vocabulary=19, context=1024, tokenizer=None)
    needed = QUICK_TOKENS_PER_COLUMN * (width + 1)
    assert needed <= probe.fit.size < needed + probe.sequence_length
    assert len(probe.confirm) >= 8
    assert len(probe.select) >= 1
    assert probe.sequence_length == (row or 64)


@given(st.integers(1, 16_384), st.integers(2, 4096), st.integers(1, 100_000))
def test_sizes_for_any_width_and_length(width: int, length: int, limit: int) -> None:
    """Fit never has fewer tokens than its columns need, where the settings allow them, nor a whole sequence more."""
    sizes = quick_sizes(ProbeSizes(fit=limit), width)
    fit, select, confirm = (count * length for count in sizes.in_sequences(length))
    wanted = min(limit, QUICK_TOKENS_PER_COLUMN * (width + 1))
    assert wanted <= fit < wanted + length
    assert select >= length
    assert confirm >= 8 * length


def test_a_length_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    """`sequence_length` cuts 1-D ids for effort quick too, and a text is read as far as so long sequences need."""
    write_tokenizer(tmp_path)
    words = " ".join("abcdefghijklmnopqrs")
    path = tmp_path / "probe.jsonl"
    path.write_text((json.dumps({"text": words}) + "\n") * (len(IDS) // 19))
    sizes = quick_sizes(ProbeSizes(sequence_length=1024), 16)
    probe = load_probe(path, sizes, vocabulary=19, context=1024, tokenizer=tmp_path / "tokenizer.json")
    assert probe.sequence_length == 1024
    assert len(probe.confirm) == 8
