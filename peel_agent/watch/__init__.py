"""watch: a folder that a trainer writes -> CheckpointRef, once a checkpoint is whole and at rest. Imports no torch."""

from peel_agent.watch.events import Hints
from peel_agent.watch.scan import Sighting, scan
from peel_agent.watch.settle import Observed, Settling, checkpoint_ref, fingerprint

__all__ = ["Hints", "Observed", "Settling", "Sighting", "checkpoint_ref", "fingerprint", "scan"]
