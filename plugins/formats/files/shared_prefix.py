"""What torch.compile, DistributedDataParallel and Lightning put before every name of a state dict."""

from __future__ import annotations

from collections.abc import Sequence

_LIGHTNING = "model."
_WRAPPERS = ("_orig_mod.", "module.")
_TOP = frozenset({"lm_head", "model", "transformer", *(wrapper[:-1] for wrapper in _WRAPPERS)})


def shared_prefix(names: Sequence[str]) -> str:
    """The wrappers' prefix that all names have, "" for none.

    `model.` is also what most of transformers' own names begin with, all of them where a tied head is not stored. It is
    Lightning's only when what is below it is the top of a model (`model.lm_head`, `model.model`) or a numbered list.
    """
    prefix = ""
    while True:
        rest = [name[len(prefix) :] for name in names]
        parts = {name.removeprefix(_LIGHTNING).split(".")[0] for name in rest}
        on_top = parts & _TOP or all(part.isdecimal() for part in parts)
        wrappers = (*_WRAPPERS, _LIGHTNING) if on_top else _WRAPPERS
        wrapper = next((w for w in wrappers if all(name.startswith(w) and name != w for name in rest)), None)
        if wrapper is None or not names:
            return prefix
        prefix += wrapper
