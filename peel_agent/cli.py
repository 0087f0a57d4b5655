"""The command line: parsing, output and exit codes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from peel_agent.config import Settings, default_state_dir, load_settings
from peel_agent.errors import ConfigurationError, PeelError, ProbeError
from peel_agent.pipeline import plan_of
from peel_agent.publish import Meter
from peel_agent.records import FindingKind, PeelReport
from peel_agent.watch import is_url


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is the contract's."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except PeelError as error:
        say(f"peel-agent: {error}")
        return error.exit_code
    except BrokenPipeError:
        return 0
    return status


def say(line: str) -> None:
    """A line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peel-agent",
        description="Peels the checkpoints of a transformer training: which block earns less than a cheap stand-in, "
        "and is the run still worse than something cheap built from its own layers?",
    )
    parser.add_argument("--version", action="version", version=f"peel-agent {version('peel-agent')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_watch(commands.add_parser("watch", help="the sidecar: peel every checkpoint that a run writes"))
    _add_scan(commands.add_parser("scan", help="peel checkpoints once, without a tracker"))
    _add_witness(commands.add_parser("witness", help="write a better block's weights, and prove them"))
    _add_demo(commands.add_parser("demo", help="a real small training with a block held back, and the sidecar on it"))
    plugins = commands.add_parser("plugins", help="every plug-in by kind, and whether it can be used")
    plugins.set_defaults(run=_plugins)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_probe(parser)
    parser.add_argument(
        "--effort", choices=("quick", "standard", "full"), help="how much to compute (default: standard)"
    )
    parser.add_argument(
        "--quantities", metavar="LIST", help="of margin,bounds,headroom,redundancy (default: by effort)"
    )
    parser.add_argument(
        "--maps", metavar="SUITE", help="direct, ends, paper, or lists such as [[1,4],[2,4]] (default: ends)"
    )
    parser.add_argument("--solver", metavar="NAME", help="closed_form (default), descent, or descent_cold")
    _add_model(parser)


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="peel.toml")
    parser.add_argument(
        "--probe", metavar="FILE", help="held-out token ids (.npy .bin .safetensors) or text (.txt ...)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json for a text probe (default: the checkpoint's)"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens a sequence (default: min(context, 1024))"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="GLOB=SET",
        help="weights that hold low-bit latents, e.g. 'model.layers.*_proj.weight=ternary' (repeatable)",
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda:N or a GPU uuid that the training does not use")


def _common_flags(options: argparse.Namespace) -> dict[str, Any]:
    maps = options.maps
    if maps is not None and maps.startswith("["):
        try:
            maps = json.loads(maps)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"--maps is {maps!r}: {error}", remedy="write it like [[1,4],[2,4]]") from error
    return _probe_flags(options) | {
        "peel.effort": options.effort,
        "peel.quantities": options.quantities,
        "peel.maps": maps,
        "peel.solver": options.solver,
    }


def _probe_flags(options: argparse.Namespace) -> dict[str, Any]:
    precision = dict(entry.rpartition("=")[::2] for entry in options.precision)
    if "" in precision:
        raise ConfigurationError(
            f"--precision is `{precision['']}`", remedy="write it as GLOB=SET: 'model.layers.*_proj.weight=ternary'"
        )
    return {
        "probe.path": options.probe,
        "probe.tokenizer": options.tokenizer,
        "probe.sequence_length": options.sequence_length,
        "model.precision": precision or None,
        "device.select": options.device,
    }


# ---------------------------------------------------------------- watch


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="the directory that the training writes checkpoints to, or its s3:// URL",
    )
    _add_common(parser)
    parser.add_argument("--run-id", metavar="ID", help="MLflow run to write into (default: found, else a new one)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow tracking server")
    parser.add_argument("--state", metavar="DIR", help="where findings are kept (default: beneath ~/.local/state)")
    parser.add_argument("--once", action="store_true", help="peel everything complete that is there now, then exit")
    parser.add_argument("--json", action="store_true", help="each report as one line of JSON on stdout")
    parser.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> int:
    from peel_agent.daemon import Daemon
    from peel_agent.ledger import Ledger

    flags = _common_flags(options) | {
        "watch.path": options.path,
        "tracker.mlflow.run_id": options.run_id,
        "tracker.mlflow.tracking_uri": options.tracking_uri,
        "state.path": options.state,
    }
    settings = load_settings(options.config, flags)
    root = _watched(settings)
    _check_probe(settings)
    ledger = Ledger(settings.state.path or default_state_dir(root, settings.tracker))
    emit = (lambda line: print(line, flush=True)) if options.json else None
    try:
        return Daemon(root, settings, ledger, say=say, emit=emit).run(once=options.once)
    finally:
        ledger.close()


def _watched(settings: Settings) -> str:
    """The absolute path of the directory, or the URL of the folder in an object store."""
    place = settings.watch.path
    if place is None:
        raise ConfigurationError(
            "there is no directory to watch", remedy="give it: peel-agent watch PATH, or [watch] path in peel.toml"
        )
    if is_url(place):
        return place
    path = Path(place).expanduser()
    if not path.is_dir():
        raise ConfigurationError(
            f"{path} is no directory", remedy="give the directory that the training writes its checkpoints to"
        )
    return str(path.resolve())


def _check_probe(settings: Settings) -> None:
    """Told at once, not when the first checkpoint has come."""
    path = settings.probe.path
    remedy = "give --probe FILE with held-out token ids (.npy, .bin, .safetensors) or text of the training distribution"
    if path is None:
        raise ProbeError("no probe is named", remedy=remedy)
    if not path.is_file():
        raise ProbeError(f"no probe at {path}", remedy=remedy)


# ---------------------------------------------------------------- scan


