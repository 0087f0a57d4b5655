"""How fast this machine runs Python just now: the unit in which a test tells processor time."""

from __future__ import annotations

import pickle
import pickletools
import time

_MILLION = pickle.dumps([None] * 1_000_000)


def yardstick() -> float:
    """Seconds of processor time in which pickletools names the operations of a pickle of a million, keeping nothing."""
    began = time.process_time()
    for _ in pickletools.genops(_MILLION):
        pass
    return time.process_time() - began
