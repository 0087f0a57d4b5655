"""When a GPU is idle: what one look must show, and for how long every look must have shown it.

A trainer that saves, evaluates or waits for data looks idle for seconds; so one look is never enough. Its process and
its memory stay, but in a container the processes of others may be hidden, and then its memory is what gives it away.
"""

from __future__ import annotations

from dataclasses import dataclass

from peel_agent.devices.nvml import Reading

GIB = 2**30

BUSY_PERCENT = 10
"""The utilisation from which a GPU counts as busy."""

WATCHED_SECONDS = 30
"""How long every look must have found a GPU free."""

LONGEST_GAP = 15
"""Seconds between two looks beyond which nothing is known of the time between."""

UNSEEN_BYTES = GIB
"""Memory in use without a process to be seen: beyond it, or a tenth of the GPU's, there is one that is hidden."""


def why_not(reading: Reading, fraction: float, *, named: bool, allotted: bool, residue: bool = False) -> str | None:
    """Why nothing may be started on this device at this moment; None when it is free.

    `fraction` of its memory must be free. Where utilisation is not reported (None), the device is used only if it was
    `named`, or is a MIG slice that a scheduler `allotted`; where processes are not reported, only if it was named.
    `residue`: the utilisation is still that of our own child.
    """
    if reading.trouble:
        return reading.trouble
    return (
        _closed(reading, named=named)
        or _occupied(reading, fraction, named=named)
        or _at_work(reading, may_be_unknown=named or (allotted and bool(reading.gpu)), residue=residue)
    )


def _closed(reading: Reading, *, named: bool) -> str | None:
    if reading.mode == "prohibited":
        return "its compute mode is prohibited: no process may compute on it"
    if reading.mode and not named:  # a trainer that starts meanwhile would be refused
        return f"its compute mode is {reading.mode}: a peel there would lock a training out"
    return None


def _occupied(reading: Reading, fraction: float, *, named: bool) -> str | None:
    if reading.processes is None and not named:
        return "its processes are not reported, and it was not named"
    if reading.processes:
        return f"{processes(reading.processes)} on it"
    if reading.used > min(UNSEEN_BYTES, reading.total // 10):
        return f"{reading.used / GIB:.1f} GiB of it are in use, by no process that can be seen from here"
    if reading.free < fraction * reading.total:
        return f"{reading.free / GIB:.1f} of {reading.total / GIB:.1f} GiB are free; {fraction:.0%} are asked for"
    return None


def _at_work(reading: Reading, *, may_be_unknown: bool, residue: bool) -> str | None:
    if reading.utilisation is None:
        return (
            None if may_be_unknown else "its utilisation is not reported, and it was neither named nor allotted to us"
        )
    if reading.utilisation >= BUSY_PERCENT and not residue:
        return f"its utilisation is {reading.utilisation} %"
    return None


def processes(numbers: tuple[int, ...]) -> str:
    """Such as `process 12 computes`, `processes 12, 13 compute`, `processes 12, 13, 14 and 5 more compute`."""
    if len(numbers) == 1:
        return f"process {numbers[0]} computes"
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"processes {', '.join(map(str, numbers[:3]))}{more} compute"


@dataclass(frozen=True)
class _Quiet:
    since: float
    until: float


class QuietTimes:
    """Since when every look has found each device free."""

    def __init__(self) -> None:
        self._quiet: dict[str, _Quiet] = {}

    def note(self, free: dict[str, bool], now: float) -> None:
        """One look at every device: its uuid, and whether it was free. What was not looked at is forgotten."""
        self._quiet = {uuid: self._longer(uuid, now) for uuid, is_free in free.items() if is_free}

    def _longer(self, uuid: str, now: float) -> _Quiet:
        quiet = self._quiet.get(uuid)
        if quiet is None or not 0 <= now - quiet.until <= LONGEST_GAP:
            return _Quiet(now, now)
        return _Quiet(quiet.since, now)

    def seconds(self, uuid: str) -> float | None:
        """For how long the device has been free, as of the last look; None when it was not."""
        quiet = self._quiet.get(uuid)
        return None if quiet is None else quiet.until - quiet.since

    def why_not(self, uuid: str) -> str | None:
        """What is missing until the device counts as idle; None when nothing is."""
        seconds = self.seconds(uuid)
        if seconds is not None and seconds >= WATCHED_SECONDS:
            return None
        return f"it has not been seen free for {WATCHED_SECONDS} s yet"  # no count: a changed reason is told anew
