"""The numbers from which on something is said, chosen on one half of the gallery's runs (docs/proof.md)."""

CHANGED_BLOCK = 1.75
"""A block or part changed unusually when it moved so many times as far, beside the other blocks, as it usually does;"""

CHANGED_MATRIX = 2.0
"""or when its matrix that moved farthest did."""

FIRST_CHANGED_BLOCK, FIRST_CHANGED_MATRIX = 2.5, 4.0
"""The same at the first comparison of a run, when nothing is known of what is usual."""

OUTSHONE = 0.25
"""A layer whose change is less than this fraction of another layer's is not named: it adapts to that one."""

ISOLATED = 1.4
"""A change that does not stand out is named only when it is so many times any other layer's: in a run that learns
slowly several layers begin to move at once."""

STILL = 0.1
"""A block that moved less than this fraction of what the others did learns nothing."""

MOVING = 0.3
"""One that moved so far once was not frozen from the start."""

REGRESSED = 0.015
"""A layer got worse when its earlier weights win more than this fraction of the loss: those of healthy layers were seen
to win 0.01 of it at a constant learning rate;"""

OUTSTANDING = 1.5
"""and more than so many times what those of any other layer win, now or before."""

DROPPED = 0.5
"""A margin dropped when it certainly fell by this fraction of what it was;"""

KEPT = 0.5
"""and the other blocks' margins kept this fraction of what they were, or the run is changing, not the layer."""

DROP_CHECKPOINTS = 3
"""A margin is held against so many before it."""

FLOODING = 0.9
"""A block's share of the stream from which on it can drown what the others add."""

EARLY = 0.5
"""A run is early while more than this fraction of its blocks is not certainly above its stand-ins."""

IMPROVABLE = 2.0
"""Headroom speaks when it is so many times what the same block had before, or stands while the loss is flat."""

FLAT = 0.005
"""The loss is flat when it fell by less than this fraction over the last checkpoints."""

DIVERGED = 0.05
"""A run diverged when its loss is certainly higher than it was, by this fraction, and no layer stands out."""

STANDS_OUT = 2.0
"""A change of so many times its limit stands out. In a run that diverged every layer moves oddly, and only one that
stands out is named."""
