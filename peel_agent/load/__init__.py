"""load: CheckpointRef -> Snapshot (a model on the meta device and its weights) and Probe (token ids)."""

from peel_agent.load.probe import ProbeSizes, load_probe
from peel_agent.load.snapshot import open_snapshot

__all__ = ["ProbeSizes", "load_probe", "open_snapshot"]
