"""The sidecar: clock, signals and loop. Watches one directory, has each checkpoint peeled in a child, sends findings.

The only module with a broad `except`: whatever goes wrong with one checkpoint, the next one is still peeled.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from peel_agent import registry
from peel_agent.config import Settings, worker_environment
from peel_agent.errors import ConfigurationError, PeelError, TornCheckpoint, WorkerError
from peel_agent.ledger import Ledger
from peel_agent.pipeline import conclude
from peel_agent.publish import Delivery, alert_line, headline, report_line
from peel_agent.records import CheckpointRef, Peeled
from peel_agent.spi import Tracker
from peel_agent.watch import Hints, Settling, scan
from peel_agent.worker import Request, ask

ATTEMPTS = 3
"""How often a checkpoint is tried whose worker dies, before it is given up."""


SCAN_PAUSE_SECONDS = 0.5
"""A save in progress raises a hint for every write; scans keep at least this far apart."""


@dataclass
class Daemon:
    """One watched directory. `say` gets lines for people (stderr), `emit` gets each report's line (stdout)."""

    root: Path
    settings: Settings
    ledger: Ledger
    say: Callable[[str], None]
    emit: Callable[[str], None] | None = None
    _stopping: bool = False
    _child: subprocess.Popen[str] | None = None
    _attempts: dict[str, int] = field(default_factory=dict)
    _told: set[tuple[Path, str]] = field(default_factory=set)

    def run(self, *, once: bool) -> int:
        """Watches until a signal, or with `once` until everything that is there now is done.

        Returns 0, or 3 when `once` found nothing readable. Raises ConfigurationError.
        """
        watch = self.settings.watch
        formats = registry.formats(watch.format)
        settling = Settling(watch.settle_seconds, watch.settle_seconds) if once else Settling(watch.settle_seconds)
        delivery = Delivery(self.ledger, self._trackers(), now=time.monotonic, say=self.say)
        with Hints(self.root) as hints, self._signals(hints):
            self.say(f"watching {self.root} ({hints.status}); findings are kept in {self.ledger.state_dir}")
            while not self._stopping:
                observed = settling.observe(scan(self.root, formats), now=time.time())
                todo = [ref for ref in observed.ready if self._is_due(ref)]
                for ref in todo:
                    if not self._stopping:
                        self._peel(ref)
                        delivery.deliver()
                self._tell(observed.unreadable)
                delivery.deliver()
                retrying = any(self._is_due(ref) for ref in todo)
                if once and not observed.waiting and not retrying:
                    break
                hints.wait(min(watch.poll_seconds, watch.settle_seconds) if observed.waiting else watch.poll_seconds)
                time.sleep(SCAN_PAUSE_SECONDS)
        delivery.close()
        return self._outcome(once=once)

    def _is_due(self, ref: CheckpointRef) -> bool:
        """Neither done nor given up in this session."""
        return not self.ledger.knows(ref.fingerprint) and self._attempts.get(ref.fingerprint, 0) < ATTEMPTS

    def _peel(self, ref: CheckpointRef) -> None:
        try:
            peeled = self._measure(ref)
        except ConfigurationError:
            raise
        except TornCheckpoint as error:
            self.say(error.what + "; it will be read again")
        except WorkerError as error:
            if not self._stopping:
                self._try_again(ref, error.what)
        except PeelError as error:
            self.ledger.refuse(ref, str(error))
            self.say(f"cannot use {ref.path}: {error}")
        except Exception as error:  # one checkpoint must not end the watch over the run
            self._try_again(ref, f"{type(error).__name__}: {error}")
        else:
            self._conclude(ref, peeled)

    def _try_again(self, ref: CheckpointRef, why: str) -> None:
        """What may have other causes than the checkpoint is no verdict on it: the next start tries it anew."""
        attempts = self._attempts[ref.fingerprint] = self._attempts.get(ref.fingerprint, 0) + 1
        rest = "trying again" if attempts < ATTEMPTS else f"left after {attempts} attempts, until the next start"
        self.say(f"{ref.path}: {why}; {rest}")

    def _measure(self, ref: CheckpointRef) -> Peeled:
        """The checkpoint peeled in a child process of its own."""
        settings = self.settings
        environment, device = worker_environment(settings.device.select)
        request = Request(
            ref=ref,
            probe=settings.probe,
            peel=settings.peel,
            model=settings.model,
            device=device,
            nice=settings.device.nice,
            earlier=self.ledger.bound_memory(),
        )
        try:
            return ask(request, environment, started=partial(setattr, self, "_child"))
        finally:
            self._child = None

    def _conclude(self, ref: CheckpointRef, peeled: Peeled) -> None:
        """Judged, made final in the ledger, and told; what the trackers get is in the outbox by then."""
        report, verdict, sent = conclude(
            peeled.report,
            ref,
            rules=self.settings.rules,
            states=self.ledger.rule_states(),
            alerts_log=self.ledger.alerts_log(),
            max_series=self.settings.tracker.max_series,
        )
        line = report_line(report)
        self.ledger.record(
            ref,
            report=line,
            verdict=verdict,
            alert_lines={notice.id: alert_line(notice) for notice in verdict.notices},
            memory=peeled.memory if ref.step is not None else None,
            publications=dict.fromkeys(self.settings.tracker.use, sent),
        )
        self.say(headline(report))
        for notice in verdict.notices:
            self.say(f"ALERT {notice.state}: {notice.text}")
        if self.emit is not None:
            self.emit(line)

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
            trackers[name] = plugin.connect(options, checkpoint_dir=self.root, state_dir=self.ledger.state_dir)
        return trackers

    def _tell(self, unreadable: tuple[tuple[Path, str], ...]) -> None:
        for path, reason in unreadable:
            if (path, reason) not in self._told:
                self._told.add((path, reason))
                self.say(f"cannot read {path}: {reason}")

    def _outcome(self, *, once: bool) -> int:
        if once and not self.ledger.peeled():
            self.say(
                f"nothing readable in {self.root}: expected checkpoint-N folders, save_pretrained folders or "
                ".safetensors files with their config.json"
            )
            for path, reason in self.ledger.refused():
                self.say(f"refused: {path}: {reason}")
            return 3
        return 0

    def _signals(self, hints: Hints) -> _Handlers:
        def stop(_number: int, _frame: FrameType | None) -> None:
            self._stopping = True
            if self._child is not None:
                self._child.kill()
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
