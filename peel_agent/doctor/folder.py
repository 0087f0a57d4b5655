"""What is in a folder of checkpoints, and the model in the newest of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peel_agent import registry
from peel_agent.config import worker_environment
from peel_agent.errors import ConfigurationError, PeelError, WorkerError
from peel_agent.records import CheckpointRef, ModelSettings, ProbeSettings, plain
from peel_agent.spi import Format
from peel_agent.watch import Settling, Unread, scan
from peel_agent.watch.nearby import contents, misplaced, of_folder

CHILD_SECONDS = 300.0
"""So long a child may take to open a checkpoint and a probe: longer than a slow file server needs for their headers."""

MAX_LENGTH = 1024
"""Tokens a sequence by default, where the model's context is not shorter (CONTRACT, Probe)."""


@dataclass(frozen=True)
class Checkpoints:
    """What is in a folder: `whole` oldest first, the others with the reason.

    Where nothing is whole, `misplaced` says what only somebody's doing can mend, or else `other` what is there instead.
    """

    whole: tuple[CheckpointRef, ...]
    waiting: tuple[Unread, ...]
    unreadable: tuple[Unread, ...]
    misplaced: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    @property
    def newest(self) -> CheckpointRef | None:
        """The one of the last step, or the last without a step when none has one."""
        stepped = [ref for ref in self.whole if ref.step is not None]
        return stepped[-1] if stepped else self.whole[-1] if self.whole else None


def checkpoints_in(root: Path, format_name: str, markers: Sequence[str], now: float) -> Checkpoints:
    """The checkpoints of a folder at the time `now`, in Unix seconds. Raises ConfigurationError as `scan` does."""
    formats: tuple[Format, ...] = registry.formats(format_name)
    observed = Settling(0.0).observe(scan(root, formats, markers), now)
    checkpoints = Checkpoints(observed.ready, observed.waiting, observed.unreadable)
    if observed.ready:
        return checkpoints
    label, listing = str(root.resolve()), of_folder(root)
    wrong = misplaced(listing, label, formats)
    return replace(checkpoints, misplaced=wrong, other=() if wrong else contents(listing, label, formats))


@dataclass(frozen=True)
class Model:
    """The model of a checkpoint. `vocabulary` and `context` are None for a fully connected network."""

    family: str
    blocks: int
    width: int
    vocabulary: int | None
    context: int | None
    parameters: int
    precision: str

    @property
    def words(self) -> str:
        """Such as `llama, 24 blocks, width 2,048, vocabulary 32,000, context 4,096, 1,100,048,384 parameters (F32)`."""
        what = "blocks" if self.context is not None else "layers"
        sizes = f"{self.family}, {self.blocks} {what}, width {self.width:,}"
        if self.vocabulary is not None and self.context is not None:
            sizes += f", vocabulary {self.vocabulary:,}, context {self.context:,}"
        return f"{sizes}, {self.parameters:,} parameters ({self.precision})"


@dataclass(frozen=True)
class Opened:
    """A child's answer: the libraries that it imported, the model or its fault, the probe in words or its fault."""

    libraries: str
    broken: PeelError | None = None
    model: Model | None = None
    fault: PeelError | None = None
    probe: str | None = None
    probe_fault: PeelError | None = None


def opened_by_child(
    ref: CheckpointRef | None, model: ModelSettings, probe: ProbeSettings, *, quick: bool = False
) -> Opened:
    """Has a child import torch, and open a checkpoint and a probe if there are any. WorkerError: it died."""
    request = {
        "ref": None if ref is None else plain(ref),
        "model": plain(model),
        "probe": plain(probe),
        "quick": quick,
    }
    return _answer(ask_child(request))


def ask_child(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a child process to one request."""
    # -P: the working directory may be a checkpoint's, with a torch.py in it.
    command = [sys.executable, "-P", "-m", "peel_agent.doctor.model_child"]
    try:
        child = subprocess.run(  # noqa: S603 - our own interpreter
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
            env=worker_environment(""),
            timeout=CHILD_SECONDS,
            process_group=0,  # Ctrl-C is for the command, not for its children
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(
            f"the model was not opened within {CHILD_SECONDS:.0f} s",
            remedy="look at the file system of the checkpoints and of the probe",
        ) from error
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["nothing"])[-1]
        raise WorkerError(
            f"the child that opens the model ended with status {child.returncode}: {last}",
            remedy="SIGKILL (-9) usually means that memory ran out; please report anything else",
        )
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _answer(form: dict[str, Any]) -> Opened:
    return Opened(
        libraries=form["libraries"],
        broken=_fault(form.get("broken")),
        model=Model(**form["model"]) if "model" in form else None,
        fault=_fault(form.get("fault")),
        probe=form.get("probe"),
        probe_fault=_fault(form.get("probe_fault")),
    )


def _fault(form: dict[str, str] | None) -> PeelError | None:
    return None if form is None else PeelError(form["what"], remedy=form["remedy"])


@dataclass(frozen=True)
class WatchedPlace:
    """What `init` found: the place, the newest checkpoint and its model; or why there is none."""

    place: str
    checkpoints: Checkpoints | None = None
    opened: Opened | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was found, in words."""
        if self.checkpoints is None:
            return (f"{self.place} is in an object store; it was not looked into",)
        newest = self.checkpoints.newest
        if newest is None:
            others = (*self.checkpoints.unreadable, *self.checkpoints.waiting)
            reasons = tuple(f"{unread.place}: {unread.words}" for unread in others[:3])
            return (
                f"{self.place} holds no whole checkpoint yet",
                *reasons,
                *self.checkpoints.misplaced,
                *self.checkpoints.other,
            )
        count = len(self.checkpoints.whole)
        said = [
            f"{self.place} holds {count} whole checkpoint{'s' if count != 1 else ''}, "
            f"the last {newest.path.name} of the format {newest.format}"
            + (f", step {newest.step:,}" if newest.step is not None else "")
        ]
        if newest.path == Path(self.place):
            said.append("it is itself one checkpoint: to watch a run, give the folder that its checkpoints are in")
        if self.opened is not None and self.opened.model is not None:
            said.append(f"its model: {self.opened.model.words}")
        fault = self.opened and (self.opened.broken or self.opened.fault)
        if fault:
            said.append(f"its model cannot be opened: {fault.what}; {fault.remedy}")
        return tuple(said)

    @property
    def sequence_length(self) -> int | None:
        """The probe's sequence length by default; None when the model is not known."""
        model = None if self.opened is None else self.opened.model
        return None if model is None or model.context is None else min(model.context, MAX_LENGTH)


def watched_place(root: Path, now: float) -> WatchedPlace:
    """What is in a folder, for its configuration. Raises ConfigurationError when it is none, or may not be listed."""
    root = root.expanduser().resolve()
    if not root.is_dir():
        raise ConfigurationError(
            f"{root} is no directory", remedy="give the directory that the training writes its checkpoints to"
        )
    checkpoints = checkpoints_in(root, "auto", (), now)
    if checkpoints.newest is None:
        return WatchedPlace(str(root), checkpoints)
    try:
        opened = opened_by_child(checkpoints.newest, ModelSettings(), ProbeSettings())
    except WorkerError as error:
        opened = Opened("", fault=error)
    return WatchedPlace(str(root), checkpoints, opened)
