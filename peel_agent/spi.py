"""What a plug-in implements: one small protocol a kind, and why each method is there.

A plug-in is an object named by an entry point of the group `peel_agent.<kind>`; it may import `peel_agent.spi`,
`peel_agent.records` and `peel_agent.errors`, nothing else of this package. `peel_agent.testing` holds a conformance
kit for each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from peel_agent.records import Anatomy, CheckpointRef, Publication, Readiness, Stack, Weights

KINDS = ("formats", "families", "trackers", "sinks", "engines")
"""Every plug-in kind of the contract; the entry point group is `peel_agent.` + kind."""


class Format(Protocol):
    """`peel_agent.formats`: one way in which trainers write checkpoints.

    The first three methods run in the parent daemon: they must not import torch and must not read tensor data.
    """

    name: str

    def recognise(self, path: Path) -> bool:
        """Is this path a checkpoint of this format, complete or in the making? Decided by names, cheaply."""

    def inspect(self, path: Path) -> Readiness:
        """Is it whole? Reads markers and headers. A path that vanished is `incomplete`, never an exception."""

    def step(self, path: Path) -> int | None:
        """The training step that the checkpoint itself names, or None."""

    def open(self, ref: CheckpointRef) -> Weights:
        """The tensors. Raises CheckpointError for what it refuses to read. Runs in the worker."""


class Family(Protocol):
    """`peel_agent.families`: where the blocks and their parts are in one group of architectures."""

    name: str
    model_types: frozenset[str]
    """The values of `model_type` in config.json that this family covers."""

    def anatomy(self, config: Mapping[str, Any]) -> Anatomy | Stack:
        """Module names for a model of this configuration, or where the layers of a fully connected network are."""


class Tracker(Protocol):
    """A connection to the place where a run's numbers are kept, made by a TrackerPlugin."""

    def publish(self, publication: Publication) -> None:
        """Writes one checkpoint's results; writing the same again changes nothing.

        Raises TrackerUnavailable (to be tried again) or TrackerError (never will work).
        """

    def where(self) -> str:
        """What to tell the user: where the results can be seen, without secrets."""

    def close(self) -> None:
        """Releases the connection; never ends the run."""


class TrackerPlugin(Protocol):
    """`peel_agent.trackers`: opens a Tracker from its own table of the configuration, `[tracker.<name>]`."""

    name: str
    options: frozenset[str]
    """The keys that `[tracker.<name>]` may have; any other is a configuration error."""

    def connect(self, options: Mapping[str, str], *, checkpoint_dir: str, state_dir: Path) -> Tracker:
        """A tracker for the run that writes `checkpoint_dir`, an absolute path or a URL.

        Contacts nobody yet: the first publish may find the server away. What must survive a restart (the id of a run
        that was created) is kept in `state_dir`, written before it is relied on.
        """