def _add_scan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a checkpoint folder or file, or its s3:// URL")
    _add_common(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="json: one report a line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    parser.add_argument("--since", metavar="CKPT", help="an earlier checkpoint of the run, to hold each one against")
    parser.add_argument("--fail-on", choices=tuple(NEEDED), help="exit 1 when a report says so of a block, part or run")
    parser.set_defaults(run=_scan)


def _scan(options: argparse.Namespace) -> int:
    settings = load_settings(options.config, _common_flags(options))
    _check_probe(settings)
    _check_fail_on(settings, options.fail_on, options.since)
    from peel_agent.pipeline import scan
    from peel_agent.publish import report_line, table
    from peel_agent.worker import quiet_libraries

    form = report_line if options.format == "json" else table
    status = 0
    with _output(options.out) as output:
        for path in options.checkpoints:
            meter = _meter()
            try:
                with quiet_libraries():
                    report = scan(
                        path,
                        probe=settings.probe,
                        peeling=settings.peel,
                        model=settings.model,
                        device=settings.device.in_process,
                        since=options.since,
                        clock=time.perf_counter,
                        progress=meter,
                    )
            except PeelError as error:
                say(f"peel-agent: {error}")
                status = max(status, error.exit_code)
                continue
            finally:
                meter.close()
            print(form(report), file=output, flush=True)
            status = max(status, int(_fails(report, options.fail_on)))
    return status


def _meter() -> Meter:
    """Progress on stderr: a bar on a terminal, lines otherwise."""
    return Meter(sys.stderr.write, time.monotonic, terminal=sys.stderr.isatty())


def _output(file: Path | None) -> AbstractContextManager[TextIO]:
    """The file, opened before anything is computed, or stdout."""
    if file is None:
        return nullcontext(sys.stdout)
    try:
        return file.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {file}: {error.strerror}", remedy="check the path of --out"
        ) from error


NEEDED = {
    "below": "margin",
    "changed": "margin",
    "regressed": "margin",
    "improvable": "headroom",
    "caution": "bounds",
}
"""What must be computed for each condition of --fail-on."""

FAILING: dict[str, frozenset[FindingKind]] = {
    "below": frozenset({"below", "never_trained", "dead", "dropped", "flooding", "early", "collapsed"}),
    "changed": frozenset({"changed"}),
    "regressed": frozenset({"regressed"}),
}
"""The findings that meet each condition."""


def _check_fail_on(settings: Settings, what: str | None, since: str | None) -> None:
    """A condition on something that is not computed would never be met."""
    if what is None:
        return
    needed = NEEDED[what]
    if needed not in plan_of(settings.peel).quantities:
        raise ConfigurationError(
            f"--fail-on {what} needs {needed}, which this scan does not compute",
            remedy=f"add --quantities {needed}, or take a larger --effort",
        )
    if what in ("changed", "regressed") and since is None:
        raise ConfigurationError(
            f"--fail-on {what} needs an earlier checkpoint to compare with",
            remedy="add --since with an earlier checkpoint of the run",
        )


def _fails(report: PeelReport, what: str | None) -> bool:
    if what == "improvable":
        return any(layer.headroom is not None and layer.headroom.low > 0.0 for layer in report.layers)
    findings = [report.finding, *(layer.finding for layer in report.layers)]
    if what in FAILING:
        return any(finding is not None and finding.kind in FAILING[what] for finding in findings)
    return what is not None and report.zone == what


# ---------------------------------------------------------------- witness


def _add_witness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint folder or file, or its s3:// URL")
    _add_probe(parser)
    _add_model(parser)
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="the block's index, from 0")
    parser.add_argument(
        "--from",
        dest="earlier",
        metavar="CKPT",
        help="an earlier checkpoint of the run, whose block is taken as the better one",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the patch, a .safetensors file")
    parser.set_defaults(run=_witness)


def _witness(options: argparse.Namespace) -> int:
    settings = load_settings(options.config, _probe_flags(options))
    _check_probe(settings)
    from peel_agent.witness import witness
    from peel_agent.worker import quiet_libraries

    meter = _meter()
    try:
        with quiet_libraries():
            proven = witness(
                options.checkpoint,
                layer=options.layer,
                out=options.out,
                probe=settings.probe,
                model=settings.model,
                device=settings.device.in_process,
                clock=time.perf_counter,
                earlier=options.earlier,
                progress=meter,
            )
    finally:
        meter.close()
    print(f"loss as trained     {proven.trained} nats per token, on held-out tokens of the probe")
    print(f"loss with the patch {proven.patched}, measured again from {options.out} in a fresh process")
    what = "headroom" if options.earlier is None else "won"
    print(f"{what:<19} {proven.headroom}, paired by sequence")
    print(f"in the patch: {', '.join(proven.names)}")
    return 0


# ---------------------------------------------------------------- demo, plugins


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="where everything is kept (default: a new folder in /tmp)"
    )
    parser.add_argument("--healthy", action="store_true", help="hold no block back")
    parser.add_argument("--bits", metavar="SET", help="train low-bit: ternary, sign, int4-channel, ...")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from peel_agent.demo import run_demo

    if options.bits is not None:
        load_settings(None, {"model.precision": {"*": options.bits}})  # a set that there is none of is told at once
    return run_demo(options.keep, healthy=options.healthy, bits=options.bits)


def _plugins(_options: argparse.Namespace) -> int:
    from peel_agent.registry import listings
    from peel_agent.spi import KINDS

    found = listings()
    for kind in KINDS:
        print(kind)
        own = [listing for listing in found if listing.kind == kind]
        for listing in own:
            state = "usable" if listing.problem is None else f"not usable: {listing.problem}"
            print(f"  {listing.name:<14} {listing.source:<60} {state}")
        if not own:
            print("  (none installed)")
    return 0
