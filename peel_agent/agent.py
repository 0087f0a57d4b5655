"""The sidecar: one process that watches runs, has their checkpoints peeled, and sends what was found.

It owns the clock, signals, reload, the devices, the ledger, the courier and the health endpoint. Each run looks in a
thread of its own; the loop here only tends: whatever goes wrong in one place, the others go on.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import FrameType

from peel_agent import engines, registry
from peel_agent.backfill import end
from peel_agent.config import RunSettings, Settings, service_manager, visible_gpus, worker_environment
from peel_agent.destinations import Address, addresses, notes, pinned_run, tracker_settings
from peel_agent.devices import Devices
from peel_agent.dispatch import Dispatch
from peel_agent.errors import ConfigurationError, PeelError, printable
from peel_agent.figures import Figures, write_heartbeat
from peel_agent.health import HealthServer, Notifier
from peel_agent.identity import run_key
from peel_agent.journal import Journal
from peel_agent.leases import Leases
from peel_agent.ledger import Ledger
from peel_agent.records import DeviceLease, Peeled, Request
from peel_agent.run import Run
from peel_agent.signals import handling, status_of_stop
from peel_agent.sources import source_of
from peel_agent.spi import Engine
from peel_agent.watcher import Watcher
from peel_agent.work import Services

TICK_SECONDS = 1.0
SAMPLE_SECONDS = 5.0
HEARTBEAT_SECONDS = 5.0
COPY_SECONDS = 600.0
ALIVE_SECONDS = 60.0
"""The loop has hung when it has not come round for so long."""

DEFAULT_LISTEN = "127.0.0.1:9877"

END_SECONDS = 10.0
"""After SIGTERM, the agent is gone within this time, whatever hangs."""

LOOK_END_SECONDS = 3.0
"""Of these, what workers and looks get; the rest is for what is being sent."""

NOT_WATCHED = "the run is not watched any more"


class Agent:
    """Watches every run of the settings. `say` gets lines for people (stderr), `emit` each report's line (stdout).

    `reload` reads the settings anew, for SIGHUP.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        *,
        say: Callable[[str], None],
        emit: Callable[[str], None] | None = None,
        reload: Callable[[], Settings] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._emit = emit
        self._reload = reload
        log = settings.log
        self.journal = Journal(say, time.time, form=log.format, level=log.level, keep=ledger.note)
        self._engine = engine or engines.opened(settings.engine)
        self._dispatch = Dispatch(ledger, worker_environment(""), self.journal, time.time, self._name_of)
        devices = Devices(
            settings.device.select,
            settings.device.memory_fraction,
            Path("/tmp/peel-agent-devices"),  # noqa: S108 -- the agents of all users of a machine share it
            visible_gpus(),
            time.monotonic,
        )
        self._leases = Leases(devices, self._engine, self.journal)
        self._watchers: dict[str, Watcher] = {}
        self._addresses: dict[str, tuple[Address, ...]] = {}
        socket, watchdog = service_manager()
        self._notifier = Notifier(socket, watchdog, monotonic=time.monotonic)
        self._figures = Figures(ledger.state_dir, time.time(), self._is_ready, self._engine.memory_bytes, time.time)
        self._stopping = False
        self._stopped_by: int | None = None
        self._hangup = False
        self._turns = threading.Condition()
        self._last_turn = time.monotonic()
        self._done_at: dict[str, float] = {}

    # ---------------------------------------------------------------- its life

    def run(self, *, once: bool) -> int:
        """Watches until a signal, or with `once` until everything that is there now is done.

        Returns 0; with `once` 3 when nothing was readable, 1 when not everything could be sent; 130 for Ctrl-C. Raises
        ConfigurationError.
        """
        if not self._settings.runs:
            raise ConfigurationError(
                "there is no directory to watch", remedy="give it: peel-agent watch PATH, or [watch] path in peel.toml"
            )
        health = self._serve_health(once=once)
        with handling(self._on_signal):
            try:
                self._begin(once=once)
                self._notifier.ready(f"watching {len(self._watchers)} runs")
                self._tend(once=once)
                return self._status(once=once)
            finally:
                self._end()
                if health is not None:
                    health.stop()

    def _status(self, *, once: bool) -> int:
        status = 0
        if once and self._stopped_by is None:
            runs = [watcher.run for watcher in self._watchers.values()]
            status = end(runs, self._dispatch, self.journal, self._name_of, stopping=lambda: self._stopping)
        return status if self._stopped_by is None else status_of_stop(self._stopped_by, is_service=not once)

    def _begin(self, *, once: bool) -> None:
        if self._ledger.repaired is not None:
            self.journal.tell("repaired", self._ledger.repaired, level="warning")
        for problem in registry.problems("formats"):
            self.journal.tell("started", f"{problem}; checkpoints of that format are not seen", level="warning")
        self._apply(self._settings, once=once)

    def _tend(self, *, once: bool) -> None:
        """The loop: it waits for nothing but the next tick."""
        while not self._stopping:
            self._last_turn = time.monotonic()
            self._notifier.watchdog()
            if self._hangup:
                self._hangup = False
                self._read_settings_again()
            self._mind_faults(once=once)
            if once and all(watcher.ended.is_set() for watcher in self._watchers.values()):
                return
            self._every(0.0, "delivery", self._dispatch.tick)
            self._every(SAMPLE_SECONDS, "sample", self._leases.look)
            self._every(HEARTBEAT_SECONDS, "heartbeat", self._beat)
            self._every(TICK_SECONDS, "copy", self._copy)
            with self._turns:
                self._turns.wait(TICK_SECONDS)

    def _every(self, seconds: float, name: str, do: Callable[[], None]) -> None:
        """Does it when its time has come; what goes wrong is told, and tried again."""
        now = time.monotonic()
        if now - self._done_at.get(name, -seconds) < seconds:
            return
        self._done_at[name] = now
        try:
            do()
        except Exception as error:  # a full disk, a driver: the loop goes on
            words = f"{name} failed: {type(error).__name__}: {printable(str(error))}; it is tried again"
            self.journal.begin(f"agent/{name}", words)
        else:
            self.journal.end(f"agent/{name}", f"{name} works again")

    def _copy(self) -> None:
        self._ledger.tend(time.time(), every=COPY_SECONDS)

    def _mind_faults(self, *, once: bool) -> None:
        """What only another configuration mends ends an agent whose only run it is; others go on without that run."""
        for watcher in self._watchers.values():
            fault = watcher.fault
            if fault is None:
                continue
            if len(self._watchers) == 1 or once or not isinstance(fault, ConfigurationError):
                raise fault

    # ---------------------------------------------------------------- its runs

    def _apply(self, settings: Settings, *, once: bool = False) -> None:
        """These runs are watched from now on, and no others. Raises TimeoutError for one whose place hangs."""
        self.journal.speaker = settings.runs[0].name if settings.runs else None
        wanted: dict[str, tuple[RunSettings, tuple[Address, ...]]] = {}
        for run in settings.runs:
            trackers = tracker_settings(run.tracker, alone=len(settings.runs) == 1)
            for words in notes(run.tracker, alone=len(settings.runs) == 1):
                self.journal.tell("started", words, run=run.name)
            key = run_key(run.name, str(run.watch.path), pinned_run(trackers))
            folder = self._ledger.state_dir / "runs" / key
            wanted[key] = (
                run,
                addresses(run, settings, key=key, folder=folder, state_dir=self._ledger.state_dir),
            )
        for key in set(self._watchers) - set(wanted):
            self._dismiss(key)
        self._end_forgotten(settings, tuple(wanted))
        hanging = []
        for key, (run, own) in wanted.items():
            self._addresses[key] = own
            watcher = self._watchers.get(key)
            if watcher is not None and watcher.run.settings == run and watcher.is_watching:
                watcher.run.sinks = _sinks(settings)
            elif watcher is not None and not self._stop(watcher):
                hanging.append(watcher.name)
            else:
                self._watch(key, run, settings, once=once)
        self._dispatch.address([address for own in self._addresses.values() for address in own])
        self._dispatch.look()
        if hanging:
            raise TimeoutError(f"a look of {', '.join(hanging)} hangs: only when it ends can another one begin")

    def _watch(self, key: str, run: RunSettings, settings: Settings, *, once: bool) -> None:
        place = str(run.watch.path)
        policy = run.watch.backlog or ("all" if once else "latest")
        ledger = self._ledger.run(key, run.name, place)
        services = Services(
            journal=self.journal,
            lease=self._leases.ask,
            submit=lambda request: self._submit(key, request),
            give_back=lambda lease: self._give_back(key, lease),
            owed=self._dispatch.owed,
            emit=self._emit,
        )
        source = source_of(run, ledger.folder, policy, once=once, stopping=lambda: self._stopping)
        made = Run(run, settings.device, source, policy, ledger, services, sinks=_sinks(settings), once=once)
        watcher = Watcher(key, made, self.journal, on_end=self._turn, on_damage=self._mend_ledger)
        self._watchers[key] = watcher
        watcher.start()

    def _submit(self, key: str, request: Request) -> Future[Peeled]:
        self._dispatch.busy(key, is_busy=True)
        answer = self._engine.submit(request)
        self._leases.working(request)
        watcher = self._watchers.get(key)
        if watcher is not None:
            answer.add_done_callback(lambda _: watcher.wake())
        return answer

    def _give_back(self, key: str, lease: DeviceLease) -> None:
        self._leases.give_back(lease)
        self._dispatch.busy(key, is_busy=False)
        for other, watcher in list(self._watchers.items()):  # the loop may change them meanwhile
            if other != key:
                watcher.wake()

    def _stop(self, watcher: Watcher) -> bool:
        watcher.stop()
        work = watcher.run.work
        if work is not None and work.answer is not None and not work.answer.done():
            self._engine.give_way(work.ref.fingerprint, "its run was reloaded or ended")
        return watcher.join(END_SECONDS / 2)

    def _dismiss(self, key: str) -> None:
        """A run that is not configured any more: what fires is resolved, and what is owed is still sent."""
        watcher = self._watchers[key]
        has_ended = self._stop(watcher)
        watcher.run.withdraw_all(NOT_WATCHED)
        if has_ended:
            watcher.run.let_go()
        else:
            self.journal.tell("ended", f"{watcher.name}: its place hangs; it is left behind", level="warning")
        del self._watchers[key]
        self._leases.forget(key)
        self._ledger.end(watcher.run.ledger)
        self.journal.drop(f"run/{key}/")
        self.journal.tell("ended", f"{watcher.run.source.label} is not watched any more", run=watcher.name)

    def _end_forgotten(self, settings: Settings, keys: tuple[str, ...]) -> None:
        """Runs that were taken out of the configuration while no agent was there, or still owe something."""
        for key, name, place in self._ledger.owing(keys):
            self._addresses[key] = self._addresses_of_gone(key, name, place, settings)
        for key, name, place in self._ledger.others(keys):
            ledger = self._ledger.run(key, name, place)
            gone = _gone(name, place, settings)
            source = source_of(gone, ledger.folder, "latest", once=True, stopping=lambda: True)
            services = Services(self.journal, lambda *_: None, self._engine.submit, lambda _: None)
            Run(gone, settings.device, source, "latest", ledger, services, sinks=_sinks(settings), ended=NOT_WATCHED)
            self._addresses[key] = self._addresses_of_gone(key, name, place, settings)
            self._ledger.end(ledger)

    def _addresses_of_gone(self, key: str, name: str, place: str, settings: Settings) -> tuple[Address, ...]:
        folder = self._ledger.state_dir / "runs" / key
        gone = _gone(name, place, settings)
        return addresses(gone, settings, key=key, folder=folder, state_dir=self._ledger.state_dir)

    def _name_of(self, key: str) -> str:
        watcher = self._watchers.get(key)
        return key if watcher is None else watcher.name

    def _mend_ledger(self) -> None:
        """A ledger that was damaged under our hands is put back from its copy."""
        repaired = self._ledger.mend()
        if repaired is not None:
            self.journal.tell("repaired", repaired, level="error")

    # ---------------------------------------------------------------- signals

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hangup = True
        else:
            self._stopped_by = self._stopped_by or number
            self._stopping = True

    def _turn(self) -> None:
        with self._turns:
            self._turns.notify_all()

    def _read_settings_again(self) -> None:
        """SIGHUP: a bad new file is refused, and the old settings stay."""
        if self._reload is None:
            return
        self._notifier.reloading()
        try:
            settings = self._reload()
            if not settings.runs:
                raise ConfigurationError("it names no directory to watch", remedy="add [watch] path or a [[run]]")
            self._apply(settings)
        except PeelError as error:
            words = f"the new configuration is refused, and the old one stays: {error.what} -> {error.remedy}"
            self.journal.tell("reloaded", words, level="error")
        except Exception as error:  # a full disk, a place that hangs: what was applied stays, and the rest follows
            words = f"the new configuration is not in force yet: {printable(str(error))}; it is tried again"
            self.journal.begin("agent/reload", words)
            self._hangup = True
        else:
            self.journal.end("agent/reload", "the new configuration is in force")
            fixed = [
                name
                for name in ("device", "state", "health", "log", "engine")
                if getattr(settings, name) != getattr(self._settings, name)
            ]
            later = f"; what changed in {', '.join(fixed)} counts from the next start on" if fixed else ""
            self._settings = settings
            self.journal.tell("reloaded", f"the configuration was read again: {len(settings.runs)} runs{later}")
        self._notifier.ready(f"watching {len(self._watchers)} runs")

    # ---------------------------------------------------------------- health

    def _serve_health(self, *, once: bool) -> HealthServer | None:
        """None where nobody asked for it and the default address is taken, or with `once`."""
        listen = self._settings.health.listen
        if listen == "" or (listen is None and once):
            return None
        server = HealthServer(DEFAULT_LISTEN if listen is None else listen, self._figures.read, self._is_alive)
        try:
            server.start()
        except ConfigurationError as error:
            if listen is not None:
                raise
            words = f"no health endpoint: {error.what}; [health] listen gives this agent another address"
            self.journal.tell("started", words, level="warning")
            return None
        self.journal.tell("started", f"health and metrics at http://{server.address}/metrics")
        return server

    def _is_alive(self) -> bool:
        return time.monotonic() - self._last_turn < ALIVE_SECONDS

    def _is_ready(self) -> tuple[str, ...]:
        """What is wrong now."""
        return self.journal.troubles

    def _beat(self) -> None:
        """For `peel-agent status`, beside us: that we live, and what is wrong."""
        write_heartbeat(self._ledger.state_dir, time.time(), self.journal.troubles, self._leases.words)

    # ---------------------------------------------------------------- its end

    def _end(self) -> None:
        """Within END_SECONDS: what hangs is left behind."""
        self._notifier.stopping()
        self.journal.tell("stopping", "ending; what is not done yet is kept for the next start")
        self._stopping = True
        deadline = time.monotonic() + LOOK_END_SECONDS
        for watcher in self._watchers.values():
            watcher.stop()
        self._engine.close(LOOK_END_SECONDS / 2)
        for watcher in self._watchers.values():
            if not watcher.join(max(0.0, deadline - time.monotonic())):
                self.journal.tell("stopping", f"{watcher.name}: its place hangs; it is left behind", level="warning")
        self._dispatch.close()
        with suppress(Exception):  # a full disk: the last copy stays
            self._ledger.tend(time.time(), every=0.0)


def _gone(name: str, place: str, settings: Settings) -> RunSettings:
    """What is left of a run's settings: its place, and the trackers of the top level."""
    return RunSettings(name=name, watch=dataclasses.replace(settings.watch, path=place), tracker=settings.tracker)


def _sinks(settings: Settings) -> dict[str, float | None]:
    return {sink.name: getattr(registry.sink(sink.use), "resend_seconds", None) for sink in settings.sinks}
