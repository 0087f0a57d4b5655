"""capture: Snapshot and Probe -> Trace, the model ready to be run block by block."""

from peel_agent.capture.past import PastBlocks
from peel_agent.capture.trace import open_trace, settled

__all__ = ["PastBlocks", "open_trace", "settled"]
