"""Text to token ids, with the tokenizer of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np

from peel_agent.errors import ProbeError
from peel_agent.records import TokenIds

Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Text to token ids."""

_FAST, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_SLOW = ("tokenizer.model", "spiece.model", "vocab.json")
"""What transformers makes a tokenizer from, where there is no tokenizer.json."""
_BESIDE = ("merges.txt", "special_tokens_map.json", "added_tokens.json")

_LIBRARY = 'pip install "peel-agent[sentencepiece]"'
_SAVE_FAST = (
    "save a tokenizer.json where transformers can load it: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
_NAME_ONE = "give --tokenizer the model's tokenizer.json or tokenizer.model, or a probe of token ids (.npy)"


def tokenised(texts: Iterable[str], path: Path, tokenizer: Path | None, limit: int) -> TokenIds:
    """Token ids [T] of the texts of `path`, one after another, at most about `limit`.

    `tokenizer` is a tokenizer.json of the tokenizers library, a tokenizer.model of sentencepiece, or a folder with one
    of them. Raises ProbeError.
    """
    encode = open_tokenizer(tokenizer, path)
    ids: list[int] = []
    for text in texts:
        try:
            ids.extend(encode(text))
        except Exception as error:  # the libraries raise nothing narrower
            raise ProbeError(
                f"the tokenizer cannot encode a text of {path.name}: {error}",
                remedy="give the tokenizer of the model that was trained on such text, whole as it was saved",
            ) from error
        if len(ids) >= limit:
            break
    if not ids:
        raise ProbeError(f"{path} holds no text", remedy="give a file with held-out text of the training distribution")
    return np.asarray(ids, dtype=np.int64)


def open_tokenizer(place: Path | None, path: Path) -> Encode:
    """What the tokenizer at `place` makes of a text of `path`; it neither cuts nor pads.

    A tokenizer.model is read as transformers reads it, by the class that tokenizer_config.json beside it names, or else
    by sentencepiece itself.
    """
    if place is None:
        raise ProbeError(f"{path.name} is text, and there is no tokenizer", remedy=_NAME_ONE)
    folder = place if place.is_dir() else place.parent
    is_unnamed = place.is_dir() or (place.name == _FAST and not place.exists())
    if place.is_file() and place.suffix == ".json" and place.name not in _SLOW:
        return _fast(place)
    if place.is_dir() and (folder / _FAST).is_file():
        return _fast(folder / _FAST)
    older = [folder / name for name in _SLOW if (folder / name).is_file()] if is_unnamed else [place]
    if not older or not older[0].is_file():
        raise ProbeError(f"{path.name} is text, and there is no tokenizer at {place}", remedy=_NAME_ONE)
    if older[0].suffix == ".model" and not (folder / _CONFIG).is_file():
        return _of_sentencepiece(older[0])
    return _converted(older[0])


def _fast(file: Path) -> Encode:
    from tokenizers import Tokenizer

    try:
        return _whole(Tokenizer.from_file(str(file)))
    except Exception as error:  # the library raises nothing narrower
        raise ProbeError(f"{file} cannot be read as a tokenizer: {error}", remedy="save it again") from error


def _whole(tokenizer: Any) -> Encode:
    tokenizer.no_truncation()  # a tokenizer is saved with what its last user set
    tokenizer.no_padding()

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text).ids
        return ids

    return encode


def _of_sentencepiece(file: Path) -> Encode:
    try:
        from sentencepiece import SentencePieceProcessor

        encode: Encode = SentencePieceProcessor(model_file=str(file)).encode
    except ImportError as error:
        raise ProbeError(f"{file} needs sentencepiece", remedy=_LIBRARY) from error
    except (RuntimeError, OSError) as error:
        raise ProbeError(f"{file} cannot be read by sentencepiece: {error}", remedy=_SAVE_FAST) from error
    return encode


def _converted(file: Path) -> Encode:
    """What transformers makes of an older tokenizer: from a copy of its plain data, without code, without network."""
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="peel-agent-") as copy:
        _copy_data(file, Path(copy))
        try:
            tokenizer = AutoTokenizer.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
            return _whole(tokenizer.backend_tokenizer)
        except Exception as error:  # a library that is missing, a file that is damaged, a class that is not known
            raise ProbeError(
                f"transformers makes no tokenizer of {file}: {type(error).__name__}: {error}",
                remedy=f"{_LIBRARY}; {_SAVE_FAST}" if file.suffix == ".model" else _SAVE_FAST,
            ) from error


def _copy_data(file: Path, copy: Path) -> None:
    """The tokenizer's own files; of the settings what names a class of transformers and its tokens, never code."""
    shutil.copyfile(file, copy / (file.name if file.name in _SLOW else _SLOW[0]))
    for name in _BESIDE:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, copy / name)
    for name in (_CONFIG, "config.json"):
        try:
            form = json.loads((file.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(form, dict):
            kept = {key: value for key, value in form.items() if key not in ("auto_map", "tokenizer_file")}
            kept = kept if name == _CONFIG else {"model_type": form.get("model_type")}
            (copy / name).write_text(json.dumps(kept), encoding="utf-8")
