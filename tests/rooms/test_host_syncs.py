"""What is done for each chunk of tokens asks the device for no number: a GPU is never waited for in between.

On the meta device a tensor has a shape and no values, so that whatever would read a value fails.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peel_agent.peel.numerics.least_squares import Gram
from peel_agent.peel.numerics.losses import position_losses
from peel_agent.records import Projection

WIDTH, TOKENS, VOCABULARY = 6, 3000, 11


def gram(device: torch.device) -> Gram:
    """The normal equations of some rows, and of some more that another one saw."""
    one, other = (Gram(WIDTH, 2, intercept=True, device=device) for _ in range(2))
    for sums in (one, other):
        sums.update(torch.ones(2, TOKENS // 2, WIDTH, device=device), torch.ones(2, TOKENS // 2, 2, device=device))
    one.merge(other)
    return one


def losses(device: torch.device) -> torch.Tensor:
    """The head's losses."""
    head = Projection(torch.ones(WIDTH, VOCABULARY, device=device), torch.ones(VOCABULARY, device=device), 3.0)
    targets = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    return position_losses(torch.ones(TOKENS, WIDTH, device=device), targets, head)


WORK: tuple[Callable[[torch.device], object], ...] = (gram, losses)


@pytest.mark.parametrize("work", WORK)
def test_no_value_is_read(work: Callable[[torch.device], object]) -> None:
    """Runs where there is no value to be read."""
    work(torch.device("meta"))


def test_a_value_that_is_read_is_seen() -> None:
    """The measure itself: a condition of a ridge's solution is such a number."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        gram(torch.device("meta")).solve()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("work", WORK)
def test_a_gpu_is_not_waited_for(work: Callable[[torch.device], object]) -> None:
    """CUDA itself sees no synchronisation."""
    device = torch.device("cuda:0")
    work(device)  # libraries are set up, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        work(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
