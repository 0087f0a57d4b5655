"""`peel-agent` with an engine that answers at once: `python -m tests.runs.instant_agent watch ...`.

All else is real: the loop, the ledger, the courier's process, the trackers. `PEELS` in the environment names the file
where each peel is noted, `REPORTS` a function of another module that gives each report (`module:name`).
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from peel_agent import registry
from peel_agent.cli import main
from tests.runs.stoppable import InstantEngine


@dataclass(frozen=True)
class _NoSettings:
    pass


class _Plugin:
    name = "instant"
    settings = _NoSettings

    def open(self, environment: object, settings: object) -> InstantEngine:
        module, _, name = os.environ.get("REPORTS", "tests.runs.stoppable:report_of").partition(":")
        return InstantEngine(Path(os.environ["PEELS"]), getattr(importlib.import_module(module), name))


if __name__ == "__main__":
    registry.engine = lambda _name: _Plugin()  # type: ignore[assignment, return-value]
    sys.exit(main(sys.argv[1:]))
