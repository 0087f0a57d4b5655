"""watch: what a trainer writes -> CheckpointRef, once a checkpoint is whole and at rest. Imports no torch."""

from peel_agent.watch.earlier import Earlier
from peel_agent.watch.events import Hints
from peel_agent.watch.fetch import fetch
from peel_agent.watch.mirror import Mirror
from peel_agent.watch.pins import Pins
from peel_agent.watch.queue import Queue
from peel_agent.watch.reserve import ROOM, USUAL, Reserve
from peel_agent.watch.scan import Sighting, inspected, scan
from peel_agent.watch.settle import GIVE_UP_SECONDS, Observed, Settling, Unread, checkpoint_ref, fingerprint
from peel_agent.watch.source import Bucket, Folder, Source
from peel_agent.watch.store import Store, is_url

__all__ = [
    "GIVE_UP_SECONDS",
    "ROOM",
    "USUAL",
    "Bucket",
    "Earlier",
    "Folder",
    "Hints",
    "Mirror",
    "Observed",
    "Pins",
    "Queue",
    "Reserve",
    "Settling",
    "Sighting",
    "Source",
    "Store",
    "Unread",
    "checkpoint_ref",
    "fetch",
    "fingerprint",
    "inspected",
    "is_url",
    "scan",
]
