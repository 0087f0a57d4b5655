"""`python -m tests.bench.memory FOLDER`: the peak MiB that margins of this checkpoint add to the process (Linux)."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from peel_agent.peel import peel
from tests.bench.__main__ import MARGINS, VOCABULARY
from tests.bench.shapes import probe_of, trace_at


def peak() -> float:
    """The high-water mark of resident memory in MiB."""
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) / 1024


def main() -> None:
    probe = probe_of(22_528, VOCABULARY)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew: exec hands the parent's on
    before = peak()
    peel(trace_at(Path(sys.argv[1]), probe, "cpu"), MARGINS, time.perf_counter)
    print(peak() - before)


if __name__ == "__main__":
    main()
