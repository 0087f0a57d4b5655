"""`peel-agent doctor` and `peel-agent init`: before a sidecar is started."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from peel_agent.cli.options import add_model, add_probe, probe_flags, say
from peel_agent.errors import ConfigurationError, printable
from peel_agent.records import Check, plain
from peel_agent.signals import Interrupted
from peel_agent.watch import is_url

MARKS = {True: "ok", False: "WRONG", None: "?"}
DEFAULT_FILE = "peel.toml"


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="the watched directory, when no file names it")
    add_probe(parser)
    add_model(parser)
    parser.add_argument("--run-id", metavar="ID", help="as given to `watch`")
    parser.add_argument("--tracking-uri", metavar="URI", help="the tracking server")
    parser.add_argument("--state", metavar="DIR", help="the state folder, as given to `watch`")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from peel_agent.doctor import examine

    flags = probe_flags(options) | {
        "watch.path": options.path,
        "tracker.*.run_id": options.run_id,
        "tracker.*.tracking_uri": options.tracking_uri,
        "state.path": options.state,
    }
    checks: list[Check] = []
    try:
        for check in examine(options.config, flags, now=time.time):
            checks.append(check)
            if not options.json:
                print(_line(check), flush=True)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted after {len(checks)} checks, {_wrong(checks)} wrong; there are more") from None
    wrong = _wrong(checks)
    if options.json:
        print(json.dumps({"ok": not wrong, "checks": [plain(check) for check in checks]}, indent=2))
    else:
        print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def _line(check: Check) -> str:
    remedy = "" if check.remedy is None else f" -> {check.remedy}"
    return f"{MARKS[check.ok]:<6}{check.what}: {check.words}{remedy}"


def _wrong(checks: Sequence[Check]) -> int:
    return sum(check.ok is False for check in checks)


def add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", default=".", metavar="PATH", help="the directory of the checkpoints, or its URL (default: .)"
    )
    parser.add_argument("--out", default=DEFAULT_FILE, metavar="FILE", help=f"default: {DEFAULT_FILE}; - is stdout")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.set_defaults(run=_init)


def _init(options: argparse.Namespace) -> int:
    from peel_agent.doctor import WatchedPlace, configuration_text, watched_place

    out = None if options.out == "-" else Path(options.out)
    if out is not None and out.exists() and not options.force:
        raise _taken(out)
    watched = WatchedPlace(options.path) if is_url(options.path) else watched_place(Path(options.path), time.time())
    text = configuration_text(watched)
    for sentence in watched.sentences:
        say(printable(sentence))
    if out is None:
        print(text, end="", flush=True)
        return 0
    try:
        with out.open("w" if options.force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise _taken(out) from error
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {out}: {error.strerror}", remedy="give --out a file that may be written, or - for stdout"
        ) from error
    say(f"wrote {out}; name the probe in it ([probe] path: held-out tokens of the training data), then")
    say(f"  peel-agent doctor -c {out}")
    return 0


def _taken(out: Path) -> ConfigurationError:
    return ConfigurationError(f"{out} is there already", remedy="give --out another file, or --force to write over it")
