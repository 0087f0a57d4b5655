"""`peel-agent status` and `peel-agent deliveries`: beside a running sidecar, or a dead one."""

from __future__ import annotations

import argparse
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peel_agent.cli.watch import state_folder
from peel_agent.errors import LedgerError
from peel_agent.figures import FRESH_SECONDS, Standing, standing_of
from peel_agent.ledger import Outbox, open_beside

Answer = TypeVar("Answer")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="the watched directory, when no file names it")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="peel.toml")
    parser.add_argument("--run-id", metavar="ID", help="as given to `watch`")
    parser.add_argument("--state", metavar="DIR", help="the state folder, as given to `watch`")


# ---------------------------------------------------------------- status


def add_status(parser: argparse.ArgumentParser) -> None:
    _add_place(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> int:
    standing = reading(lambda: standing_of(state_folder(options), time.time()))
    print(json.dumps(standing.form(), indent=2) if options.json else _in_words(standing))
    return 0 if standing.is_ready else 1


def reading(do: Callable[[], Answer]) -> Answer:
    try:
        return do()
    except sqlite3.Error as error:
        raise LedgerError(
            f"the ledger cannot be read: {error}", remedy="try again; start the agent, which repairs it"
        ) from error


def _in_words(standing: Standing) -> str:
    """The agent's state for people."""
    lines = [_head(standing)]
    lines += [f"  wrong now: {trouble}" for trouble in standing.troubles]
    if standing.device:
        lines.append(f"device: {standing.device}")
    for run in standing.runs:
        lines += ["", *_run_lines(run)]
    if standing.events:
        lines += ["", "last events"]
        for event in standing.events:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
            lines.append(f"  {at} {event.run or 'agent'}: {event.words}")
    return "\n".join(lines)


def _head(standing: Standing) -> str:
    if not standing.is_running:
        return f"no agent is running on {standing.state_dir}; this is what the last one left"
    if standing.silent_seconds is None:
        return f"an agent has just begun on {standing.state_dir}"
    if standing.silent_seconds > FRESH_SECONDS:
        return f"the agent on {standing.state_dir} has not been heard of for {standing.silent_seconds:.0f} s"
    ready = "ready" if standing.is_ready else "not ready"
    return f"an agent is running on {standing.state_dir} (process {standing.pid}): {ready}"


def _run_lines(run: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{count:.0f} {name.replace('_', ' ')}" for name, count in run["checkpoints"].items() if count)
    lines = [
        f"run {run['name']}: {run['place']}",
        f"  last peeled: step {run['last_step']}" if run["last_step"] is not None else "  nothing peeled yet",
        f"  checkpoints: {counts or 'none found'}",
        f"  in work: {', '.join(run['working']) or 'none'}; waiting: {len(run['waiting'])}"
        + (f", the oldest since {run['lag_seconds']:.0f} s" if run["waiting"] else ""),
    ]
    for alert in run["firing"]:
        since = f" since step {alert['since_step']}" if alert["since_step"] is not None else ""
        lines.append(f"  ALERT firing: {alert['rule']}: {alert['subject']}{since}")
    for lane in run["deliveries"]:
        owed = f"{lane['owed']} owed" + (f", {lane['dead']} given up" if lane["dead"] else "")
        why = f": {lane['why']}" if lane["why"] else ""
        lines.append(f"  {lane['lane']} for {lane['destination']}: {lane['delivered']:.0f} delivered, {owed}{why}")
    return lines


# ---------------------------------------------------------------- deliveries


def add_deliveries(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=("list", "show", "resend"), help="what was given up; one of it; send it again"
    )
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="of these deliveries (default: all)")
    for name in ("--config", "--run-id", "--state", "--path"):
        short = ["-c"] if name == "--config" else []
        parser.add_argument(*short, name, metavar="X", type=Path if name == "--config" else str, help="as for `status`")
    parser.set_defaults(run=_deliveries)


def _deliveries(options: argparse.Namespace) -> int:
    database = open_beside(state_folder(options), writing=options.action == "resend")
    outbox = Outbox(database)
    try:
        return reading(lambda: _act(outbox, options.action, tuple(options.numbers)))
    finally:
        database.close()


def _act(outbox: Outbox, action: str, numbers: tuple[int, ...]) -> int:
    if action == "resend":
        count = outbox.retry(numbers or None)
        print(f"{count} deliveries are sent again, within seconds where an agent is running")
        return 0
    dead = [owed for owed in outbox.dead() if not numbers or owed.id in numbers]
    for owed in dead:
        lane = owed.lane
        print(f"{owed.id}  {lane.run}  {lane.kind} for {lane.destination}  tried {owed.attempts} times: {owed.why}")
        if action == "show":
            print(json.dumps(owed.body, indent=2))
    if not dead:
        print("nothing was given up")
    return 0
