"""The checkpoint that was judged last: held until the next one is peeled, which is held against it."""

from __future__ import annotations

from dataclasses import dataclass

from peel_agent.records import CheckpointRef
from peel_agent.watch.pins import Pins


@dataclass
class Earlier:
    """`ref` is None before the first, and when its files are not held."""

    pins: Pins
    ref: CheckpointRef | None = None

    def is_it(self, ref: CheckpointRef) -> bool:
        return self.ref is not None and self.ref.fingerprint == ref.fingerprint

    def replace(self, ref: CheckpointRef) -> None:
        """Holds on to this checkpoint, and lets go of the one before it."""
        before, self.ref = self.ref, ref
        if before is not None and before.fingerprint != ref.fingerprint:
            self.pins.release(before)

    def make_room(self) -> bool:
        """Whether it had to be let go of, its file system having too little free: the training needs what is left."""
        return self._is_held() and self.pins.crowded() and self.let_go()

    def let_go(self) -> bool:
        """Whether its files were held until now."""
        if self.ref is None or self.ref.held is None:
            return False
        self.pins.release(self.ref)
        self.ref = None
        return True

    def _is_held(self) -> bool:
        return self.ref is not None and self.ref.held is not None
