"""`peel-agent` with an engine that is slower than any training: `python -m tests.runs.late_agent watch ...`.

It reads nothing before the file that `GO` names in the environment is there; then every tensor of each checkpoint, and
notes in `PEELS` the step that it was told and the number that fills the tensors.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from peel_agent import registry
from peel_agent.cli import main
from peel_agent.pipeline import check_unchanged
from peel_agent.records import Peeled, Request
from tests.runs.stoppable import InstantEngine, report_of


class LateEngine(InstantEngine):
    def __init__(self, peels: Path, go: Path) -> None:
        super().__init__(peels)
        self._file, self._go = peels, go
        self._threads = ThreadPoolExecutor(1)

    def submit(self, request: Request) -> Future[Peeled]:
        return self._threads.submit(self._peel, request)

    def _peel(self, request: Request) -> Peeled:
        while not self._go.exists():
            time.sleep(0.05)
        ref = request.ref
        (form,) = (one for one in registry.formats() if one.name == ref.format)
        weights = form.open(ref.in_place())
        numbers = {value for name in weights.shapes() for value in weights.read(name).unique().tolist()}
        check_unchanged(ref, form)
        with self._file.open("a") as file:
            file.write(f"{ref.step}:{','.join(f'{number:g}' for number in sorted(numbers))}\n")
        return Peeled(report_of(request), None)

    def close(self, seconds: float) -> None:
        self._go.touch()
        self._threads.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _NoSettings:
    pass


class _Plugin:
    name = "late"
    settings = _NoSettings

    def open(self, environment: object, settings: object) -> LateEngine:
        return LateEngine(Path(os.environ["PEELS"]), Path(os.environ["GO"]))


if __name__ == "__main__":
    registry.engine = lambda _name: _Plugin()  # type: ignore[assignment, return-value]
    sys.exit(main(sys.argv[1:]))
