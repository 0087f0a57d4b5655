"""Names of modules matched against the patterns of a quantization_config, which may be hostile regular expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peel_agent.load.packed.dequantised import CONFIG, refused, shown

MOST_PATTERNS = 10_000
LONGEST = 400
MOST_REPEATS = 3
"""Repetitions in a pattern: with more, or with nested ones, matching may take time without bound."""

_ESCAPED = re.compile(r"\\[^1-9]")
_REPEAT = re.compile(r"[*+{]")
_NESTED = re.compile(r"\)\s*[*+?{]|\(\?|\\[1-9]")


def check_patterns(value: object, key: str) -> tuple[str, ...]:
    """A list of patterns, or none. Raises CheckpointError for what is no list of texts or too much of it."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and len(item) <= LONGEST for item in value):
        raise refused(f"{CONFIG} has {key} {shown(value)}, which is not a list of names")
    if len(value) > MOST_PATTERNS:
        raise refused(f"{CONFIG} has {len(value):,} entries in {key}, more than {MOST_PATTERNS:,}")
    return tuple(value)


def compiled(pattern: str, key: str, end: str = "") -> re.Pattern[str]:
    """A regular expression that can be matched in bounded time, followed by `end`. Raises CheckpointError otherwise."""
    plain = _ESCAPED.sub("x", pattern)  # `\\\\*` repeats a backslash, `\\*` is a star
    if len(_REPEAT.findall(plain)) > MOST_REPEATS or _NESTED.search(plain):
        raise refused(f"{CONFIG} has the pattern {shown(pattern)} in {key}, with more repetitions than are tried")
    try:
        return re.compile(f"(?:{pattern}){end}")
    except (re.error, OverflowError, RecursionError) as error:
        raise refused(f"{CONFIG} has the pattern {shown(pattern)} in {key}, which does not parse: {error}") from error


class NotConverted:
    """The modules that transformers leaves as they are, by its own rule.

    A pattern counts as a regular expression from the start of the name to the end of one of its parts, or as the
    name's end (transformers.quantizers.quantizers_utils.should_convert_module).
    """

    def __init__(self, patterns: Sequence[str], key: str) -> None:
        self._ends = tuple(patterns)
        self._starts = [compiled(pattern, key, r"(?:(?<=\.)|(?=\.|$))") for pattern in patterns]

    def __contains__(self, name: str) -> bool:
        return name.endswith(self._ends) or any(start.match(name) for start in self._starts)
