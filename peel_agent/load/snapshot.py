"""Opens a checkpoint: config.json as data, the model built on the meta device, every weight name accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from peel_agent.errors import CheckpointError, WeightsMismatch
from peel_agent.load.low_bit import PatchedWeights, check_globs, precision_in_words
from peel_agent.records import CheckpointRef, Snapshot, Stack, Weights, WeightSet
from peel_agent.spi import Family, Format


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
    weights = form.open(ref) if patch is None else PatchedWeights(form.open(ref), patch)
    config = weights.config()
    family = family_of(str(config.get("model_type", "(none)")))
    anatomy = family.anatomy(config)
    if isinstance(anatomy, Stack):
        raise CheckpointError(
            f"{ref.path} is a fully connected network: it has no blocks", remedy="use `peel-agent scan` or `watch`"
        )
    model = build_model(config)
    named = NamedWeights(weights, model, anatomy.stored_as)
    named.check()
    settings: Any = model.config
    check_globs(sets or {}, named.shapes(), transposed=anatomy.projection_layout == "in_out")
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
        precision=precision_in_words(example, named.read(example), sets or {}, anatomy),
        sets=sets or {},
        tied_head=anatomy.head + ".weight" in named.tied,
    )


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """A causal language model of this configuration: parameters on the meta device, buffers computed on the CPU.

    Only transformers' own classes are built; code named by `auto_map` is never looked at.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise CheckpointError(
            f"config.json has quantization_config (quant_method `{method}`); quantised weights are not read",
            remedy="save the checkpoint in float32, float16 or bfloat16",
        )
    settings = {key: value for key, value in config.items() if key not in {"model_type", "auto_map"}}
    try:
        parsed = transformers.AutoConfig.for_model(config["model_type"], **settings)
        attention = "sdpa" if transformers.AutoModelForCausalLM._model_mapping[type(parsed)]._supports_sdpa else "eager"
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                parsed, dtype=torch.float32, attn_implementation=attention
            )
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build a model from config.json: {error}",
            remedy="check config.json, or install the transformers release that wrote it",
        ) from error
    _compute_buffers(model)
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


class NamedWeights:
    """The tensors of a checkpoint under the names of the model's own state dict, tied names resolved."""

    def __init__(self, stored: Weights, model: nn.Module, stored_as: Mapping[str, str]) -> None:
        self._stored = stored
        self._stored_as = stored_as
        self._expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        settings: Any = model.config
        self.tied = dict(ties) if settings.tie_word_embeddings else {}

    def config(self) -> Mapping[str, Any]:
        return self._stored.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._expected

    def read(self, name: str) -> Tensor:
        return self._stored.read(self._source(name))

    def _source(self, name: str) -> str:
        own = self._stored_as.get(name, name)
        return self.tied[name] if name in self.tied and own not in self._stored.shapes() else own

    def check(self) -> None:
        """Raises WeightsMismatch unless every weight of the model is there once, in its shape, and nothing else."""
        stored = self._stored.shapes()
        problems = []
        missing = [name for name in self._expected if self._source(name) not in stored]
        if missing:
            problems.append(f"missing {_some(missing)}")
        known = {self._stored_as.get(name, name) for name in self._expected}
        extra = [name for name in stored if name not in known and not any(p.search(name) for p in self._ignored)]
        if extra:
            problems.append(f"unexpected {_some(extra)}")
        wrong = [
            f"{name} {list(stored[self._source(name)])} instead of {list(shape)}"
            for name, shape in self._expected.items()
            if self._source(name) in stored and stored[self._source(name)] != shape
        ]
        if wrong:
            problems.append(f"misshapen {_some(wrong)}")
        if problems:
            raise WeightsMismatch(
                "the weights do not fit config.json: " + "; ".join(problems),
                remedy="config.json and the weights must come from the same model, saved with save_pretrained",
            )


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
