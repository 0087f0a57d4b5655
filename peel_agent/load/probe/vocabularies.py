"""Whether two tokenizers mean the same by every token id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peel_agent.errors import printable


def difference_of_vocabularies(a: Path, b: Path) -> str | None:
    """The first token id that means something else in the tokenizer.json `b` than in `a`, in words; None for none.

    ValueError for a file that cannot be read as a tokenizer.
    """
    if a.read_bytes() == b.read_bytes():
        return None
    one, other = _tokens(a), _tokens(b)
    ids = [index for index in sorted(one.keys() | other.keys()) if one.get(index) != other.get(index)]
    if not ids:
        return None
    first = ids[0]
    words = [f"`{tokens[first]}`" if first in tokens else "no token" for tokens in (one, other)]
    return printable(f"token id {first} is {words[0]} in the first and {words[1]} in the second, one of {len(ids):,}")


def _tokens(file: Path) -> Mapping[int, str]:
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
    return {index: token for token, index in vocabulary.items()}
