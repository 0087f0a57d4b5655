"""One run's thread: looks at its place again and again, and outlives whatever goes wrong there."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from peel_agent.errors import ConfigurationError, PeelError, printable
from peel_agent.journal import Journal
from peel_agent.run import Run
from peel_agent.watch import Folder, Hints, Observed

LOOK_PAUSE_SECONDS = 0.5
"""A save in progress raises a hint for every write; looks keep at least this far apart."""

SHORTEST_PAUSE_SECONDS = 0.05
"""The pause before a look at what is whole by then: it may be written over before a longer one is over."""

FIRST_TROUBLE_SECONDS = 2.0
LONGEST_TROUBLE_SECONDS = 60.0


@dataclass
class Watcher:
    """Has `run` look when it is time, in a thread of its own, so that a place that hangs concerns no other run.

    `ended` is set when the thread is over; `fault` then holds what nothing but another configuration mends.
    """

    key: str
    run: Run
    journal: Journal
    ended: threading.Event = field(default_factory=threading.Event)
    fault: BaseException | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)
    _hints: Hints | None = None
    _thread: threading.Thread | None = None
    _has_looked_near: bool = False
    on_end: Callable[[], None] = lambda: None
    on_damage: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name=f"run {self.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.run.settings.name

    def wake(self) -> None:
        """Something may be worth a look; may be called by a signal handler."""
        if self._hints is not None:
            self._hints.wake()

    @property
    def is_watching(self) -> bool:
        """Whether further looks will be made."""
        return not self._stopping.is_set() and not self.ended.is_set()

    def stop(self) -> None:
        """No further look begins."""
        self.run.is_ending = True
        self._stopping.set()
        self.wake()

    def join(self, seconds: float) -> bool:
        """Whether the thread ended within this time; one that hangs in a dead file system is left behind."""
        return self.ended.wait(seconds)

    def _watch(self) -> None:
        try:
            root = self.run.source.root if isinstance(self.run.source, Folder) else None
            if root is not None and not self._await(root):
                return
            self._hints = Hints(root)
            with self._hints as hints:
                words = f"watching {self.run.source.label} ({hints.status}); findings are kept in {self.run.kept_in}"
                self.journal.tell("watching", words, run=self.name)
                self._look_on(hints)
            self.run.close()
        except ConfigurationError as error:
            self.fault = error
            self.journal.begin(f"run/{self.key}/fault", f"{error.what} -> {error.remedy}", run=self.name)
        except BaseException as error:  # the agent decides what becomes of it
            self.fault = error
        finally:
            self.ended.set()
            self.on_end()

    def _await(self, root: Path) -> bool:
        """Waits for a directory that is not there, or not there yet; False when the agent ends meanwhile.

        What is asked for once is not waited for.
        """
        while not self._stopping.is_set():
            with suppress(OSError):
                if root.exists():
                    return True
            if self.run.once:
                remedy = "give the directory that the training writes its checkpoints to, or ask again once it is there"
                self.journal.tell("unreadable", f"{root} is not there -> {remedy}", run=self.name, level="error")
                return False
            words = f"{root}: it is not there now; nothing is lost, and it is looked for again"
            self.journal.begin(f"run/{self.key}/place", words, run=self.name)
            with suppress(sqlite3.Error, OSError):  # a full disk: it is told when the place is there
                self.run.tick(time.time())
            self._stopping.wait(FIRST_TROUBLE_SECONDS)
        return False

    def _look_on(self, hints: Hints) -> None:
        settings = self.run.settings.watch
        pause = FIRST_TROUBLE_SECONDS
        while not self._stopping.is_set():
            hints.refresh()
            observed = self._look()
            if observed is None:
                hints.wait(pause)
                pause = min(2 * pause, LONGEST_TROUBLE_SECONDS)
            else:
                pause = FIRST_TROUBLE_SECONDS
                if self.run.once and self.run.is_idle(observed):
                    return
                if observed.rests_in is not None and observed.rests_in < LOOK_PAUSE_SECONDS:
                    self._stopping.wait(max(SHORTEST_PAUSE_SECONDS, observed.rests_in))
                    continue
                seconds = (
                    min(settings.poll_seconds, settings.settle_seconds) if observed.waiting else settings.poll_seconds
                )
                hints.wait(seconds)
            self._stopping.wait(LOOK_PAUSE_SECONDS)

    def _look(self) -> Observed | None:
        """A round; None when it failed by what may pass, which is told once when it begins and once when it ends."""
        trouble = f"run/{self.key}/look"
        try:
            observed = self.run.round(time.time())
        except BrokenPipeError:
            raise  # nobody reads our output any more
        except PeelError as error:
            # What worked before has a cause that may pass: a permission, an expired ticket, a store that is away.
            if not (error.retryable or self.run.ledger.count("peeled")):
                raise
            self.journal.begin(trouble, f"{error.what} -> {error.remedy}; it is tried again", run=self.name)
        except sqlite3.Error as error:
            self.journal.begin(trouble, self._words_of_ledger(error), run=self.name)
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                self.on_damage()
        except OSError as error:
            what = error.strerror or str(error)
            where = f"{error.filename}: " if error.filename else ""
            self.journal.begin(trouble, f"the last look failed: {where}{what}; it is tried again", run=self.name)
        except Exception as error:  # a plug-in's bug: the next round may be better
            words = f"the last look failed: {type(error).__name__}: {printable(str(error))}; it is tried again"
            self.journal.begin(trouble, words, run=self.name)
        else:
            self._mind_place()
            self._say_what_is_near(observed)
            for passed in (trouble, f"run/{self.key}/fault"):
                self.journal.end(passed, f"{self.run.source.label} is looked at again", run=self.name)
            return observed
        return None

    def _mind_place(self) -> None:
        """A place that is away, and one that is there again."""
        source, trouble = self.run.source, f"run/{self.key}/place"
        if source.away is not None:
            self.journal.begin(trouble, f"{source.away}; nothing is lost, and it is looked for again", run=self.name)
        else:
            self.journal.end(trouble, f"{source.label} is there again", run=self.name)

    def _say_what_is_near(self, observed: Observed) -> None:
        """Once, where nothing was ever found: a folder too high, a link that is not followed, other things."""
        source = self.run.source
        if self._has_looked_near or source.away is not None:
            return
        is_empty = not (observed.ready or observed.waiting or observed.unreadable)
        self._has_looked_near = True
        if is_empty and not self.run.ledger.count("peeled"):
            for sentence in source.near():
                self.journal.tell("unreadable", sentence, run=self.name, level="warning")

    def _words_of_ledger(self, error: sqlite3.Error) -> str:
        folder: Path = self.run.ledger.folder
        return f"the ledger beside {folder} cannot be written: {error}; what is finished is kept until it can"
