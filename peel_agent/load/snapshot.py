"""Opens a checkpoint: what it says of its model as data, the model built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, ConfigurationError
from peel_agent.load.architecture import Architecture, check_sizes, of_factory, of_transformers
from peel_agent.load.low_bit import PatchedWeights, check_globs, precision_in_words
from peel_agent.load.names import NamedWeights
from peel_agent.load.packed import unpack
from peel_agent.records import CheckpointRef, Snapshot, Stack, Weights, WeightSet
from peel_agent.spi import Family, Format


def open_snapshot(
    ref: CheckpointRef,
    form: Format,
    family_of: Callable[[str], Family],
    *,
    sets: Mapping[str, WeightSet] | None = None,
    patch: Path | None = None,
    factory: str | None = None,
    stored: Weights | None = None,
) -> Snapshot:
    """The checkpoint as modules on the meta device, with the weights to fill them.

    `factory` (package.module:callable) makes the model, if one is given. `sets` says by glob which weights are latents
    of a low-bit forward pass; a safetensors file `patch` replaces weights of the same names; `stored` is what
    `form.open(ref)` gave, where that was asked already. Raises UnknownFamily,
    WeightsMismatch (naming missing, unexpected and misshapen weights), ConfigurationError for a glob that fits no
    matrix or a factory that cannot be used, or CheckpointError.
    """
    unpacked = unpack(form.open(ref) if stored is None else stored)
    config = unpacked.weights.config()
    check_sizes(config, len(unpacked.weights.shapes()))
    built = _built(ref, config, family_of) if factory is None else of_factory(factory, config)
    model, anatomy = built.module, built.anatomy
    named = NamedWeights(
        unpacked.weights,
        model,
        anatomy.stored_as,
        tied=built.tied,
        ignored=built.ignored,
        base_prefix=built.base_prefix,
    )
    named.check()
    weights = named if patch is None else PatchedWeights(named, patch)
    vocabulary, width = built.head_shape
    transposed = anatomy.projection_layout == "in_out"
    try:
        check_globs(unpacked.sets, named.shapes(), transposed=transposed)
    except ConfigurationError as error:  # config.json of the checkpoint named them
        raise CheckpointError(error.what, remedy=error.remedy) from error
    check_globs(sets or {}, named.shapes(), transposed=transposed)
    sets = {**(sets or {}), **unpacked.sets}
    inside = (name for name, shape in named.shapes().items() if name.startswith(anatomy.blocks) and len(shape) == 2)
    example = next(inside, next(iter(named.shapes())))
    return Snapshot(
        ref=ref,
        model=model,
        family=built.family,
        anatomy=anatomy,
        weights=weights,
        width=width,
        vocabulary=vocabulary,
        context=built.context,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        precision=precision_in_words(example, weights.read(example), sets, anatomy, packed=unpacked.note),
        sets=sets,
        tied_head=named.same_tensor(anatomy.head + ".weight") is not None,
        body=built.body,
        initialise=built.initialise,
    )


def _built(ref: CheckpointRef, config: Mapping[str, Any], family_of: Callable[[str], Family]) -> Architecture:
    family = family_of(str(config.get("model_type", "(none)")))
    anatomy = family.anatomy(config)
    if isinstance(anatomy, Stack):
        raise CheckpointError(
            f"{ref.path} is a fully connected network: it has no blocks", remedy="use `peel-agent scan` or `watch`"
        )
    return of_transformers(config, family.name, anatomy)
