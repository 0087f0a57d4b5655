"""What a worker computes on, and what is seen of the GPUs of this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceLease:
    """The device that one worker may use.

    `name` is the device's name inside the child (`cpu` or `cuda:0`), `visible` is the child's CUDA_VISIBLE_DEVICES:
    empty for the CPU, else a uuid. `label` is for people; `reason` says in one sentence why this device and no other.
    A device that is not this machine's has a name `elsewhere`, given by the engine that leased it.
    """

    name: str
    visible: str
    label: str
    reason: str
    elsewhere: str = ""

    @property
    def key(self) -> str:
        """Tells it from the other devices of its agent; empty for this machine's CPU."""
        return self.elsewhere or self.visible


@dataclass(frozen=True)
class SeenDevice:
    """One GPU, or one MIG slice of a GPU, as it stands at one moment.

    `place` counts the GPUs of this machine by PCI bus id, from 0 (None: that cannot be read). Memory is in bytes,
    `utilisation` in per cent, `processes` are process numbers of the host (None: not reported). `why_not` says why
    nothing may be started there now; None when it is idle. Of a GPU that cannot be read, what is known is filled in.
    """

    uuid: str
    name: str
    place: int | None
    is_slice: bool = False
    free: int = 0
    total: int = 0
    utilisation: int | None = None
    processes: tuple[int, ...] | None = ()
    why_not: str | None = None

    @property
    def label(self) -> str:
        """Such as `GPU 1 (NVIDIA H100, GPU-1234abcd...)`."""
        kind = "MIG slice of GPU" if self.is_slice else "GPU"
        numbered = f"a {kind}" if self.place is None else f"{kind} {self.place}"
        short = f"{self.uuid[:12]}..." if len(self.uuid) > 15 else self.uuid
        known = ", ".join(part for part in (self.name, short) if part)
        return f"{numbered} ({known})" if known else numbered
