"""The config_groups of compressed-tensors: which scheme each quantised module follows."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peel_agent.load.packed.dequantised import CONFIG, refused, shown, text_of
from peel_agent.load.packed.patterns import LONGEST, check_patterns, compiled
from peel_agent.load.packed.ways_out import WAYS_OUT

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
MOST_GROUPS = 32
MOST_PATTERNS = 32
STRATEGIES = ("tensor", "channel", "group", "block")

BY_TRANSFORMERS = WAYS_OUT["compressed-tensors"]


@dataclass(frozen=True)
class Group:
    """One of config_groups: the library's scheme, and how its matrices are stored."""

    scheme: Any
    form: str
    fits: Callable[[str], bool]
    by_class: bool

    @property
    def args(self) -> Any:
        return self.scheme.weights

    @property
    def kind(self) -> str:
        return f"{'fp' if self.args.type == 'float' else 'int'}{self.args.num_bits}"


def library(module: str) -> Any:
    """A module of the library compressed-tensors. Raises CheckpointError, with the way to install it, without."""
    try:
        return importlib.import_module(f"compressed_tensors.{module}")
    except ImportError as error:
        raise refused(
            f"the checkpoint is compressed, and compressed-tensors cannot be imported: {error}",
            remedy='pip install "peel-agent[compressed-tensors]"',
        ) from error


def groups_of(settings: Mapping[str, Any]) -> list[Group]:
    """The groups of a quantization_config. Raises CheckpointError for what the library or this package cannot read."""
    stated = settings.get("config_groups")
    if not isinstance(stated, dict) or not 0 < len(stated) <= MOST_GROUPS:
        raise refused(f"{CONFIG} has config_groups {shown(stated)}, not 1 to {MOST_GROUPS} groups")
    form = text_of(settings, "format", "dense", (*FORMATS, "mixed-precision"), remedy=BY_TRANSFORMERS)
    return [_group(name, entry, form) for name, entry in stated.items()]


def _group(name: str, entry: object, form: str) -> Group:
    if not isinstance(entry, dict):
        raise refused(f"{CONFIG} has the group {shown(name)} as {shown(entry)}, not as an object")
    if entry.get("format") is not None:
        form = text_of(entry, "format", form, FORMATS, remedy=BY_TRANSFORMERS)
    elif form == "mixed-precision":
        raise refused(f"{CONFIG} has the format mixed-precision, and its group {shown(name)} names no format")
    check_patterns(entry.get("targets"), "targets")
    scheme_class = library("quantization").QuantizationScheme
    try:
        scheme = scheme_class.model_validate(entry)
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise refused(f"{CONFIG} has a group {shown(name)} that compressed-tensors refuses: {reason}") from error
    args = scheme.weights
    if args is not None and (not 1 <= args.num_bits <= 8 or args.strategy not in STRATEGIES):
        raise refused(
            f"{CONFIG} has weights of {shown(args.num_bits)} bits with the strategy {args.strategy}, which is not read",
            remedy=BY_TRANSFORMERS,
        )
    if args is not None and args.type == "float" and args.num_bits != 8:
        raise refused(
            f"{CONFIG} has weights of type float with {shown(args.num_bits)} bits; read are 8", remedy=BY_TRANSFORMERS
        )
    return Group(
        scheme, form, _matcher(scheme.targets), by_class=any(target.isidentifier() for target in scheme.targets)
    )


def _matcher(targets: list[str]) -> Callable[[str], bool]:
    """Whether a module is named by targets: by its name, or by `re:` and a pattern from the name's start."""
    patterns = [compiled(target.removeprefix("re:"), "targets") for target in targets if target.startswith("re:")]
    if len(patterns) > MOST_PATTERNS:
        raise refused(f"{CONFIG} has {len(patterns)} patterns in the targets of a group, more than {MOST_PATTERNS}")
    names = frozenset(target for target in targets if not target.startswith("re:"))
    return lambda module: module in names or any(pattern.match(module) for pattern in patterns)


def group_of(module: str, groups: list[Group]) -> Group:
    """The one group of a module: the only one there is, or the one that names it, or the one for its class."""
    quantising = [group for group in groups if group.args is not None]
    if len(quantising) > 1:
        if len(module) > LONGEST:
            raise refused(f"the module {shown(module)} has a name too long for the patterns of config_groups")
        named = [group for group in quantising if group.fits(module)]
        quantising = named or [group for group in quantising if group.by_class]
    if len(quantising) != 1:
        raise refused(
            f"`{module}` is quantised, and {len(quantising) or 'none'} of the config_groups fit it, where one is needed"
        )
    return quantising[0]


def units_of(args: Any, shape: tuple[int, int], module: str) -> tuple[int, int]:
    """How many scales a matrix [out, in] has."""
    rows, columns = shape
    if args.strategy == "tensor":
        return 1, 1
    if args.strategy == "channel":
        return rows, 1
    if args.strategy == "block":
        height, width = args.block_structure
        return math.ceil(rows / height), math.ceil(columns / width)
    if columns % args.group_size:
        raise refused(f"`{module}.weight` has {columns} inputs, which groups of {shown(args.group_size)} do not divide")
    return rows, columns // args.group_size
