"""Flags that several commands share, and the settings that they stand for."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peel_agent.config import DeviceSettings, see_only, visible_gpus
from peel_agent.devices import device_for
from peel_agent.errors import ConfigurationError, ProbeError
from peel_agent.publish import Meter
from peel_agent.records import ID_DTYPES, ProbeSettings
from peel_agent.worker import stay_second


def say(line: str) -> None:
    """A line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def meter() -> Meter:
    """Progress on stderr: a bar on a terminal, lines otherwise."""
    return Meter.on(sys.stderr, time.monotonic)


def own_device(settings: DeviceSettings) -> str:
    """The device of a command that computes in this process, which then sees no other, and lets a training be first."""
    lease = device_for(settings.select, visible_gpus())
    see_only(lease.visible)
    try:
        stay_second(settings.nice, settings.memory_fraction, lease.name)
    except (AssertionError, RuntimeError) as error:  # what torch raises of a device that it cannot use
        raise ConfigurationError(
            f"the device {lease.label} cannot be used: {error}", remedy="name another one, or use --device cpu"
        ) from error
    return lease.name


def add_common(parser: argparse.ArgumentParser) -> None:
    add_probe(parser)
    add_effort(parser)
    parser.add_argument(
        "--quantities", metavar="LIST", help="of margin,bounds,headroom,redundancy (default: by effort)"
    )
    parser.add_argument(
        "--maps", metavar="SUITE", help="direct, ends, paper, or lists such as [[1,4],[2,4]] (default: ends)"
    )
    parser.add_argument("--solver", metavar="NAME", help="closed_form (default), descent, or descent_cold")
    add_model(parser)


def add_effort(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--effort", choices=("quick", "standard", "full"), help="how much to compute (default: standard)"
    )


def add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="peel.toml")
    parser.add_argument(
        "--probe", metavar="FILE", help="held-out token ids (.npy .bin .safetensors) or text (.txt ...)"
    )
    add_probe_reading(parser)
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens a sequence (default: min(context, 1024))"
    )


def add_probe_reading(parser: argparse.ArgumentParser) -> None:
    """How a file of tokens or text is read."""
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json or tokenizer.model for text (default: the checkpoint's)"
    )
    parser.add_argument("--text-key", metavar="K", help="the key or column that the text is in (default: text)")
    parser.add_argument(
        "--dtype", choices=ID_DTYPES, help="of ids in a file without a header (default: what its content shows)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="GLOB=SET",
        help="weights or modules that hold low-bit latents, e.g. 'model.layers.*_proj.weight=ternary' (repeatable)",
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda:N or a GPU uuid that the training does not use")


def common_flags(options: argparse.Namespace) -> dict[str, Any]:
    maps = options.maps
    if maps is not None and maps.startswith("["):
        try:
            maps = json.loads(maps)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"--maps is {maps!r}: {error}", remedy="write it like [[1,4],[2,4]]") from error
    return probe_flags(options) | {
        "peel.effort": options.effort,
        "peel.quantities": options.quantities,
        "peel.maps": maps,
        "peel.solver": options.solver,
    }


def command_again(words: Sequence[str], named: Iterable[tuple[str, object]]) -> str:
    """A `peel-agent` command for people to repeat, with these options as far as they are given.

    An option that was repeated is a list; no user and password of an address is shown.
    """
    given = [
        text
        for flag, value in named
        for entry in (value if isinstance(value, list) else [value])
        if entry
        for text in (flag, re.sub(r"://[^/@\s]*@", "://", str(entry)))
    ]
    return shlex.join(["peel-agent", *words, *given])


def probe_flags(options: argparse.Namespace) -> dict[str, Any]:
    precision = dict(entry.rpartition("=")[::2] for entry in options.precision)
    if "" in precision:
        raise ConfigurationError(
            f"--precision is `{precision['']}`", remedy="write it as GLOB=SET: 'model.layers.*_proj.weight=ternary'"
        )
    return {
        "probe.path": options.probe,
        "probe.tokenizer": options.tokenizer,
        "probe.sequence_length": options.sequence_length,
        "probe.text_key": options.text_key,
        "probe.dtype": options.dtype,
        "model.precision": precision or None,
        "device.select": options.device,
    }


def check_probe(probe: ProbeSettings) -> None:
    """Told at once, not when the first checkpoint has come."""
    path = probe.path
    kinds = "held-out token ids (.npy, .bin, .safetensors) or text of the training distribution"
    makes = "`peel-agent probe` makes one of text"
    if path is None:
        raise ProbeError("no probe is named", remedy=f"give --probe FILE with {kinds}; {makes}")
    if not path.exists():
        raise ProbeError(f"no probe at {path}", remedy=f"check the path: it must be a file of {kinds}; {makes}")
