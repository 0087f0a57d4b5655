"""The reference solutions of one block and of its two parts, and what the model loses with them (method.md 2 and 4).

A reference is named by what it puts in the place of block i; its value is the pair of streams after block i on select
and on confirm. Streams are lists [h_0, ..., h_L] as `Decoder.streams` gives them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from tests.oracles.least_squares import GRID, affine, apply_affine, mean_squared_error, ridge, tokens, with_ones

if TYPE_CHECKING:
    from tests.oracles.decoder import Array, Decoder, Ids, Projection

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, Part] = ("attention", "mlp")


class Streams(NamedTuple):
    """The trained streams of the three parts of the probe."""

    fit: list[Array]
    select: list[Array]
    confirm: list[Array]


class Spliced(NamedTuple):
    """The stream after block i with a reference in its place."""

    select: Array
    confirm: Array


class References(NamedTuple):
    """The references that can be trusted, in the order in which ties are decided, and the names of the others."""

    trusted: dict[str, Spliced]
    left_out: list[str]


def change(projection: Projection, delta: Array) -> Projection:
    """The projection plus delta [p, d], whose last row belongs to the bias when there is one."""
    weight, bias = projection
    if bias is None:
        return weight + delta, None
    return weight + delta[:-1], bias + delta[-1]


def columns(features: Array, projection: Projection) -> Array:
    """The design matrix [n, p] of a projection: its input features, and ones when it has a bias."""
    return tokens(features) if projection[1] is None else with_ones(tokens(features))


def refit(
    decoder: Decoder, i: int, H_fit: Array, T_fit: Array, H_sel: Array, T_sel: Array
) -> tuple[Projection, Projection]:
    """Block i's two output projections, refitted one after the other so that it maps H to T (streams [N, S, d]).

    Each step tries no change, then ridge solutions from the strongest to the weakest r; the first with the least error
    of the block's own output on select wins.
    """
    strongest_first = sorted(GRID, reverse=True)

    trained_attention, trained_mlp = decoder.projections(i)
    seen = decoder.inside(i, H_fit)
    X = columns(seen.attention_features, trained_attention)
    E = tokens(T_fit) - tokens(seen.out)
    attention, best_error = trained_attention, mean_squared_error(decoder.block(i, H_sel), T_sel)
    for r in strongest_first:
        candidate = change(trained_attention, ridge(X, E, r))
        error = mean_squared_error(decoder.block(i, H_sel, attention=candidate), T_sel)
        if error < best_error:
            attention, best_error = candidate, error

    seen = decoder.inside(i, H_fit, attention=attention)
    X = columns(seen.mlp_features, trained_mlp)
    E = tokens(T_fit) - tokens(seen.out)
    mlp, best_error = trained_mlp, mean_squared_error(decoder.block(i, H_sel, attention=attention), T_sel)
    for r in strongest_first:
        candidate = change(trained_mlp, ridge(X, E, r))
        error = mean_squared_error(decoder.block(i, H_sel, attention=attention, mlp=candidate), T_sel)
        if error < best_error:
            mlp, best_error = candidate, error
    return attention, mlp


def refit_columns(decoder: Decoder, i: int) -> int:
    """The larger number of unknowns per output of block i's two refit problems."""
    counts = [len(weight) + (bias is not None) for weight, bias in decoder.projections(i)]
    return max(counts)


def affine_is_trusted(fit: Array) -> bool:
    """n >= 2 (d+1) for a fit stream [N, S, d] of n = N*S tokens."""
    return len(tokens(fit)) >= 2 * (int(fit.shape[-1]) + 1)


def refit_is_trusted(decoder: Decoder, i: int, fit: Array) -> bool:
    """n >= twice the larger number of columns of block i's two refit problems."""
    return len(tokens(fit)) >= 2 * refit_columns(decoder, i)


def block_references(decoder: Decoder, i: int, streams: Streams) -> References:
    """`skip`, `affine` and (from the second block on) `previous` in place of block i."""
    fit, select, confirm = streams
    trusted = {"skip": Spliced(select[i], confirm[i])}
    left_out = []
    if affine_is_trusted(fit[i]):
        A, _ = affine(fit[i], fit[i + 1], select[i], select[i + 1])
        trusted["affine"] = Spliced(apply_affine(select[i], A), apply_affine(confirm[i], A))
    else:
        left_out.append("affine")
    if i >= 1 and refit_is_trusted(decoder, i - 1, fit[i - 1]):
        attention, mlp = refit(decoder, i - 1, fit[i - 1], fit[i + 1], select[i - 1], select[i + 1])
        trusted["previous"] = Spliced(
            decoder.block(i - 1, select[i - 1], attention=attention, mlp=mlp),
            decoder.block(i - 1, confirm[i - 1], attention=attention, mlp=mlp),
        )
    elif i >= 1:
        left_out.append("previous")
    return References(trusted, left_out)


def part_references(decoder: Decoder, i: int, part: Part, streams: Streams) -> References:
    """`skip` and `affine` in place of block i's attention (its trained MLP follows) or of its MLP."""
    mids = [decoder.inside(i, stream[i]).mid for stream in streams]
    if part == "attention":
        inputs, outputs = [stream[i] for stream in streams], mids
    else:
        inputs, outputs = mids, [stream[i + 1] for stream in streams]

    def rest(x: Array) -> Array:
        return decoder.mlp_part(i, x) if part == "attention" else x

    fit, select, confirm = inputs
    trusted = {"skip": Spliced(rest(select), rest(confirm))}
    if not affine_is_trusted(fit):
        return References(trusted, ["affine"])
    A, _ = affine(fit, outputs[0], select, outputs[1])
    trusted["affine"] = Spliced(rest(apply_affine(select, A)), rest(apply_affine(confirm, A)))
    return References(trusted, [])


def loss_after(decoder: Decoder, i: int, stream: Array, ids: Ids) -> Array:
    """Loss of each sequence [N] when `stream` [N, S, d] is what follows block i and everything after it is trained."""
    for j in range(i + 1, decoder.block_count):
        stream = decoder.block(j, stream)
    return decoder.nll(stream, ids)


def stream_share(before: Array, after: Array) -> float:
    """||after - before|| / ||after|| over all tokens of a stream."""
    return float(np.linalg.norm(tokens(after - before)) / np.linalg.norm(tokens(after)))
