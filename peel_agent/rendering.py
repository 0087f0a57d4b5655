"""A run's page and images, made of its ledger by a child process of the courier: an order in JSON on stdin, what was
made in JSON on stdout.

What draws takes 200 MB, and may hang or die of what it is given: neither concerns what else is to be sent. It runs at
the lowest priority, and its memory is given back when it ends.
"""

from __future__ import annotations

import json
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peel_agent.errors import ConfigurationError, DestinationDenied, DestinationUnavailable, NoReport
from peel_agent.ledger import Extent, kept_run_of
from peel_agent.records import History, Pages, PeelReport, plain, restored
from peel_agent.worker import be_ended_first, end_with_parent, give_way, quiet_libraries

if TYPE_CHECKING:
    from peel_agent.views import Provenance

REPORT_FILE = "peel/report.html"

MARGINS, REDUNDANCY = "peel/margins", "peel/redundancy"
"""The series of heat maps; the newest of each is a file too."""

MOST_REPORTS = 400
"""Checkpoints that a page is made of, so that the last of a long run costs no more than one in the middle."""

MOST_SECONDS = 600
"""A child that has not made the page by then is ended."""

NICENESS = 19


@dataclass(frozen=True)
class Order:
    """What is to be made: of the run of this key, up to `extent`, into `folder`, which is empty."""

    state_dir: Path
    run: str
    extent: Extent
    folder: Path


@dataclass(frozen=True)
class Answer:
    """What came of it: the pages, or what was wrong and what to do about it."""

    pages: Pages | None = None
    lacks: tuple[str, ...] = field(default_factory=tuple)


def pages(order: Order) -> Pages | None:
    """The pages, made by a child process; None where there is nothing to show.

    Raises DestinationDenied when something is not installed, DestinationUnavailable for a child that ended.
    """
    child = subprocess.run(
        [sys.executable, "-P", "-m", "peel_agent.rendering"],
        input=json.dumps(plain(order)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise DestinationUnavailable(
            f"the page of the run could not be made: what makes it ended with status {child.returncode}",
            remedy="its last words are in the log above; it is tried again; [tracker] report = false turns it off",
        )
    answer = restored(Answer, json.loads(child.stdout))
    if answer.lacks:
        raise DestinationDenied(answer.lacks[0], remedy=answer.lacks[1])
    return answer.pages


def is_kept(count: int) -> bool:
    """Whether the image of the checkpoint of this number, from 1 on, stays in its series.

    Each of the first 99 does, then every tenth, from the thousandth on every hundredth: a slider with thousands of
    images helps nobody, and each is kept for as long as the run.
    """
    return count % int(10 ** max(0, len(str(count)) - 2)) == 0


def provenance(command: str, at: str) -> Provenance:
    """How a page was made: with this command, when, and by which versions."""
    from peel_agent.views import Provenance

    return Provenance(command, at, {"peel-agent": version("peel-agent"), "Python": platform.python_version()})


def utc(seconds: float | None = None) -> str:
    """A Unix time for people, by default now."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def drawn(order: Order) -> Answer:
    """Reads the history and draws it."""
    from peel_agent.publish import history_of
    from peel_agent.views import heat_map_png, redundancy_png, report_page

    try:
        kept, count = kept_run_of(order.state_dir, order.run, order.extent)
    except NoReport:
        return Answer()
    history = history_of(kept)
    if not history.reports:
        return Answer()
    command = ["peel-agent", "report", "--state", str(order.state_dir), "--run", history.name, "--out", "report.html"]
    at = f"of the checkpoint written at {utc(order.extent.until)}"
    try:
        texts: dict[str, bytes | None] = {
            REPORT_FILE: report_page(history, provenance(shlex.join(command), at)).encode(),
            f"{MARGINS}.png": heat_map_png(history, card=True),
            f"{REDUNDANCY}.png": redundancy_png(history, card=True),
        }
    except ConfigurationError as error:
        return Answer(lacks=(error.what, error.remedy))
    return Answer(_written(order, history, {path: content for path, content in texts.items() if content}, count))


def _written(order: Order, history: History, contents: Mapping[str, bytes], count: int) -> Pages:
    files: dict[str, Path] = {}
    for path, content in contents.items():
        files[path] = order.folder / path
        files[path].parent.mkdir(parents=True, exist_ok=True)
        files[path].write_bytes(content)
    stepped = [report for report in history.reports if report.checkpoint.step is not None]
    newest = stepped[-1] if stepped else None
    shown = {MARGINS: newest is not None, REDUNDANCY: newest is not None and newest.redundancy is not None}
    images = {name: files[f"{name}.png"] for name, is_shown in shown.items() if is_shown and f"{name}.png" in files}
    return Pages(_step(newest), round(order.extent.until * 1000), files, images, keep=is_kept(count))


def _step(report: PeelReport | None) -> int:
    return 0 if report is None else report.checkpoint.step or 0


def main() -> int:
    """Answers one order."""
    end_with_parent()
    signal.alarm(MOST_SECONDS)
    give_way(NICENESS)
    be_ended_first()
    order = restored(Order, json.loads(sys.stdin.read()))
    with quiet_libraries():
        answer: Any = plain(drawn(order))
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
