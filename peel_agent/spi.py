"""What a plug-in implements: one small protocol a kind, and why each method is there.

A plug-in is an object named by an entry point of the group `peel_agent.<kind>`; it may import `peel_agent.spi`,
`peel_agent.records` and `peel_agent.errors`, nothing else of this package. `peel_agent.testing` holds a conformance
kit for each kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peel_agent.records import (
    Anatomy,
    Check,
    CheckpointRef,
    Claim,
    DeviceLease,
    KeptRun,
    Listing,
    LocalListing,
    NoticeGroup,
    Pages,
    Peeled,
    Publication,
    Readiness,
    Request,
    Stack,
    TrainingLog,
    Weights,
)

KINDS = ("formats", "families", "trackers", "sinks", "engines")
"""Every plug-in kind of the contract; the entry point group is `peel_agent.` + kind."""


class Format(Protocol):
    """`peel_agent.formats`: one way in which trainers write checkpoints.

    The first three methods run in the parent daemon: they must not import torch and must not read tensor data. They
    take what they ask of a folder's names from the listing, so that a look lists each folder once.
    """

    name: str

    def claim(self, listing: Listing) -> Claim | None:
        """What this format says of a file or a folder by its names; None for what it does not know.

        Of all claims the strongest wins: `specific`, `generic`, `declined`, `begun`. Of two that are equally strong, a
        format of another distribution wins over one of peel-agent's own, then the first by name.
        """

    def inspect(self, listing: LocalListing) -> Readiness:
        """Is it whole? Reads markers and headers. A path that vanished is `incomplete`, never an exception."""

    def step(self, listing: LocalListing) -> int | None:
        """The training step that the checkpoint itself names, or None."""

    def open(self, ref: CheckpointRef) -> Weights:
        """The tensors. Raises CheckpointError for what it refuses to read. Runs in the worker."""


@runtime_checkable
class Declining(Protocol):
    """What a Format has that reads nothing: it names what it knows instead."""

    declines: tuple[str, ...]
    """What is declined, in words."""


class Family(Protocol):
    """`peel_agent.families`: where the blocks and their parts are in one group of architectures."""

    name: str
    model_types: frozenset[str]
    """The values of `model_type` in config.json that this family covers."""

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy | Stack:
        """Module names for a model of this configuration, or where the layers of a fully connected network are."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    environment: str | None = None,
    instead_of: str | None = None,
    pins_run: bool = False,
    secret: bool = False,
) -> Any:
    """A field of a plug-in's settings: a frozen dataclass of text, numbers, booleans, paths and lists of texts.

    One without a default must be given. `environment` is a variable that it is taken from when the configuration
    leaves it out, and the field too that it stands `instead_of`. A field that `pins_run` names the tracker's own run:
    another value is another run, which inherits nothing of what is known. A `secret` is left out of the settings'
    repr; messages must not hold it either.
    """
    metadata = {"environment": environment, "instead_of": instead_of, "pins_run": pins_run, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


class Tracker(Protocol):
    """A connection to the place where a run's numbers are kept, made by a TrackerPlugin.

    Its metrics and tags come in one publication and its files in another, from two threads, each with a connection of
    its own: a store of files that refuses must not hold back metrics.
    """

    def prepare(self) -> None:
        """Loads the libraries that it needs, so that the first publication does not wait for them."""

    def publish(self, publication: Publication) -> None:
        """Writes one checkpoint's results; writing the same again changes nothing.

        Raises DestinationUnavailable (to be tried again), DestinationDenied (to be tried again at a slower pace, until
        somebody changes something) or DeliveryError (this publication will never be taken).
        """

    def where(self) -> str:
        """What to tell the user: where the results can be seen, without secrets."""

    def close(self) -> None:
        """Releases the connection; never ends the run."""


@runtime_checkable
class Checking(Protocol):
    """What a Tracker or a Sink may have too: it can tell before there is anything to send whether that would arrive."""

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:
        """One Check for each thing that must hold: reached, found, may be written to. Raises nothing for what does not.

        `now` gives Unix seconds. It is asked beside a running agent, with a connection of its own: it changes no result
        and creates no run; what it must write in order to know, it names.
        """


@runtime_checkable
class TrainingReader(Protocol):
    """What a Tracker may have too: it reads back what the training itself has logged to its run."""

    def training(self, loss_keys: Sequence[str]) -> TrainingLog:
        """Asked after a publication: the loss under the first of these keys that there is, and whether it has ended.

        Without keys no history is read. Raises what it likes: then nothing is known.
        """


@runtime_checkable
class Looking(Protocol):
    """What a Tracker may have too: it can tell at the agent's start whether its place is there, and write nothing."""

    def look(self) -> tuple[Check, ...]:
        """One Check for each thing that must be there: the server, the run. Raises nothing for what is not."""


@runtime_checkable
class HistoryReader(Protocol):
    """What a Tracker may have too: it reads back what publications have left in a run that is named in its settings."""

    def read_back(self, folder: Path) -> KeptRun:
        """The files `peel/checkpoints/*.json`, by step, and the lines of `peel/alerts.jsonl`; writes nothing there.

        `folder` is an empty one that may hold copies meanwhile. Without any such file the run has no reports. Raises as
        `publish`.
        """


@runtime_checkable
class Showing(Protocol):
    """What a Tracker may have too: it shows people a page and images of the run; its plug-in has `shows_pages`."""

    def show(self, pages: Pages) -> None:
        """Copies the files, and adds the images to their series; the same again changes nothing. Raises as `publish`.

        It is called from a thread, and with a connection, of its own. Pages of an earlier time than those that are
        there leave them as they are.
        """


class TrackerPlugin(Protocol):
    """`peel_agent.trackers`: opens a Tracker from its own table of the configuration, `[tracker.<name>]`.

    One whose trackers are Showing has an attribute `shows_pages` that is true.

    One that writes with a package of an extra has an attribute `needs`: the package's name, and the command that
    installs it. `peel-agent plugins` then says whether it is there.
    """

    name: str
    settings: type[Any]
    """A frozen dataclass: the keys that `[tracker.<name>]` may have, with their types and defaults (see `setting`)."""

    def connect(self, settings: Any, *, checkpoint_dir: str, state_dir: Path) -> Tracker:
        """A tracker for the run that writes `checkpoint_dir`, an absolute path or a URL.

        Contacts nobody yet: the first publish may find the server away. What must survive a restart (the id of a run
        that was created) is kept in `state_dir`, written before it is relied on.
        """


class Sink(Protocol):
    """A connection to where notices go, made by a SinkPlugin."""

    def deliver(self, group: NoticeGroup) -> None:
        """Hands over what changed at one moment. It may come twice: the notices' ids tell. Raises as `publish`."""

    def where(self) -> str:
        """What to tell the user: where the notices go, without secrets."""

    def close(self) -> None:
        """Releases the connection."""


class SinkPlugin(Protocol):
    """`peel_agent.sinks`: opens a Sink from a `[[sink]]` table of the configuration.

    One whose place takes silence for the end of an alert has an attribute `resend_seconds`: it is given all that fires,
    as a group that is `standing`, so often. `needs` as of a TrackerPlugin.
    """

    name: str
    settings: type[Any]
    """As of a TrackerPlugin."""

    def connect(self, settings: Any, *, state_dir: Path) -> Sink:
        """A sink. Contacts nobody yet."""


class Engine(Protocol):
    """What peels: it runs requests beside the agent, as many at once as there are leases."""

    def submit(self, request: Request) -> Future[Peeled]:
        """Starts one. The answer is Peeled, or an error of `peel_agent.errors`: WorkerError for a worker that died."""

    def give_way(self, fingerprint: str, why: str) -> None:
        """Ends the work on this checkpoint soon: its answer is GaveWay."""

    def memory_bytes(self) -> int | None:
        """The resident memory of what runs now, None when nothing does or it is elsewhere."""

    def close(self, seconds: float) -> None:
        """Ends everything that runs, within this time; what cannot be ended is left behind."""


@runtime_checkable
class Leasing(Protocol):
    """What an Engine has whose devices are not this machine's: it leases them itself, and minds them itself."""

    def acquire(self) -> DeviceLease | None:
        """A device for one peel, decided now and without waiting; None while all are in use.

        Its `elsewhere` is not empty. Raises DeviceUnavailable (retryable) when none can be had now.
        """

    def release(self, lease: DeviceLease) -> None:
        """Gives it back; once more is nothing."""


class EnginePlugin(Protocol):
    """`peel_agent.engines`: opens an Engine from its own table of the configuration, `[engine.<name>]`.

    `needs` as of a TrackerPlugin.
    """

    name: str
    settings: type[Any]
    """As of a TrackerPlugin."""

    def open(self, environment: Callable[[str], Mapping[str, str]], settings: Any) -> Engine:
        """An engine; `environment` gives a child's by the GPUs that it may see (CUDA_VISIBLE_DEVICES).

        Contacts nobody yet. Raises ConfigurationError for settings that cannot be.
        """
