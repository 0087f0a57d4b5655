"""An observation and the rules' states in, their next states out: which alerts begin and end. No clock, no I/O."""

from peel_agent.judge.convergence import fall_of
from peel_agent.judge.judge import KIND_CHANGED, LAYER_GONE, RULE_GONE, judge, withdrawn

__all__ = ["KIND_CHANGED", "LAYER_GONE", "RULE_GONE", "fall_of", "judge", "withdrawn"]
