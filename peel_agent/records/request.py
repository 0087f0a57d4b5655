"""What an engine is asked: one checkpoint to peel, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peel_agent.records.checkpoint import CheckpointRef
from peel_agent.records.device import DeviceLease
from peel_agent.records.past import Before
from peel_agent.records.report import Memory
from peel_agent.records.settings import ModelSettings, PeelSettings, ProbeSettings


@dataclass(frozen=True)
class Request:
    """One checkpoint to peel on the device of a lease, at this niceness.

    The worker takes at most `memory_fraction` of the machine's memory, or of the GPU's. `earlier` are the best bounds
    so far, `before` is the checkpoint to hold this one against (None: nobody asked for that). A `patch` of safetensors
    replaces weights. `threads` is how many it computes with (None: on the CPU half of its processors).

    `helpers` is a socket at which the worker may hand out pieces of its work, `pieces` of them at a time. With `piece`,
    a socket too, only the piece that is read from there is computed.
    """

    ref: CheckpointRef
    probe: ProbeSettings
    peel: PeelSettings
    model: ModelSettings
    lease: DeviceLease
    nice: int
    earlier: Memory | None = None
    before: Before | None = None
    keep_sketches: bool = False
    patch: Path | None = None
    memory_fraction: float = 1.0
    threads: int | None = None
    helpers: Path | None = None
    pieces: int = 0
    piece: Path | None = None
