"""`peel-agent report`: a run's history as a page in one file, from an agent's state or from a tracker's run."""

from __future__ import annotations

import argparse
import re
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from peel_agent import registry
from peel_agent.cli.operate import reading
from peel_agent.cli.options import command_again, say
from peel_agent.cli.watch import state_folder
from peel_agent.errors import ConfigurationError, NoReport, PeelError
from peel_agent.ledger import FILE, kept_run
from peel_agent.publish import history_of
from peel_agent.records import History, KeptRun, LocalListing
from peel_agent.rendering import provenance, utc
from peel_agent.watch import is_url

RUN_ID = re.compile("[0-9a-f]{32}")
"""Of MLflow."""


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
    from peel_agent.views import heat_map_png, report_page

    place = HistoryPlace(
        options.path,
        run_name=options.run_name,
        tracker=options.tracker,
        tracking_uri=options.tracking_uri,
        config=options.config,
        run_id=options.run_id,
        state=options.state,
    )
    history = place.history()
    page = report_page(history, provenance(_command(options), utc())).encode()
    write_whole(options.out, page)
    count = len(history.reports)
    told = f"{count:,} checkpoint{'' if count == 1 else 's'} of the run {history.name}"
    print(f"wrote {options.out}: {told}, {len(page) / 1e6:.1f} MB")
    if options.heat_map is not None:
        image = heat_map_png(history)
        if image is None:
            say(f"peel-agent: no margin was measured, so there is no heat map: {options.heat_map} is not written")
        else:
            write_whole(options.heat_map, image)
            print(f"{options.heat_map}: the heat map")
    return 0


def _command(options: argparse.Namespace) -> str:
    """The command that makes the page again."""
    named = (
        ("--run", options.run_name),
        ("--tracking-uri", options.tracking_uri),
        ("-c", options.config),
        ("--run-id", options.run_id),
        ("--state", options.state),
        ("--out", options.out),
    )
    return command_again(["report", *([options.path] if options.path else [])], named)


@dataclass(frozen=True)
class HistoryPlace:
    """Where a run's history is: a watched directory, a state folder, or the id of a tracker's run."""

    path: str | None
    run_name: str | None = None
    tracker: str = "mlflow"
    tracking_uri: str | None = None
    config: Path | None = None
    run_id: str | None = None
    state: str | None = None

    def history(self) -> History:
        """At least one report. Raises NoReport, LedgerError, ConfigurationError, and what a tracker raises."""
        history = history_of(self._of_tracker() if self._is_run() else self._of_state())
        _must_have_reports(history)
        return history

    def is_history(self) -> bool:
        """Whether there is one at a path that may as well be a checkpoint's."""
        if self.path is None or is_url(self.path):
            return False
        place = Path(self.path).expanduser()
        if not place.exists():
            return self.tracking_uri is not None or bool(RUN_ID.fullmatch(self.path))
        if (place / FILE).exists():
            return True
        is_checkpoint = registry.claimed(LocalListing(place.absolute()), registry.formats()) is not None
        return not is_checkpoint and place.is_dir() and (self._state_folder() / FILE).exists()

    def _is_run(self) -> bool:
        """Whether a tracker's run is meant, and no place of ours."""
        place = self.path
        if place is None or self.state is not None or self.config is not None:
            return False
        if is_url(place) or Path(place).expanduser().exists():
            return False
        if self.tracking_uri is None and not RUN_ID.fullmatch(place):
            raise ConfigurationError(
                f"{place} is no directory, and no run id of MLflow",
                remedy="give the directory that `peel-agent watch` was given, a state folder, or a run id with "
                "--tracking-uri",
            )
        return True

    def _state_folder(self) -> Path:
        given = {"path": self.path, "state": self.state, "config": self.config, "run_id": self.run_id}
        return state_folder(argparse.Namespace(**given))

    def _of_state(self) -> KeptRun:
        """The run of the agent that was started with the same file and flags."""
        place = None if self.path is None or is_url(self.path) else Path(self.path).expanduser()
        is_state = self.state is None and self.config is None and place is not None and (place / FILE).exists()
        folder = place if is_state and place is not None else self._state_folder()
        return reading(lambda: kept_run(folder, self.run_name))

    def _of_tracker(self) -> KeptRun:
        """What was published to this run of a tracker."""
        from peel_agent.config import plugin_settings
        from peel_agent.spi import HistoryReader

        plugin = registry.tracker(self.tracker)
        table = {"run_id": self.path, "tracking_uri": self.tracking_uri}
        given = {name: value for name, value in table.items() if value is not None}
        settings = plugin_settings(plugin.settings, f"tracker.{self.tracker}", given, from_environment={})
        with tempfile.TemporaryDirectory(prefix="peel-report-") as folder:
            copies = Path(folder)
            with closing(plugin.connect(settings, checkpoint_dir="", state_dir=copies / "state")) as tracker:
                if not isinstance(tracker, HistoryReader):
                    raise ConfigurationError(
                        f"the tracker {self.tracker} cannot be read back",
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


def write_whole(file: Path, content: bytes) -> None:
    """The whole file, or the one that was there."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(file)
    except OSError as error:
        raise PeelError(
            f"{file} cannot be written: {error.strerror or error}", remedy="give a file in a folder that may be written"
        ) from error
