"""Counts work in plain forward passes over the whole probe, by multiplications: a budget of them needs no clock.

A plain forward pass is the trained model run once over every token of the probe.
"""

from __future__ import annotations

from collections.abc import Mapping

from peel_agent.records import Block, Trace

ROUNDING = 1e-9
"""What sums in another order may differ by."""

USUAL_TOKENS = 90_112
"""What the usual probe holds. A budget is of passes over so many tokens where the probe is smaller: most of a small one
is scored, and left open would be what takes little time.
"""


class Meter:
    """What was spent on each stage, and a `budget`, None for no limit. Both in plain forward passes.

    A token is multiplied by each matrix of a block (in a mixture of experts, by those of every expert), and in
    attention by the keys and values of the tokens before it: on average half of the sequence, `width` numbers of each.
    The head is one matrix more.
    """

    def __init__(self, trace: Trace, block: Block, budget: float | None = None) -> None:
        probe = trace.probe
        self._stages: dict[str, float] = {}
        self.depth = len(trace.block_names)
        self._width = trace.width
        self._matrices = sum(weight.numel() for weight in block.parameters.values() if weight.dim() > 1)
        self._head = trace.head.weight.numel()
        tokens = probe.fit.size + probe.select.size + probe.confirm.size
        per_token = self.depth * (self._matrices + self._width * probe.sequence_length) + self._head
        self._per_pass = float(tokens * per_token)
        self._budget = None if budget is None else budget * max(1.0, USUAL_TOKENS / tokens)
        self._refusal = f"the budget of {budget or 0:g} forward passes does not suffice ([peel] budget_passes)"

    def spend(self, passes: float, stage: str) -> None:
        self._stages[stage] = self._stages.get(stage, 0.0) + passes

    @property
    def spent(self) -> float:
        return sum(self._stages.values())

    @property
    def by_stage(self) -> Mapping[str, float]:
        return dict(self._stages)

    def affords(self, passes: float, share: float = 1.0) -> bool:
        """Whether so much is left of a share of the budget."""
        return self._budget is None or self.spent + passes <= share * self._budget * (1.0 + ROUNDING)

    def refusal(self) -> str:
        """Why work that is not afforded is left out."""
        return self._refusal

    def limit(self, budget: float, why: str) -> None:
        """Lowers the budget, if it is higher; `why` is then why work is left out."""
        if self._budget is None or budget < self._budget:
            self._budget, self._refusal = budget, why

    def blocks(self, tokens: int, length: int, count: float = 1) -> float:
        """So many tokens, in sequences of a length, through so many blocks."""
        return tokens * count * (self._matrices + self._width * length) / self._per_pass

    def head(self, tokens: int) -> float:
        """So many tokens scored by the head."""
        return tokens * self._head / self._per_pass

    def tail(self, block: int, tokens: int, length: int, stand_in: float = 1.0) -> float:
        """So many tokens through a stand-in for this block (worth `stand_in` blocks), the later ones and the head."""
        return self.blocks(tokens, length, self.depth - block - 1 + stand_in) + self.head(tokens)

    @property
    def affine(self) -> float:
        """What an affine map of the stream costs, as a share of a block; `skip` for a whole block costs less."""
        return self._width * (self._width + 1) / self._matrices

    def products(self, rows: float, inputs: float, outputs: float) -> float:
        """Rows of `inputs` features times a matrix of `outputs` columns; a Gram matrix is summed of such products."""
        return rows * inputs * outputs / self._per_pass
