"""adapter_config.json: what PEFT says of an adapter, and which adapters are merged here.

The file may be hostile: every value is checked before it is used, and what is not known to be harmless is refused by
its name.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peel_agent.errors import CheckpointError

CONFIG = "adapter_config.json"

MERGE = (
    "merge it with peft and peel the result: "
    "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(NEW)"
)
PEEL_THE_BASE = "it changes no weights of its base model: peel the base model instead"
NO_ONE_MODEL = "what it adds depends on the input, so that there is no one merged model: peel its base model instead"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MERGED_BY_PEFT = _words(
    "ADALORA ADAMSS BEFT BOFT BONE C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR MISS "
    "OFT OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA "
    "WAVEFT"
)
"""The values of peft_type whose adapters peft merges and this format does not."""

PROMPTS = _words("ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING")
DEPEND_ON_INPUT = _words("LILY POLY SHADOW XLORA")

UNDERSTOOD = _words(
    "r lora_alpha use_rslora rank_pattern alpha_pattern use_dora fan_in_fan_out init_lora_weights "
    "base_model_name_or_path peft_type trainable_token_indices"
)
WITHOUT_EFFECT = _words(  # The tensors of the adapter say which modules are changed and what is replaced.
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias lora_bias "
    "ensure_weight_tying "
    # These concern the training or the way an adapter is loaded.
    "auto_mapping peft_version task_type inference_mode lora_dropout revision megatron_core runtime_config "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size"
)
"""Settings that change nothing in how the tensors of an adapter are merged."""

_WITHOUT_MERGER = frozenset({"alora_invocation_tokens", "arrow_config"})
"""Settings that make the adapter depend on the input."""

_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Ways to begin an adapter that leave the weights of the base model as they are; PiSSA, OLoRA, ... do not."""

_PATTERN = re.compile(r"(?:(?:[\w.\-]|\\[.dw\-]|\[[\w\-]+\])[*+?]?|\((?:\?:)?|\)(?![*+?{])|[|^$])*")
_REPEATS = re.compile(r"(?<!\\)[*+]")
MAX_PATTERN = 400
MAX_REPEATS = 2
MAX_PATTERNS = 5_000


Number = TypeVar("Number", int, float)


def refused(what: str, fault: str, *, remedy: str = MERGE) -> CheckpointError:
    """The error of an adapter that is not merged here."""
    return CheckpointError(f"{what} {fault}", remedy=remedy)


@dataclass(frozen=True)
class LoraSettings:
    """How the pairs of matrices A and B of a LoRA adapter are scaled, and what they are added to.

    The keys of `ranks` and `alphas` are regular expressions; they are compiled where a module is asked for, since this
    record is made in the parent daemon. `base` is the base model's folder as the file names it, None when it names
    none. `tokens` are those that have embeddings of their own, by the end of the embedding's name; "" is any.
    """

    base: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    by_root_of_rank: bool
    by_magnitude: bool
    fan_in_fan_out: bool
    tokens: Mapping[str, Sequence[int]]

    def tokens_of(self, module: str) -> Sequence[int]:
        """The tokens whose rows the adapter has anew in one embedding."""
        ends = (end for end in self.tokens if not end or module == end or module.endswith(f".{end}"))
        return self.tokens.get(next(ends, ""), ())

    def rank_of(self, module: str) -> int:
        """The rank of one module's matrices; the first pattern that fits its name decides, as in peft."""
        return _first(self.ranks, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        rank = self.rank_of(module)
        return _first(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.by_root_of_rank else rank)


def read_settings(config: Mapping[str, Any]) -> LoraSettings:
    """The settings of a LoRA adapter; raises CheckpointError for any other adapter and for what is not merged here."""
    _check_type(config.get("peft_type"))
    _check_all_understood(config)
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise refused(CONFIG, f"has base_model_name_or_path {base!r}, not a text")
    return LoraSettings(
        base=base or None,
        rank=_rank("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        ranks={key: _rank(f"rank_pattern: {key}", value) for key, value in _table(config, "rank_pattern")},
        alphas={key: _alpha(f"alpha_pattern: {key}", value) for key, value in _table(config, "alpha_pattern")},
        by_root_of_rank=_switch(config, "use_rslora"),
        by_magnitude=_switch(config, "use_dora"),
        fan_in_fan_out=_switch(config, "fan_in_fan_out"),
        tokens=_tokens(config.get("trainable_token_indices")),
    )


def _check_type(kind: object) -> None:
    if kind == "LORA":
        return
    if not isinstance(kind, str):
        raise refused(CONFIG, f"has peft_type {kind!r}: it is not known what adapter of PEFT this is")
    what = f"this is a PEFT adapter of type {kind}"
    if kind in PROMPTS:
        raise refused(what, "and not LoRA", remedy=PEEL_THE_BASE)
    if kind in DEPEND_ON_INPUT:
        raise refused(what, "and not LoRA", remedy=NO_ONE_MODEL)
    if kind in MERGED_BY_PEFT:
        raise refused(what, "; of PEFT's adapters only LoRA and DoRA are merged here")
    raise refused(what, ", which is not known here", remedy=f"if peft can merge it, {MERGE}; or peel its base model")


def _check_all_understood(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if value and key not in UNDERSTOOD | WITHOUT_EFFECT:
            way_out = NO_ONE_MODEL if key in _WITHOUT_MERGER else MERGE
            raise refused(CONFIG, f"has {key} = {value!r}: this LoRA adapter is not merged here", remedy=way_out)
    begun = config.get("init_lora_weights", True)
    if not isinstance(begun, bool) and begun not in _KEEPS_BASE:
        raise refused(
            CONFIG, f"has init_lora_weights = {begun!r}: it changed the base model's weights when the training began"
        )


def _tokens(value: object) -> dict[str, Sequence[int]]:
    lists = {"": value} if isinstance(value, list) else {} if value is None else value
    if not isinstance(lists, dict) or not all(
        isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
        for tokens in lists.values()
    ):
        raise refused(CONFIG, "has trainable_token_indices that are no lists of tokens")
    return lists


def _table(config: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    table = config.get(key) or {}
    if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
        raise refused(CONFIG, f"has {key} that is no object of at most {MAX_PATTERNS:,} patterns")
    for pattern in table:
        _check_pattern(pattern)
    return list(table.items())


def _check_pattern(key: str) -> None:
    """Raises CheckpointError for a regular expression that could keep a matcher busy: a repeated group, long ones."""
    if len(key) > MAX_PATTERN or not _PATTERN.fullmatch(key) or len(_REPEATS.findall(key)) > MAX_REPEATS:
        raise _no_pattern(key)


@functools.lru_cache(maxsize=MAX_PATTERNS)
def _pattern(key: str) -> re.Pattern[str]:
    """What fits the names of modules that end as the regular expression `key` says."""
    try:
        return re.compile(rf"(?:.*\.)?(?:{key})$")
    except re.error as error:
        raise _no_pattern(key) from error


def _no_pattern(key: str) -> CheckpointError:
    return refused(CONFIG, f"has the pattern {key!r}, which is no simple regular expression of a module's name")


def _first(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    return next((value for key, value in patterns.items() if _pattern(key).match(module)), otherwise)


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise refused(CONFIG, f"has {key} = {value!r}, which is no rank")
    return value


def _alpha(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise refused(CONFIG, f"has {key} = {value!r}, which is no number")
    return float(value)


def _switch(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise refused(CONFIG, f"has {key} = {value!r}, which is neither true nor false")
    return bool(value)
