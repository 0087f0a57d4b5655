"""The sidecar: clock, signals and loop. Watches one directory, has each checkpoint peeled in a child, sends findings.

The only module with a broad `except`: whatever goes wrong with one checkpoint, the next one is still peeled.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from peel_agent import registry
from peel_agent.config import Settings, worker_environment
from peel_agent.errors import ConfigurationError, PeelError, WorkerError, printable
from peel_agent.ledger import Ledger
from peel_agent.publish import Delivery
from peel_agent.records import Peeled
from peel_agent.rounds import Rounds
from peel_agent.spi import Tracker
from peel_agent.watch import Bucket, Folder, Hints, Mirror, Settling, Source, Store, is_url
from peel_agent.worker import Request, ask

SCAN_PAUSE_SECONDS = 0.5
"""A save in progress raises a hint for every write; scans keep at least this far apart."""


@dataclass
class Daemon:
    """One watched directory or folder of an object store (its URL).

    `say` gets lines for people (stderr), `emit` gets each report's line (stdout).
    """

    place: str
    settings: Settings
    ledger: Ledger
    say: Callable[[str], None]
    emit: Callable[[str], None] | None = None
    _stopping: bool = False
    _child: subprocess.Popen[str] | None = None
    _told: set[str] = field(default_factory=set)

    def run(self, *, once: bool) -> int:
        """Watches until a signal, or with `once` until everything that is there now is done.

        Returns 0, or 3 when `once` found nothing readable. Raises ConfigurationError.
        """
        delivery = Delivery(self.ledger, self._trackers(), now=time.monotonic, say=self.say)
        policy = self.settings.watch.backlog or ("all" if once else "latest")
        source = self._source(policy, once=once)
        root = source.root if isinstance(source, Folder) else None
        with Hints(root) as hints, self._signals(hints), ThreadPoolExecutor(1) as executor:

            def submit(request: Request) -> Future[Peeled]:
                answer = executor.submit(self._attempt, request)
                answer.add_done_callback(lambda _: hints.wake())
                return answer

            rounds = Rounds(source, policy, self.settings, self.ledger, submit, self.say, self.emit)
            self.say(f"watching {source.label} ({hints.status}); findings are kept in {self.ledger.state_dir}")
            for problem in registry.problems("formats"):
                self.say(f"{problem}; checkpoints of that format are not seen")
            try:
                self._loop(rounds, hints, delivery, once=once)
            finally:
                self._end_child()
                rounds.close()
        delivery.close()
        return self._outcome(once=once)

    def _source(self, policy: str, *, once: bool) -> Source:
        watch = self.settings.watch
        formats = registry.formats(watch.format)
        if not is_url(self.place):
            give_up = [watch.settle_seconds] if once else []
            return Folder(Path(self.place), formats, Settling(watch.settle_seconds, *give_up))
        folder = self.ledger.state_dir / "mirror"
        folder.mkdir(exist_ok=True)
        mirror = Mirror(Store(self.place), folder, formats)
        return Bucket(mirror, formats, watch.settle_seconds, policy == "latest", self.say, lambda: self._stopping)

    def _loop(self, rounds: Rounds, hints: Hints, delivery: Delivery, *, once: bool) -> None:
        watch = self.settings.watch
        while not self._stopping:
            hints.refresh()
            seconds = watch.poll_seconds
            try:
                observed = rounds.make(now=time.time())
            except PeelError:
                raise
            except Exception as error:  # a full disk, a plug-in's bug: the next round may be better
                if once:
                    raise
                self._tell(f"a round failed: {type(error).__name__}: {printable(str(error))}; going on")
            else:
                delivery.deliver()
                if once and rounds.is_idle(observed):
                    return
                if observed.waiting:
                    seconds = min(seconds, watch.settle_seconds)
            hints.wait(seconds)
            time.sleep(SCAN_PAUSE_SECONDS)

    def _tell(self, line: str) -> None:
        """Says a line that may come again at every round, once."""
        if line not in self._told:
            self._told.add(line)
            self.say(line)

    def _attempt(self, request: Request) -> Peeled:
        """Runs in a thread, beside the loop."""
        try:
            return self._measure(request)
        except PeelError:
            raise
        except Exception as error:  # one checkpoint must not end the watch over the run
            raise WorkerError(f"{type(error).__name__}: {error}", remedy="please report it") from error

    def _measure(self, request: Request) -> Peeled:
        """The checkpoint peeled in a child process of its own."""
        environment, _ = worker_environment(self.settings.device.select)
        try:
            return ask(request, environment, started=self._started)
        finally:
            self._child = None

    def _started(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        if self._stopping:
            child.kill()

    def _end_child(self) -> None:
        """Nobody waits for its answer any more."""
        self._stopping = True
        child = self._child
        if child is not None:
            child.kill()

    def _trackers(self) -> dict[str, Tracker]:
        """The trackers in use, connected; raises ConfigurationError for a table or a key that nothing reads."""
        tracking = self.settings.tracker
        unused = set(tracking.options) - set(tracking.use)
        if unused:
            raise ConfigurationError(
                f"[tracker.{min(unused)}] is configured, and not in use",
                remedy=f'add "{min(unused)}" to [tracker] use, or take the table out',
            )
        trackers = {}
        for name in tracking.use:
            plugin, options = registry.tracker(name), tracking.options.get(name, {})
            for key in set(options) - plugin.options:
                raise ConfigurationError(
                    f"unknown key `tracker.{name}.{key}` in the configuration",
                    remedy=f"known here: {', '.join(sorted(plugin.options))}",
                )
            trackers[name] = plugin.connect(options, checkpoint_dir=self.place, state_dir=self.ledger.state_dir)
        return trackers

    def _outcome(self, *, once: bool) -> int:
        if once and not self.ledger.count("peeled"):
            self.say(
                f"nothing readable in {self.place}: expected checkpoints of one of the formats "
                f"{', '.join(form.name for form in registry.formats(self.settings.watch.format))}, such as checkpoint-N"
            )
            for path, reason in self.ledger.refused():
                self.say(f"refused: {printable(path)}: {reason}")
            return 3
        return 0

    def _signals(self, hints: Hints) -> _Handlers:
        def stop(_number: int, _frame: FrameType | None) -> None:
            self._end_child()
            hints.wake()

        return _Handlers(stop)


class _Handlers:
    """Installs one handler for SIGTERM and SIGINT while open."""

    def __init__(self, handler: Callable[[int, FrameType | None], None]) -> None:
        self._handler = handler
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
