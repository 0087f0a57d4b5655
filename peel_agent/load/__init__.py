"""load: CheckpointRef -> Snapshot (a model on the meta device and its weights) or Network, and their probes."""

from peel_agent.load.equality import differing_weights
from peel_agent.load.network import load_samples, open_network
from peel_agent.load.probe import (
    ProbeSizes,
    Tokens,
    check_vocabulary,
    cut,
    difference_of_vocabularies,
    load_probe,
    read_tokens,
    split,
)
from peel_agent.load.snapshot import open_snapshot

__all__ = [
    "ProbeSizes",
    "Tokens",
    "check_vocabulary",
    "cut",
    "difference_of_vocabularies",
    "differing_weights",
    "load_probe",
    "load_samples",
    "open_network",
    "open_snapshot",
    "read_tokens",
    "split",
]
