"""Two checkpoints paired by sequence: transformers' own forward pass in float64, and the bootstrap of plain numpy.

A block is skipped by a hook that hands its input on, so that nothing here knows how a model is run block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.oracles.decoder import Array
from tests.oracles.intervals import Interval, paired


def losses(folder: Path, ids: Any, *, without: int | None = None) -> Array:
    """Mean next-token cross-entropy of each sequence [N] for token ids [N, S], with one Llama block skipped."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad(), _skipped(model, without):
        logits = model(torch.from_numpy(ids)).logits.numpy()[:, :-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen: Array = np.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1)[..., 0]
    return -chosen.mean(axis=1)


@contextmanager
def _skipped(model: Any, index: int | None) -> Iterator[None]:
    if index is None:
        yield
        return
    hook = model.model.layers[index].register_forward_hook(lambda _module, given, _output: given[0])
    yield
    hook.remove()


def loss_difference(a: Path, b: Path, ids: Any) -> Interval:
    """loss(b) - loss(a)."""
    return paired(losses(b, ids) - losses(a, ids))


def skip_margin_difference(a: Path, b: Path, ids: Any, index: int) -> Interval:
    """What skipping the block costs in b, minus what it costs in a."""
    costs = [losses(folder, ids, without=index) - losses(folder, ids) for folder in (a, b)]
    return paired(costs[1] - costs[0])
