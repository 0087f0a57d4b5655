"""PeelReport and those before it in, the same report with findings out: what is wrong, in words. No clock, no I/O."""

from peel_agent.diagnose.diagnosis import diagnose
from peel_agent.diagnose.lineage import lineage

__all__ = ["diagnose", "lineage"]
