"""`python -m tests.bench.memory FOLDER`: the peak MiB that margins of the model there add to the process (Linux).

The folder has the checkpoint, and its probe's parts in probe.npz.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from peel_agent.peel import peel
from peel_agent.records import Probe
from tests.bench.__main__ import MARGINS
from tests.bench.shapes import peak, trace_at


def main() -> None:
    folder = Path(sys.argv[1])
    parts = np.load(folder / "probe.npz")
    probe = Probe(parts["fit"], parts["select"], parts["confirm"], "bench")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew: exec hands the parent's on
    before = peak()
    peel(trace_at(folder, probe, "cpu"), MARGINS, time.perf_counter)
    print(peak() - before)


if __name__ == "__main__":
    main()
