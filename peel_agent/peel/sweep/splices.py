"""References spliced into the trained model: the stream behind a block with a stand-in for it, or for a part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from peel_agent.peel.numerics.streams import through
from peel_agent.peel.references import Affine
from peel_agent.records import Block, Chunk, Projection

Target = Literal["block", "attention", "mlp"]

TARGETS: tuple[Target, ...] = ("block", "attention", "mlp")


class Variant(NamedTuple):
    """The trained model with one block, or one part of a block, replaced by a reference."""

    block: int
    target: Target
    reference: str


@dataclass(frozen=True)
class Site:
    """Where a stand-in goes: a block with the trained streams around it, [n, S, d] each.

    h enters the block, mid is between its parts, `before` is the block before with the stream that enters that one.
    """

    block: Block
    h: Tensor
    mid: Tensor
    before: tuple[Block, Tensor] | None
    chunk: Chunk


Splice = Callable[[Site], Tensor]


def skip(target: Target) -> Splice:
    """The identity in place of the block or the part."""

    def splice(site: Site) -> Tensor:
        if target == "attention":
            return through(site.block.run_mlp_part, site.h, site.chunk)
        return site.h if target == "block" else site.mid

    return splice


def affine(target: Target, added: Affine) -> Splice:
    """What an affine map adds, in place of what the block or the part adds."""

    def splice(site: Site) -> Tensor:
        if target == "mlp":
            return site.mid + added(site.mid)
        stream = site.h + added(site.h)
        return through(site.block.run_mlp_part, stream, site.chunk) if target == "attention" else stream

    return splice


def changed(*, attention: Projection | None, mlp: Projection | None) -> Splice:
    """The block itself with other output projections; None leaves one as trained."""

    def splice(site: Site) -> Tensor:
        return through(lambda h: site.block.run(h, attention=attention, mlp=mlp), site.h, site.chunk)

    return splice


def with_weights(effective: Callable[[], Mapping[str, Tensor]]) -> Splice:
    """The block itself with some other weights, which are read when they are needed."""

    def splice(site: Site) -> Tensor:
        weights = effective()
        return through(lambda h: site.block.run_as(h, weights), site.h, site.chunk)

    return splice


def previous(attention: Projection, mlp: Projection) -> Splice:
    """The block before, with these output projections, in place of itself and of the block."""

    def splice(site: Site) -> Tensor:
        assert site.before is not None
        block, entering = site.before
        return through(lambda h: block.run(h, attention=attention, mlp=mlp), entering, site.chunk)

    return splice
