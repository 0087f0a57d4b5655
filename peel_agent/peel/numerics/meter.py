"""Counts work in plain forward passes over the whole probe, by multiplications: a budget of them needs no clock."""

from __future__ import annotations

from peel_agent.records import Block, Trace

ROUNDING = 1e-9
"""What sums in another order may differ by."""


class Meter:
    """What was `spent`, and what is left of the `budget`, None for no limit. Both in plain forward passes.

    A block multiplies every token by each of its matrices (of a mixture: by those of every expert), and attention by
    the keys and values of the tokens before it: half of a sequence, twice `width`. The head is one matrix more.
    """

    def __init__(self, trace: Trace, block: Block, budget: float | None = None) -> None:
        probe = trace.probe
        self.budget = budget
        self.spent = 0.0
        self.depth = len(trace.block_names)
        self._width = trace.width
        self._matrices = sum(weight.numel() for weight in block.parameters.values() if weight.dim() > 1)
        self._head = trace.head.weight.numel()
        tokens = probe.fit.size + probe.select.size + probe.confirm.size
        per_token = self.depth * (self._matrices + self._width * probe.sequence_length) + self._head
        self._one = float(tokens * per_token)

    def spend(self, passes: float) -> None:
        self.spent += passes

    def affords(self, passes: float) -> bool:
        """Whether so much is left."""
        return self.budget is None or self.spent + passes <= self.budget * (1.0 + ROUNDING)

    @property
    def left(self) -> float:
        return float("inf") if self.budget is None else self.budget - self.spent

    def refusal(self) -> str:
        """Why work that is not afforded is left out."""
        return f"the budget of {self.budget:g} forward passes does not suffice"

    def blocks(self, tokens: int, length: int, count: int = 1) -> float:
        """So many tokens, in sequences of a length, through so many blocks."""
        return tokens * count * (self._matrices + self._width * length) / self._one

    def head(self, tokens: int) -> float:
        """So many tokens scored by the head."""
        return tokens * self._head / self._one

    def tail(self, block: int, tokens: int, length: int) -> float:
        """A stand-in for this block and, behind it, every later block and the head."""
        return self.blocks(tokens, length, self.depth - block) + self.head(tokens)

    def products(self, rows: float, inputs: float, outputs: float) -> float:
        """Rows of `inputs` features by a matrix of `outputs` columns; the sums of a Gram are such products too."""
        return rows * inputs * outputs / self._one
