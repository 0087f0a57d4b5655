"""watch: a folder that a trainer writes -> CheckpointRef, once a checkpoint is whole and at rest. Imports no torch."""

from peel_agent.watch.events import Hints
from peel_agent.watch.pins import Pins, copied
from peel_agent.watch.queue import Queue
from peel_agent.watch.scan import Sighting, scan
from peel_agent.watch.settle import Observed, Settling, checkpoint_ref, fingerprint

__all__ = [
    "Hints",
    "Observed",
    "Pins",
    "Queue",
    "Settling",
    "Sighting",
    "checkpoint_ref",
    "copied",
    "fingerprint",
    "scan",
]
