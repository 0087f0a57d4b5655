"""The modules of a model without their weights: transformers' own classes, or what the user's factory gives."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from peel_agent.errors import CheckpointError, ConfigurationError
from peel_agent.records import Anatomy, CustomModel

NOT_BUILT = frozenset(
    {"model_type", "auto_map", "quantization_config", "experts_implementation", "_experts_implementation"}
)
"""Keys of config.json that would name code, or a form of the weights that they do not have any more."""

LARGEST = 2**31
MOST_BLOCKS = 10_000
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


@dataclass(frozen=True)
class Architecture:
    """A model to be filled: `body` runs it up to the head, `initialise` fills one module as the architecture does.

    `tied` maps names of weights to those whose tensor they share; `ignored` are patterns of stored names that it needs
    not; `base_prefix` is the first part of its body's names, which a checkpoint of the body alone leaves out.
    """

    module: nn.Module
    family: str
    anatomy: Anatomy
    context: int
    body: Callable[[Tensor], Any]
    initialise: Callable[[nn.Module], Any]
    tied: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    base_prefix: str = ""

    @property
    def head_shape(self) -> tuple[int, int]:
        """Vocabulary and width."""
        head: Any = self.module.get_submodule(self.anatomy.head)
        return int(head.weight.shape[0]), int(head.weight.shape[1])


def of_transformers(config: Mapping[str, Any], family: str, anatomy: Anatomy) -> Architecture:
    """A causal language model of this config.json; raises CheckpointError when transformers has none."""
    model: Any = build_model(config)
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return Architecture(
        module=model,
        family=family,
        anatomy=anatomy,
        context=int(model.config.max_position_embeddings),
        body=partial(model.base_model, use_cache=False),
        initialise=model._init_weights,
        tied=dict(ties) if model.config.tie_word_embeddings else {},
        ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        base_prefix=model.base_model_prefix,
    )


def of_factory(name: str, config: Mapping[str, Any]) -> Architecture:
    """What the callable `name` (package.module:callable) gives for what the checkpoint says of its model.

    Raises ConfigurationError for one that cannot be used, CheckpointError when it fails on this checkpoint.
    """
    factory = _callable(name)
    try:
        with _parameters_on_meta():
            custom = factory(config)
    except Exception as error:  # the user's own code
        raise CheckpointError(
            f"the factory {name} failed on what the checkpoint says of its model: {type(error).__name__}: {error}",
            remedy="make it build the model that wrote this checkpoint",
        ) from error
    if not isinstance(custom, CustomModel):
        raise ConfigurationError(
            f"the factory {name} gave a {type(custom).__name__}", remedy="return a peel_agent.records.CustomModel"
        )
    _check_anatomy(name, custom)
    return Architecture(
        module=custom.module.eval(),
        family=name,
        anatomy=custom.anatomy,
        context=custom.context,
        body=custom.body or custom.module,
        initialise=custom.initialise or _reset,
        tied=_shared(custom.module),
    )


def _callable(name: str) -> Callable[[Mapping[str, Any]], object]:
    module, _, attribute = name.partition(":")
    try:
        factory: object = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module may raise when it is imported
        raise ConfigurationError(
            f"`model.factory` {name} cannot be imported: {type(error).__name__}: {error}",
            remedy="install its package, or put its folder into PYTHONPATH",
        ) from error
    if not callable(factory):
        raise ConfigurationError(f"`model.factory` {name} is no callable", remedy="name a function package.module:name")
    return factory


def _check_anatomy(name: str, custom: CustomModel) -> None:
    """Raises ConfigurationError for a module that the anatomy names and the model lacks."""
    anatomy, modules = custom.anatomy, dict(custom.module.named_modules())
    blocks = modules.get(anatomy.blocks)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ConfigurationError(
            f"the factory {name}: `{anatomy.blocks}` is no ModuleList of blocks", remedy="correct Anatomy.blocks"
        )
    inside = (anatomy.attention_output, anatomy.mlp_output, *anatomy.mlp_path)
    wanted = [f"{anatomy.blocks}.0.{path}" for path in inside if path is not None]
    for module in (*wanted, anatomy.final_norm, anatomy.head):
        if module not in modules:
            raise ConfigurationError(
                f"the factory {name}: the model has no module `{module}`", remedy="correct the Anatomy that it returns"
            )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Each parameter moves to the meta device as it is registered; buffers are computed as they are written."""
    register = nn.Module.register_parameter

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = moved  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _shared(module: nn.Module) -> dict[str, str]:
    """Each name of a parameter that has several, to the first of them and the first to the second."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    several = (aliases for aliases in names.values() if len(aliases) > 1)
    return {name: aliases[0] if name != aliases[0] else aliases[1] for aliases in several for name in aliases}


def _reset(module: nn.Module) -> None:
    """Torch's own way to fill a module anew."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


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


def check_sizes(config: Mapping[str, Any], stored: int) -> None:
    """Raises CheckpointError for a config.json of more blocks than there are tensors, or of sizes that no model has."""
    for key, value in config.items():
        if type(value) is int and value > LARGEST and SIZES.search(key):
            raise CheckpointError(f"config.json has {key} = {value:,}", remedy="use the config.json of the training")
        blocks = value if key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") else 0
        if type(blocks) is int and blocks > min(stored, MOST_BLOCKS):
            raise CheckpointError(
                f"config.json says that there are {blocks:,} blocks; the checkpoint has {stored:,} tensors, and "
                f"at most {MOST_BLOCKS:,} blocks are built",
                remedy="config.json and the weights must come from the same model",
            )
