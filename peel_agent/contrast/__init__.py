"""contrast: two reports -> DifferenceReport, and what it comes to in a sentence. Pure: neither torch nor numpy."""

from peel_agent.contrast.contrast import contrast
from peel_agent.contrast.runs import contrast_runs
from peel_agent.contrast.verdict import difference_verdict, is_worse, newly_below

__all__ = ["contrast", "contrast_runs", "difference_verdict", "is_worse", "newly_below"]
