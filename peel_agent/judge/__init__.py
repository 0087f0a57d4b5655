"""PeelReport and what was known before in, Verdict out: which alerts begin and which end. No clock, no I/O."""

from peel_agent.judge.verdict import judge, withdraw

__all__ = ["judge", "withdraw"]
