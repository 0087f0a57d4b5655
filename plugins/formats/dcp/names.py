"""Which tensors of a training's state are the model's, and what the model itself calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..files.shared_prefix import shared_prefix

WRAPPERS = (("app", "model"), ("state", "model"), ("state_dict",), ("model",))
"""Where in the state dict trainers put the model: torch's tutorial, Composer, Lightning, everybody else."""

_OTHERS = re.compile(
    r"(?:app\.|state\.)?"
    r"(?:optim|optimizers?|optimizer_states?|lr_schedulers?|scheduler|dataloader|train_state|rng_state\w*)(?:_\d+)?\..*"
    r"|.*\.(?:exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg|acc_delta|grad_avg)"
    r"|(?:optim|optimizer)?\.?(?:state|param_groups)\..*\.(?:step|lr)"
)
_INNER = "embed_tokens.weight"


def model_names(names: Iterable[str], paths: Mapping[str, tuple[object, ...]]) -> dict[str, str]:
    """The model's own name for each stored tensor that is the model's, by stored name.

    `paths` has the place in the nested state dict of each entry for which the checkpoint tells: it says whether
    `model.norm.weight` is `norm.weight` of something under the key `model`, or the model's own name. Without it, a
    prefix that all names share is taken off.
    """
    entries = [name for name in names if not _OTHERS.fullmatch(name)]
    prefix = next((prefix for wrapper in WRAPPERS if (prefix := _proven(wrapper, entries, paths))), None)
    if prefix is not None:
        entries = [name for name in entries if name.startswith(prefix)]
    else:
        prefix = next((prefix for wrapper in WRAPPERS if _shared(prefix := ".".join(wrapper) + ".", entries)), "")
        if prefix + _INNER in entries:
            prefix = ""  # a tied model saved without its head: transformers' own inner module is called `model` too
    prefix += shared_prefix([name.removeprefix(prefix) for name in entries])
    return {name: name.removeprefix(prefix) for name in entries}


def _proven(wrapper: tuple[str, ...], names: Iterable[str], paths: Mapping[str, tuple[object, ...]]) -> str | None:
    prefix = ".".join(wrapper) + "."
    for name in names:
        path = paths.get(name, ())
        if len(path) > len(wrapper) and path[: len(wrapper)] == wrapper and name.startswith(prefix):
            return prefix
    return None


def _shared(prefix: str, names: list[str]) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)
