"""A trainer's saving, as a process: `python -m tests.runs.restless_writer RUN VERSION STEP KEEP SEED`.

Writes the files of VERSION as RUN/checkpoint-STEP, slowly, in pieces, in any order but for the marker, then removes all
but the newest KEEP, file by file. It may be killed at any moment.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

PIECES = 4
PAUSE_SECONDS = 0.05


def main(run: Path, version: Path, step: int, keep: int, seed: int) -> None:
    dice = random.Random(seed)
    target = run / f"checkpoint-{step}"
    target.mkdir()
    files = sorted(version.iterdir())
    dice.shuffle(files)
    for file in files:
        content = file.read_bytes()
        cuts = sorted(dice.randrange(len(content)) for _ in range(PIECES - 1))
        with (target / file.name).open("wb") as out:
            for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True):
                out.write(content[start:stop])
                out.flush()
                time.sleep(PAUSE_SECONDS)
    (target / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    whole = [path for path in run.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    for old in sorted(whole, key=lambda path: int(path.name.split("-")[1]))[:-keep]:
        for file in [*old.iterdir()]:
            file.unlink()
            time.sleep(PAUSE_SECONDS)
        old.rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]))
