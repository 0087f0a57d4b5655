"""Documents of a text probe, read one by one."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from peel_agent.errors import ProbeError

_PIECE_CHARACTERS = 1_000_000
"""A long text is tokenised in pieces of about so many characters, cut between lines."""

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of what is not UTF-8; that of UTF-32 begins as that of UTF-16 does."""

_ENCODING = "utf-8-sig"
"""UTF-8; a byte order mark before it is passed over."""


def documents(path: Path, text_key: str) -> Iterator[str]:
    """The documents of a .txt or .jsonl file in UTF-8; ProbeError names the line of what is no text."""
    _refuse_others(path)
    try:
        yield from _json_lines(path, text_key) if path.suffix.lower() == ".jsonl" else _pieces(path)
    except UnicodeError as error:
        raise _undecodable(path) from error


def checked(text: str, path: Path, where: str) -> str:
    """The text; ProbeError when it holds what no text holds."""
    if "\0" in text:
        raise ProbeError(
            f"{path} {where} holds NUL characters: it is no text, or UTF-16 without a byte order mark",
            remedy="convert it: iconv -f UTF-16 -t UTF-8",
        )
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ProbeError(
            f"{path} {where} holds half of a surrogate pair, which is no character",
            remedy="write it again as UTF-8, or take that document out",
        )
    return text


def _pieces(path: Path) -> Iterator[str]:
    read = 0
    with path.open(encoding=_ENCODING) as file:
        while piece := "".join(file.readlines(_PIECE_CHARACTERS)):
            yield checked(piece, path, f"after line {read}")
            read += piece.count("\n")


def _json_lines(path: Path, text_key: str) -> Iterator[str]:
    with path.open(encoding=_ENCODING) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                text = _text_of(line, path, number, text_key)
                if text is not None:
                    yield text


def _text_of(line: str, path: Path, number: int, text_key: str) -> str | None:
    try:
        form = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProbeError(
            f"{path} line {number} is no JSON", remedy=f'each line looks like {{"{text_key}": "..."}}'
        ) from error
    if not isinstance(form, dict) or text_key not in form:
        there = f"it has {', '.join(list(form)[:6])}" if isinstance(form, dict) and form else "it has none"
        raise ProbeError(
            f"{path} line {number} is no JSON object with a key `{text_key}` ({there})",
            remedy="name the key of the text with --text-key, or [probe] text_key",
        )
    text = form[text_key]
    return None if text is None else checked(string(text, path, f"line {number}", text_key), path, f"line {number}")


def string(value: object, path: Path, where: str, text_key: str) -> str:
    """The value; ProbeError when it is no string."""
    if not isinstance(value, str):
        kinds = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
        kind = kinds.get(type(value), f"a {type(value).__name__}")
        raise ProbeError(
            f"{path} {where} has {kind} under `{text_key}`, and no string",
            remedy="write the plain text there, or name another key with --text-key",
        )
    return value


def _refuse_others(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
    for mark, encoding in _OTHER_MARKS.items():
        if head.startswith(mark):
            raise ProbeError(
                f"{path} is {encoding}, by its byte order mark",
                remedy=f"convert it to UTF-8: iconv -f {encoding} -t UTF-8",
            )


def _undecodable(path: Path) -> ProbeError:
    """Says which line does not decode."""
    where = "in some line"
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeError as error:
                where = f"in line {number}: {error}"
                break
    return ProbeError(
        f"{path} is not UTF-8 {where}", remedy="convert it to UTF-8, for example: iconv -f LATIN1 -t UTF-8"
    )
