"""Opens a checkpoint: config.json as data, the model built on the meta device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from peel_agent.errors import CheckpointError
from peel_agent.load.low_bit import PatchedWeights, check_globs, precision_in_words
from peel_agent.load.names import NamedWeights
from peel_agent.load.packed import unpack
from peel_agent.records import CheckpointRef, Snapshot, Stack, WeightSet
from peel_agent.spi import Family, Format

NOT_BUILT = frozenset(
    {"model_type", "auto_map", "quantization_config", "experts_implementation", "_experts_implementation"}
)
"""Keys of config.json that would name code, or a form of the weights that they do not have any more."""

LARGEST = 2**31
SIZES = re.compile(r"size|dim|layers?$|heads?$|embd|inner|positions|experts|width|channels|groups")

UNBUILT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    KeyError,
    IndexError,
    MemoryError,
    RecursionError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises for a config.json that it cannot use."""


def open_snapshot(
    ref: CheckpointRef,
    form: Format,
    family_of: Callable[[str], Family],
    *,
    sets: Mapping[str, WeightSet] | None = None,
    patch: Path | None = None,
) -> Snapshot:
    """The checkpoint as modules on the meta device, with the weights to fill them.

    `sets` says by glob which weights are latents of a low-bit forward pass; a safetensors file `patch` replaces weights
    of the same names. Raises UnknownFamily, WeightsMismatch (naming missing, unexpected and misshapen weights),
    ConfigurationError for a glob that fits no matrix, or CheckpointError.
    """
    unpacked = unpack(form.open(ref))
    weights = unpacked.weights if patch is None else PatchedWeights(unpacked.weights, patch)
    sets = {**(sets or {}), **unpacked.sets}
    config = weights.config()
    family = family_of(str(config.get("model_type", "(none)")))
    anatomy = family.anatomy(config)
    if isinstance(anatomy, Stack):
        raise CheckpointError(
            f"{ref.path} is a fully connected network: it has no blocks", remedy="use `peel-agent scan` or `watch`"
        )
    check_sizes(config, len(weights.shapes()))
    model = build_model(config)
    named = NamedWeights(weights, model, anatomy.stored_as)
    named.check()
    settings: Any = model.config
    check_globs(sets, named.shapes(), transposed=anatomy.projection_layout == "in_out")
    inside = (name for name, shape in named.shapes().items() if name.startswith(anatomy.blocks) and len(shape) == 2)
    example = next(inside, next(iter(named.shapes())))
    return Snapshot(
        ref=ref,
        model=model,
        family=family.name,
        anatomy=anatomy,
        weights=named,
        width=int(settings.hidden_size),
        vocabulary=int(settings.vocab_size),
        context=int(settings.max_position_embeddings),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        precision=unpacked.note or precision_in_words(example, named.read(example), sets, anatomy),
        sets=sets,
        tied_head=anatomy.head + ".weight" in named.tied,
    )


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """A causal language model of this configuration: parameters on the meta device, buffers computed on the CPU.

    Only transformers' own classes are built; code named by `auto_map` is never looked at.
    """
    settings = {key: value for key, value in config.items() if key not in NOT_BUILT}
    try:
        parsed = transformers.AutoConfig.for_model(config["model_type"], **settings)
        attention = "sdpa" if transformers.AutoModelForCausalLM._model_mapping[type(parsed)]._supports_sdpa else "eager"
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                parsed, dtype=torch.float32, attn_implementation=attention
            )
        _compute_buffers(model)
    except UNBUILT as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build a model from config.json: "
            f"{type(error).__name__}: {error}",
            remedy="check config.json, or install the transformers release that wrote it",
        ) from error
    return model.eval()


def check_sizes(config: Mapping[str, Any], stored: int) -> None:
    """Raises CheckpointError for a config.json of more blocks than there are tensors, or of sizes that no model has."""
    for key, value in config.items():
        if type(value) is int and value > LARGEST and SIZES.search(key):
            raise CheckpointError(f"config.json has {key} = {value:,}", remedy="use the config.json of the training")
        if key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") and type(value) is int and value > stored:
            raise CheckpointError(
                f"config.json says that there are {value:,} blocks; the checkpoint has {stored:,} tensors",
                remedy="config.json and the weights must come from the same model",
            )


def _compute_buffers(model: nn.Module) -> None:
    """Fills the buffers that no checkpoint stores (rotary frequencies, masks), by transformers' own initialiser."""
    initialise: Any = model._init_weights
    for module in model.modules():
        volatile = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        if not volatile:
            continue
        for name in volatile:
            buffer = getattr(module, name)
            setattr(
                module,
                name,
                torch.full_like(buffer, torch.nan, device="cpu")
                if buffer.is_floating_point()
                else torch.zeros_like(buffer, device="cpu"),
            )
        initialise(module)
        for name in volatile:
            if getattr(module, name).isnan().any():
                raise CheckpointError(
                    f"transformers does not initialise the buffer `{name}` of {type(module).__name__}",
                    remedy="report this architecture; its positions cannot be computed",
                )
