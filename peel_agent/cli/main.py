"""The command line: parsing, output and exit codes."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from peel_agent.cli.alerts import add_alerts
from peel_agent.cli.compare import add_compare
from peel_agent.cli.operate import add_deliveries, add_status
from peel_agent.cli.options import say
from peel_agent.cli.probe import add_probe_maker
from peel_agent.cli.report import add_report
from peel_agent.cli.scan import add_scan, add_witness
from peel_agent.cli.setup import add_doctor, add_init
from peel_agent.cli.watch import add_watch
from peel_agent.config import load_settings
from peel_agent.errors import PeelError
from peel_agent.signals import Interrupted, exit_status, interruptible


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, that of the process itself without `arguments`; the exit status is the contract's.

    Ctrl-C ends it with status 130 and one sentence, which says what is kept.
    """
    with interruptible(to_the_end=arguments is None) as interruption:
        words = "interrupted"
        try:
            status = _run(arguments)
            if interruption.number is None:
                return status
        except Interrupted as interrupted:
            words = interrupted.words
        except BaseException as error:  # a library may make anything of an interrupt
            if interruption.number is None or isinstance(error, SystemExit):
                raise
        say(f"peel-agent: {words}")
        return exit_status(signal.SIGINT)


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except PeelError as error:
        say(f"peel-agent: {error}")
        return error.exit_code
    except BrokenPipeError:
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peel-agent",
        description="Peels the checkpoints of a transformer training: which block earns less than a cheap stand-in, "
        "and is the run still worse than something cheap built from its own layers?",
    )
    parser.add_argument("--version", action="version", version=f"peel-agent {version('peel-agent')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_watch(commands.add_parser("watch", help="the sidecar: peel every checkpoint that a run writes"))
    add_scan(commands.add_parser("scan", help="peel checkpoints once, without a tracker"))
    add_witness(commands.add_parser("witness", help="write a better block's weights, and prove them"))
    add_compare(commands.add_parser("compare", help="two checkpoints or two runs on one probe: what differs, how sure"))
    add_report(commands.add_parser("report", help="a run's history as a page in one file"))
    add_status(commands.add_parser("status", help="what the sidecar is doing, and whether all is well"))
    add_alerts(commands.add_parser("alerts", help="what fires, a test of the sinks, silence for a while"))
    add_deliveries(commands.add_parser("deliveries", help="what could not be sent, and sending it again"))
    add_doctor(commands.add_parser("doctor", help="look at everything that a run needs, before it is needed"))
    add_init(commands.add_parser("init", help="write a commented configuration from what is found"))
    add_probe_maker(commands.add_parser("probe", help="write a probe of held-out text or tokens, and check its size"))
    _add_demo(commands.add_parser("demo", help="a real small training with a block held back, and the sidecar on it"))
    plugins = commands.add_parser("plugins", help="every plug-in by kind, and whether it can be used")
    plugins.set_defaults(run=_plugins)
    return parser


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
    from peel_agent.registry import installed
    from peel_agent.spi import KINDS

    plugins = installed()
    for kind in KINDS:
        print(kind)
        of_kind = [listing for listing in plugins if listing.kind == kind]
        for listing in of_kind:
            state = "usable" if listing.problem is None else f"not usable: {listing.problem}"
            print(f"  {listing.name:<14} {listing.source:<60} {state}")
        if not of_kind:
            print("  (none installed)")
    return 0
