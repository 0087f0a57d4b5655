"""`peel-agent probe`: writes a probe, and checks it against a model."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from peel_agent.cli.options import add_probe_reading, say
from peel_agent.config import load_settings
from peel_agent.errors import ConfigurationError, printable
from peel_agent.watch import Reserve

if TYPE_CHECKING:
    from peel_agent.load import ProbeSizes, Tokens
    from peel_agent.load.probe.tokens import Ids
    from peel_agent.records import Probe, Snapshot

UNKNOWN_CONTEXT = 2**31
LARGEST_ID = 2**32 - 1


def add_probe_maker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="F",
        help="held-out text or token ids: .txt .jsonl .parquet .arrow .bin .npy .safetensors, a folder of `datasets`",
    )
    add_probe_reading(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the probe, a .npy file")
    parser.add_argument("--tokens", type=int, metavar="N", help="write the first N tokens (default: what a peel uses)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="S", help="write sequences of so many tokens (default: as they come)"
    )
    parser.add_argument("--model", metavar="CKPT", help="a checkpoint of the model, to check the probe against")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.set_defaults(run=_probe)


def _probe(options: argparse.Namespace) -> int:
    _check(options)
    from peel_agent.load import ProbeSizes, check_vocabulary, cut, split
    from peel_agent.worker import quiet_libraries

    sizes, source = ProbeSizes(sequence_length=options.sequence_length), options.source
    with quiet_libraries(), ExitStack() as places:
        snapshot = None if options.model is None else _snapshot(options.model, places)
        context = UNKNOWN_CONTEXT if snapshot is None else snapshot.context
        written, ids = _first(_read(options, sizes, snapshot, context), options, sizes, context)
        vocabulary = LARGEST_ID + 1 if snapshot is None else snapshot.vocabulary
        sequences, used = cut(written, source, sizes, context)
        probe = split(sequences, used, source, sizes, vocabulary)
        check_vocabulary(ids, source, vocabulary)
    _write(options.out, ids, force=options.force)
    for left_out in probe.left_out:
        say(printable(f"left out: {left_out.what}: {left_out.why}"))
    print(printable(_words(options.out, ids, probe, snapshot)))
    return 0


def _check(options: argparse.Namespace) -> None:
    out: Path = options.out
    if out.suffix != ".npy":
        raise ConfigurationError(f"{out} does not end in .npy", remedy="give --out a name such as heldout.npy")
    if out.exists() and not options.force:
        raise _taken(out)
    if options.tokens is not None and options.tokens < 1:
        raise ConfigurationError(f"--tokens is {options.tokens}", remedy="it must be 1 or more")


def _snapshot(model: str, places: ExitStack) -> Snapshot:
    from peel_agent import registry
    from peel_agent.load import open_snapshot
    from peel_agent.pipeline import located

    reserve = Reserve(load_settings(None, {}).watch.keep_free_gb)  # of the environment: the command takes no file
    ref = places.enter_context(located(model, reserve=reserve))
    (form,) = registry.formats(ref.format)
    return open_snapshot(ref, form, registry.family)


def _read(options: argparse.Namespace, sizes: ProbeSizes, snapshot: Snapshot | None, context: int) -> Tokens:
    from peel_agent.load import read_tokens

    tokenizer = None if options.tokenizer is None else Path(options.tokenizer)
    if tokenizer is None and snapshot is not None:
        place = snapshot.ref.path
        tokenizer = (place if place.is_dir() else place.parent) / "tokenizer.json"
    return read_tokens(
        options.source,
        vocabulary=None if snapshot is None else snapshot.vocabulary,
        tokenizer=tokenizer,
        dtype=options.dtype,
        text_key=options.text_key or "text",
        limit=2 * _count(options, sizes, sizes.cut_length(context)),  # half of a text of pieces may be left out
    )


def _count(options: argparse.Namespace, sizes: ProbeSizes, length: int) -> int:
    """Tokens to write: those asked for, or what a peel uses in sequences of this length."""
    wanted: int | None = options.tokens
    return sizes.tokens(length) if wanted is None else wanted


def _first(tokens: Tokens, options: argparse.Namespace, sizes: ProbeSizes, context: int) -> tuple[Tokens, Ids]:
    """The tokens to write, and their ids: a stream [T] as it is, all else, or at the user's wish, sequences [N, S]."""
    from peel_agent.load import Tokens, cut

    stream = tokens.stream
    if stream is not None and sizes.sequence_length is None:
        ids = stream[: _count(options, sizes, sizes.cut_length(context))]
        return Tokens(ids, tokens.left_out), ids
    sequences, used = cut(tokens, options.source, sizes, context)
    length = int(sequences.shape[1])
    ids = sequences[: max(1, _count(options, sizes, length) // length)]
    return Tokens(ids, used.left_out), ids


def _write(out: Path, ids: Ids, *, force: bool) -> None:
    """The file whole, or not at all; never over one that is there, unless that is asked for."""
    import numpy as np

    narrow = ids.astype(np.uint16 if int(ids.max()) <= np.iinfo(np.uint16).max else np.uint32)
    try:
        with NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as file:
            part = Path(file.name)
            try:
                np.save(file, narrow)
                file.flush()
                os.fsync(file.fileno())
                part.chmod(0o644)
                _put(part, out, force=force)
            finally:
                part.unlink(missing_ok=True)
    except FileExistsError as error:
        raise _taken(out) from error
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {out}: {error.strerror}", remedy="give --out a file in a folder that may be written"
        ) from error


def _put(part: Path, out: Path, *, force: bool) -> None:
    if force:
        part.replace(out)
        return
    try:
        os.link(part, out)  # unlike a rename it fails when somebody else was faster
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if out.exists():
            raise
        part.replace(out)


def _taken(out: Path) -> ConfigurationError:
    return ConfigurationError(f"{out} is there already", remedy="give --out another file, or --force to write over it")


def _words(out: Path, ids: Ids, probe: Probe, snapshot: Snapshot | None) -> str:
    fit, select, confirm = (len(part) for part in (probe.fit, probe.select, probe.confirm))
    used = (fit + select + confirm) * probe.sequence_length
    against = "held against no model (--model CKPT)"
    if snapshot is not None:
        against = f"they suit {snapshot.family}, vocabulary {snapshot.vocabulary:,}, context {snapshot.context:,}"
    rows = f" in {len(ids):,} sequences of {ids.shape[1]:,}" if ids.ndim > 1 else ""
    return (
        f"wrote {out}: {ids.size:,} token ids{rows}; a peel uses {used:,} of them in "
        f"sequences of {probe.sequence_length:,}: {fit} to fit, {select} to select, {confirm} to confirm; {against}"
    )
