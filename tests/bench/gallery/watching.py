"""The real agent beside every run of the gallery, from its first checkpoint to its last.

`python -m tests.bench.gallery.watching --out DIR` runs `peel-agent watch --once` over each finished training and keeps
its reports in DIR/<model>-<seed>/<fault>/reports. The checkpoints before a fault are those of the healthy twin: the
agent's state after them is kept, and each run goes on from a copy of it, in the same place.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from tests.bench.gallery.trainings import FORK_AT, RUNS, SAVE_EVERY, SHORT, STEPS, Run

CONFIGURATION = """\
[watch]
settle_seconds = 0
poll_seconds = 1

[peel]
quantities = ["margin"]

[tracker]
use = ["jsonl"]

[device]
memory_fraction = 0.9
nice = 0
"""


def watch(run: Run, out: Path) -> None:
    """The agent's reports of a finished training, unless they are there already."""
    folder = out / str(run)
    if (folder / "reports").exists() or not (folder / "truth.json").exists():
        return
    arena = out / "arena" / f"{run.model}-{run.seed}"
    prefix = out / "arena" / f"{run.model}-{run.seed}-prefix"
    shares_prefix = not json.loads((folder / "truth.json").read_text())["from_start"]
    if shares_prefix and not prefix.exists():
        _watch_again(run, out, arena, range(SAVE_EVERY, FORK_AT + 1, SAVE_EVERY))
        shutil.copytree(arena / "state", prefix)
    _clear(arena)
    if shares_prefix:
        shutil.copytree(prefix, arena / "state")
    _run_agent(run, out, arena, range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
    (reports,) = (arena / "state").glob("runs/*/reports")
    shutil.copytree(reports, folder / "tmp-reports", dirs_exist_ok=True)
    (folder / "tmp-reports").rename(folder / "reports")
    print(f"{run}: watched", flush=True)


def _clear(arena: Path) -> None:
    shutil.rmtree(arena, ignore_errors=True)
    arena.mkdir(parents=True)


def _watch_again(run: Run, out: Path, arena: Path, steps: Sequence[int]) -> None:
    _clear(arena)
    _run_agent(run, out, arena, steps)


def _run_agent(run: Run, out: Path, arena: Path, steps: Sequence[int]) -> None:
    """One `peel-agent watch --once` over the checkpoints of these steps; the state goes on from what is there."""
    for step in steps:
        name = f"checkpoint-{step}"
        shutil.copytree(out / str(run) / "checkpoints" / name, arena / "checkpoints" / name, copy_function=os.link)
    (arena / "peel.toml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "peel_agent", "watch", str(arena / "checkpoints"), "--once"]
    command += ["-c", str(arena / "peel.toml"), "--probe", str(out / "probe.npy"), "--state", str(arena / "state")]
    if run.recipe.weight_set is not None:
        command += ["--precision", f"model.layers.*_proj.weight={run.recipe.weight_set}"]
    with (out / str(run) / "agent.log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="*", metavar="GLOB", help="runs by name, as in llama-0/*")
    parser.add_argument("--short", action="store_true", help="only the runs of SHORT")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every Nth model and seed, from the Ith")
    options = parser.parse_args(arguments)
    runs = [run for run in (SHORT if options.short else RUNS) if fnmatch(str(run), options.only)]
    first, of = (int(number) for number in options.shard.split("/"))
    homes = list(dict.fromkeys((run.model, run.seed) for run in runs))[first::of]
    for run in runs:
        if (run.model, run.seed) in homes:
            watch(run, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
