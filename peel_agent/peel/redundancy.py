"""Redundancy (method.md 6): what the model loses when one refitted block stands in for several."""

from __future__ import annotations

from torch import Tensor

from peel_agent.peel.numerics.losses import Losses, sequence_losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import Streams, embedded, through
from peel_agent.peel.references import columns_of_refit, refit, refit_fault, refit_tokens
from peel_agent.records import Block, Skipped, Trace

Matrix = tuple[tuple[float, ...], ...]


def redundancy(trace: Trace, trained: Losses, stopwatch: Stopwatch) -> tuple[Matrix | None, tuple[Skipped, ...]]:
    """matrix[l][j] for l < j: loss on confirm with blocks l..j replaced by block l refit to h_{j+1}, minus the trained.

    Nats per token; 0 on the diagonal and below. `trained` are the losses per score sequence. None, and the reason, when
    the refits cannot be trusted or the time budget ends.
    """
    why = refit_fault(trace)
    if why is not None:
        return None, (Skipped("redundancy", why),)
    depth, selecting = len(trace.block_names), len(trace.probe.select)
    usual = float(trained[selecting:].mean())
    with stopwatch("capture"):
        hidden = _hidden_states(trace, refit_tokens(columns_of_refit(next(iter(trace.blocks(stop=1))))))
        confirm = trace.embed(trace.probe.confirm)
    matrix = [[0.0] * depth for _ in range(depth)]
    stopwatch.progress("redundancy, blocks", 0, depth)
    for block in stopwatch.each("capture", trace.blocks()):
        began = stopwatch.now()
        for last, losses in _stood_in(trace, block, hidden, confirm, stopwatch).items():
            matrix[block.index][last] = float(losses.mean()) - usual
        confirm = through(block.run, confirm, trace.chunk)
        stopwatch.progress("redundancy, blocks", block.index + 1, depth)
        if block.index + 1 < depth and not stopwatch.affords(stopwatch.now() - began):
            return None, (Skipped("redundancy", stopwatch.refusal()),)
    return tuple(map(tuple, matrix)), ()


def _hidden_states(trace: Trace, tokens: int) -> list[Streams]:
    """Every hidden state on the fit tokens of a refit and on select."""
    whole = embedded(trace).first(tokens)
    states = [Streams(whole.fit, whole.select, whole.selecting)]
    for block in trace.blocks():
        states.append(states[-1].through(block.run, trace.chunk))
    return states


def _stood_in(
    trace: Trace, block: Block, hidden: list[Streams], confirm: Tensor, stopwatch: Stopwatch
) -> dict[int, Losses]:
    """Losses per confirm sequence with this block, refitted, in place of itself and those up to each later one."""
    spans = range(block.index + 1, len(trace.block_names))
    if not spans:
        return {}
    with stopwatch("solve"):
        fitted = refit(block, hidden[block.index], [hidden[last + 1] for last in spans], trace.chunk)
        streams = {
            last: through(refitted.run, confirm, trace.chunk) for last, refitted in zip(spans, fitted, strict=True)
        }
    with stopwatch("score"):
        for later in trace.blocks(block.index + 2):
            for last in spans:
                if last < later.index:
                    streams[last] = through(later.run, streams[last], trace.chunk)
        return {last: sequence_losses(trace, stream, trace.probe.confirm) for last, stream in streams.items()}
