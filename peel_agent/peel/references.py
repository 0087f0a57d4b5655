"""Reference solutions for one block (METHOD 2): `affine` and `refit`; `skip` is the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from peel_agent.peel.least_squares import Gram, Solution
from peel_agent.peel.streams import Streams, through
from peel_agent.records import Block, Projection


@dataclass(frozen=True)
class Affine:
    """A linear map with bias from a part's input to what it adds: weight [d, d], bias [d]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """What the map adds to the stream, [..., d]."""
        return h @ self.weight + self.bias


def pick_affine(solutions: Sequence[Solution], targets: slice, h: Tensor, added: Tensor) -> Affine:
    """The solution whose map has the least squared error on `select`: h and `added` are [N_s, S, d].

    `targets` says which columns of the solved system belong to this map. METHOD 2: min ||[H,1]A - (T-H)||^2 +
    lambda ||A||^2, lambda picked on select.
    """

    def squared_error(solution: Solution) -> float:
        return float((_as_affine(solution, targets, h)(h) - added).double().square().sum())

    return _as_affine(min(solutions, key=squared_error), targets, h)


def _as_affine(solution: Solution, targets: slice, like: Tensor) -> Affine:
    weight = solution.weight[:, targets].to(like.dtype)
    return Affine(weight[:-1], weight[-1])


@dataclass(frozen=True)
class Refit:
    """A trained block with its two output projections solved anew; everything else stays as trained."""

    block: Block
    attention: Projection
    mlp: Projection

    def run(self, h: Tensor) -> Tensor:
        return self.block.run(h, attention=self.attention, mlp=self.mlp)


def refit(block: Block, inputs: Streams, targets: Streams, chunk: int) -> Refit:
    """The block refitted to map `inputs` to `targets`: its attention output projection, then its MLP's.

    Each step solves for the *change* of one projection that explains what the block so far misses of the target, so
    a ridge pulls toward the trained weights; the strength, or no change at all, is picked on `select` by the block's
    actual output. The second step sees the first one's output.
    """
    attention = _refit_projection(
        block.attention_projection,
        _gram(block, inputs, targets, chunk, attention=None),
        lambda candidate: _missed(lambda h: block.run(h, attention=candidate), inputs, targets, chunk),
    )
    mlp = _refit_projection(
        block.mlp_projection,
        _gram(block, inputs, targets, chunk, attention=attention),
        lambda candidate: _missed(lambda h: block.run(h, attention=attention, mlp=candidate), inputs, targets, chunk),
    )
    return Refit(block, attention, mlp)


def columns_of_refit(block: Block) -> int:
    """Unknowns a row of the larger of the two least-squares problems in `refit`."""
    return max(_columns(block.attention_projection), _columns(block.mlp_projection))


def _columns(projection: Projection) -> int:
    return len(projection.weight) + int(projection.bias is not None)


def _gram(block: Block, inputs: Streams, targets: Streams, chunk: int, *, attention: Projection | None) -> Gram:
    """Features of the projection to be solved against what the block misses on `fit`.

    With `attention` None the attention projection is solved; else the MLP's, under that attention projection.
    """
    solved = block.attention_projection if attention is None else block.mlp_projection
    rows, columns = solved.weight.shape
    gram = Gram(rows, columns, intercept=solved.bias is not None, device=solved.weight.device)
    for h, target in zip(inputs.fit.split(chunk), targets.fit.split(chunk), strict=True):
        seen = block.observe(h, attention=attention)
        features = seen.attention_features if attention is None else seen.mlp_features
        gram.update(features, target - seen.output)
    return gram


def _missed(run: Callable[[Tensor], Tensor], inputs: Streams, targets: Streams, chunk: int) -> float:
    """Squared error on `select` of the block run with a candidate projection."""
    return float((through(run, inputs.select, chunk) - targets.select).double().square().sum())


def _refit_projection(trained: Projection, gram: Gram, missed: Callable[[Projection], float]) -> Projection:
    candidates = [trained] + [_changed(trained, solution) for solution in gram.solve()]
    return min(candidates, key=missed)


def _changed(trained: Projection, solution: Solution) -> Projection:
    change = solution.weight
    if trained.bias is None:
        return Projection((trained.weight.double() + change).to(trained.weight.dtype), None)
    return Projection(
        (trained.weight.double() + change[:-1]).to(trained.weight.dtype),
        (trained.bias.double() + change[-1]).to(trained.bias.dtype),
    )
