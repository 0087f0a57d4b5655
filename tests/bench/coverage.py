"""How often the intervals of margins and progress cover: fresh probes of one distribution, one checkpoint.

`python -m tests.bench.coverage CKPT [--since CKPT] [--probes 12]` measures all blocks and parts on disjoint probes from
the standard library's held-out sources, and counts the intervals that hold the mean over all probes. An interval
that promises 95 % should cover in 93 to 97 % (method.md 4c).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import peel_agent
from peel_agent.demo.text import corpus
from peel_agent.records import Estimate, PeelReport

WINDOWS, LENGTH = 320, 128


def estimates(report: PeelReport) -> Iterator[tuple[str, str, Estimate]]:
    """Kind, place and value of every interval of a report."""
    for layer in report.layers:
        places = {layer.name: (layer.margin, layer.progress)}
        places |= {f"{layer.name}/{name}": (part.margin, part.progress) for name, part in layer.parts.items()}
        for place, (margin, progress) in places.items():
            what = "parts" if "/" in place else "blocks"
            if margin is not None:
                yield f"margins of {what}", place, margin
            if progress is not None:
                yield f"progress of {what}", place, progress


def measured(checkpoint: Path, since: Path | None, probes: int) -> dict[tuple[str, str], list[Estimate]]:
    """The estimates of every place, one a probe."""
    held_out = corpus()[1]
    windows = held_out[: len(held_out) // LENGTH * LENGTH].reshape(-1, LENGTH)
    order = np.random.default_rng(1).permutation(len(windows))
    found: dict[tuple[str, str], list[Estimate]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(probes):
            path = Path(folder) / f"probe-{number}.npy"
            np.save(path, windows[order[number * WINDOWS : (number + 1) * WINDOWS]])
            report = peel_agent.scan(checkpoint, probe=path, since=since, quantities=("margin",))
            for kind, place, estimate in estimates(report):
                found[kind, place].append(estimate)
            print(f"probe {number + 1} of {probes}", file=sys.stderr, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--since", type=Path)
    parser.add_argument("--probes", type=int, default=12)
    options = parser.parse_args(arguments)
    covered: dict[str, list[bool]] = defaultdict(list)
    for (kind, _), own in measured(options.checkpoint, options.since, options.probes).items():
        centre = float(np.mean([one.value for one in own]))
        covered[kind] += [one.low <= centre <= one.high for one in own]
    for kind, hits in [*covered.items(), ("all", [hit for own in covered.values() for hit in own])]:
        print(f"{kind:20} {sum(hits):4} of {len(hits):4} cover: {100 * np.mean(hits):.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
