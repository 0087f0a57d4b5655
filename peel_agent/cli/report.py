"""`peel-agent report`: a run's history as a page in one file, from an agent's state or from a tracker's run."""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import tempfile
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from peel_agent.cli.operate import reading
from peel_agent.cli.options import say
from peel_agent.cli.watch import state_folder
from peel_agent.errors import ConfigurationError, NoReport, PeelError
from peel_agent.ledger import FILE, kept_run
from peel_agent.publish import history_of
from peel_agent.records import History, KeptRun
from peel_agent.watch import is_url


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        nargs="?",
        metavar="DIR|RUN",
        help="the watched directory, a state folder, or the id of a tracker's run",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    parser.add_argument("--heat-map", type=Path, metavar="FILE", help="the heat map as an image too, such as map.png")
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="which run, where the state holds several")
    parser.add_argument("--tracker", default="mlflow", metavar="NAME", help="whose run it is (default: mlflow)")
    parser.add_argument("--tracking-uri", metavar="URI", help="where the tracker's run is")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="peel.toml: the state of its agent")
    parser.add_argument("--run-id", metavar="ID", help="as given to `watch`")
    parser.add_argument("--state", metavar="DIR", help="the state folder, as given to `watch`")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from peel_agent.views import Made, heat_map_png, report_page

    history = history_of(_of_tracker(options) if _is_run(options) else _of_state(options))
    _must_have_reports(history)
    versions = {"peel-agent": version("peel-agent"), "Python": platform.python_version()}
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    made = Made(command=_command(options), at=at, versions=versions)
    page = report_page(history, made).encode()
    _write(options.out, page)
    print(f"{options.out}: {len(history.reports):,} checkpoints of {history.name}, {len(page) / 1e6:.1f} MB")
    if options.heat_map is not None:
        image = heat_map_png(history)
        if image is None:
            say(f"peel-agent: no margin was measured, so there is no heat map: {options.heat_map} is not written")
        else:
            _write(options.heat_map, image)
            print(f"{options.heat_map}: the heat map")
    return 0


def _command(options: argparse.Namespace) -> str:
    """The command that makes the page again; no password of a tracking URI is in it."""
    named = (
        ("--run", options.run_name),
        ("--tracking-uri", options.tracking_uri and re.sub(r"://[^/@\s]*@", "://", options.tracking_uri)),
        ("-c", options.config),
        ("--run-id", options.run_id),
        ("--state", options.state),
        ("--out", options.out),
    )
    given = [text for flag, value in named if value for text in (flag, str(value))]
    return shlex.join(["peel-agent", "report", *([options.path] if options.path else []), *given])


def _is_run(options: argparse.Namespace) -> bool:
    """Whether a tracker's run is meant, and no place of ours."""
    place: str | None = options.path
    if place is None or options.state is not None or options.config is not None:
        return False
    if is_url(place) or Path(place).expanduser().exists():
        return False
    if options.tracking_uri is None and not re.fullmatch(r"[0-9a-f]{32}", place):
        raise ConfigurationError(
            f"{place} is no directory, and no run id of MLflow",
            remedy="give the directory that `peel-agent watch` was given, a state folder, or a run id with "
            "--tracking-uri",
        )
    return True


def _of_state(options: argparse.Namespace) -> KeptRun:
    """The run of the agent that was started with the same file and flags."""
    place = None if options.path is None or is_url(options.path) else Path(options.path).expanduser()
    is_state = options.state is None and options.config is None and place is not None and (place / FILE).exists()
    folder = place if is_state and place is not None else state_folder(options)
    return reading(lambda: kept_run(folder, options.run_name))


def _of_tracker(options: argparse.Namespace) -> KeptRun:
    """What was published to this run of a tracker."""
    from peel_agent import registry
    from peel_agent.config import plugin_settings
    from peel_agent.spi import HistoryReader

    plugin = registry.tracker(options.tracker)
    table = {"run_id": options.path, "tracking_uri": options.tracking_uri}
    given = {name: value for name, value in table.items() if value is not None}
    settings = plugin_settings(plugin.settings, f"tracker.{options.tracker}", given, from_environment={})
    with tempfile.TemporaryDirectory(prefix="peel-report-") as folder:
        copies = Path(folder)
        with closing(plugin.connect(settings, checkpoint_dir="", state_dir=copies / "state")) as tracker:
            if not isinstance(tracker, HistoryReader):
                raise ConfigurationError(
                    f"the tracker {options.tracker} cannot be read back",
                    remedy="make the page from the agent's state: give the watched directory",
                )
            return tracker.read_back(_made(copies / "files"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _must_have_reports(history: History) -> None:
    if history.reports:
        return
    gaps = history.gaps or ()
    why = f"; {len(gaps)} checkpoints have none, the last one since {gaps[-1].why}" if gaps else ""
    raise NoReport(
        f"there is no report of {history.name} ({history.place}){why}",
        remedy="wait until a checkpoint is peeled (`peel-agent status`), or name another run",
    )


def _write(file: Path, content: bytes) -> None:
    """The whole file, or the one that was there."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(file)
    except OSError as error:
        raise PeelError(
            f"{file} cannot be written: {error.strerror or error}", remedy="give a file in a folder that may be written"
        ) from error
