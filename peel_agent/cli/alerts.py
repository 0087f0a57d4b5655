"""`peel-agent alerts`: what fires, whether sinks work, and silence for a while; beside a running sidecar or none."""

from __future__ import annotations

import argparse
import json
import re
import time
from contextlib import closing
from pathlib import Path

from peel_agent.cli.operate import reading
from peel_agent.cli.options import say
from peel_agent.cli.watch import state_folder
from peel_agent.config import load_settings
from peel_agent.deliver import in_words
from peel_agent.destinations import sink_addresses
from peel_agent.errors import ConfigurationError, PeelError, printable
from peel_agent.ledger import Reader, open_beside, silence, unsilence
from peel_agent.notify import group, silenced_by
from peel_agent.records import Notice, RuleState, Silence, plain

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_alerts(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="what fires, what may fire soon, and what is silenced")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=_list)
    test = actions.add_parser("test", help="send a real test notice to every sink")
    test.add_argument("--sink", action="append", metavar="NAME", help="to this one only; may be given again")
    test.set_defaults(run=_test)
    silencing = actions.add_parser("silence", help="tell nothing of some alerts for a while")
    silencing.add_argument("--for", dest="time", required=True, metavar="TIME", help="such as 30m, 8h or 2d")
    for what in ("run", "rule", "subject"):
        words = f"alerts of this {what} (default: any)"
        silencing.add_argument(f"--{what}", dest=f"{what}_glob", default="*", metavar="GLOB", help=words)
    silencing.add_argument("--why", default="", metavar="TEXT", help="for those who come after")
    silencing.set_defaults(run=_silence)
    ending = actions.add_parser("unsilence", help="end silences, by the numbers that `alerts list` shows")
    ending.add_argument("numbers", nargs="+", type=int, metavar="N")
    ending.set_defaults(run=_unsilence)
    for action in (listing, test, silencing, ending):
        action.add_argument("-c", "--config", type=Path, metavar="FILE", help="peel.toml")
        action.add_argument("--path", metavar="DIR", help="the watched directory, when no file names it")
        action.add_argument("--run-id", metavar="ID", help="as given to `watch`")
        action.add_argument("--state", metavar="DIR", help="the state folder, as given to `watch`")


def _list(options: argparse.Namespace) -> int:
    now = time.time()
    with closing(Reader(state_folder(options))) as reader:
        alerts, silences = reading(reader.alerts), reading(lambda: reader.silences(now))
    if options.json:
        form = {"alerts": [{"run": run, **plain(state)} for run, state in alerts], "silences": plain(silences)}
        print(json.dumps(form, indent=2))
        return 0
    for run, state in alerts:
        print(printable(_line(run, state, silenced_by(silences, run, state, now))))
    if not any(state.phase == "firing" for _, state in alerts):
        print("nothing fires")
    for quiet in silences:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(quiet.until))
        why = f": {quiet.why}" if quiet.why else ""
        print(f"silence {quiet.id} until {until}: run {quiet.run}, rule {quiet.rule}, subject {quiet.subject}{why}")
    return 0


def _line(run: str, state: RuleState, held: Silence | None) -> str:
    since = f" since step {state.since_step}" if state.since_step is not None else ""
    silenced = f" (silence {held.id})" if held is not None else ""
    return f"{run}: {state.severity.upper()} {state.phase}{since}{silenced}: {state.rule}: {state.words}"


def _test(options: argparse.Namespace) -> int:
    settings = load_settings(options.config, {"watch.path": options.path})
    wanted = [sink for sink in settings.sinks if options.sink is None or sink.name in options.sink]
    missing = set(options.sink or ()) - {sink.name for sink in wanted}
    if missing or not wanted:
        known = ", ".join(sink.name for sink in settings.sinks)
        raise ConfigurationError(
            f"there is no sink `{min(missing)}`" if missing else "no sink is configured",
            remedy=f"there are: {known}" if known else "add a [[sink]] to the file that is given with -c",
        )
    now = time.time()
    text = "this is a test of peel-agent's notices; nothing is wrong"
    notice = Notice(f"test-{now:.6f}", "test", "info", "firing", "agent", None, text)
    status = 0
    for address in sink_addresses(settings, key="test", place="", state_dir=state_folder(options)):
        if address.name not in [sink.name for sink in wanted]:
            continue
        try:
            with closing(address.sink()) as sink:
                sink.deliver(group([notice], run="test", at=now))
                print(f"sent to {address.name}: {sink.where()}")
        except PeelError as error:
            say(f"{address.name}: {error}")
            status = 1
        except Exception as error:  # a plug-in may raise anything
            say(f"{printable(address.name)} failed: {in_words(error)}")
            status = 1
    return status


def _silence(options: argparse.Namespace) -> int:
    now = time.time()
    until = now + _seconds(options.time)
    globs = {what: printable(getattr(options, f"{what}_glob")) for what in ("run", "rule", "subject")}
    with closing(open_beside(state_folder(options), writing=True)) as database:
        number = reading(lambda: silence(database, **globs, until=until, why=printable(options.why)))
    with closing(Reader(state_folder(options))) as reader:
        alerts = reading(reader.alerts)
    new = Silence(number, **globs, until=until, why="")
    held = sum(state.phase == "firing" and silenced_by([new], run, state, now) is not None for run, state in alerts)
    ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(until))
    print(f"silence {number} until {ends}; `peel-agent alerts unsilence {number}` ends it")
    print(f"alerts that fire now, and that it is for: {held}")
    return 0


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None or not int(match[1]):
        raise ConfigurationError(f"--for is `{text}`", remedy="give a number and a unit: 90s, 30m, 8h or 2d")
    return float(match[1]) * SECONDS[match[2]]


def _unsilence(options: argparse.Namespace) -> int:
    with closing(open_beside(state_folder(options), writing=True)) as database:
        count = reading(lambda: unsilence(database, options.numbers))
    print(f"silences ended: {count}; what still fires is told within a minute where an agent is running")
    if count < len(set(options.numbers)):
        say("not every number is that of a silence\n  -> `peel-agent alerts list` shows those in force")
        return 1
    return 0
