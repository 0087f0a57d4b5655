"""The splices of every stand-in that a plan asks for at one block."""

from __future__ import annotations

from peel_agent.peel.references import (
    REFIT_SELECT_TOKENS,
    Affine,
    columns_of_refit,
    pick_affine,
    refit,
    refit_tokens,
)
from peel_agent.peel.sweep import splices
from peel_agent.peel.sweep.splices import TARGETS, Splice, Target, Variant
from peel_agent.peel.sweep.visits import Visit
from peel_agent.records import Plan, Trace


def stand_ins_of(
    trace: Trace,
    visit: Visit,
    previous: Visit | None,
    plan: Plan,
) -> dict[Variant, Splice]:
    """The splice of every reference for this block and, if planned, its parts."""
    index = visit.block.index
    stand_ins: dict[Variant, Splice] = {}
    if "skip" in plan.references:
        targets = TARGETS if plan.parts else TARGETS[:1]
        stand_ins |= {Variant(index, target, "skip"): splices.skip(target) for target in targets}
    for target, added in _affine_maps(trace, visit).items():
        stand_ins[Variant(index, target, "affine")] = splices.affine(target, added)
    if "previous" in plan.references and previous is not None:
        tokens = refit_tokens(columns_of_refit(previous.block))
        inputs, aim = (streams.first(tokens, REFIT_SELECT_TOKENS) for streams in (previous.before, visit.after))
        (reaching,) = refit(previous.block, inputs, [aim], trace.chunk)
        stand_ins[Variant(index, "block", "previous")] = splices.previous(reaching.attention, reaching.mlp)
    return stand_ins


def variants_per_block(plan: Plan) -> int:
    """How many stand-ins leave at a block, at most."""
    everywhere = len({"skip", "affine"} & set(plan.references))
    return (len(TARGETS) if plan.parts else 1) * everywhere + int("previous" in plan.references)


def _affine_maps(trace: Trace, visit: Visit) -> dict[Target, Affine]:
    """The affine references of the block and its parts; the block's and the attention's share one Gram factor."""
    if visit.input_gram is None:
        return {}
    selecting, width = visit.before.selecting, trace.width
    h, mid, after = visit.before.select, visit.mid[:selecting], visit.after.select
    solutions = visit.input_gram.solve()
    maps: dict[Target, Affine] = {"block": pick_affine(solutions, slice(0, width), h, after - h)}
    if visit.mid_gram is not None:
        maps["attention"] = pick_affine(solutions, slice(width, None), h, mid - h)
        maps["mlp"] = pick_affine(visit.mid_gram.solve(), slice(0, width), mid, after - mid)
    return maps
