"""Chooses a spare device for a peel, leases it, and sees when somebody else moves in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peel_agent.devices.allocation import allotment, named, out_of_range
from peel_agent.devices.idle import GIB, QuietTimes, processes, why_not
from peel_agent.devices.locks import DeviceLock, lock
from peel_agent.devices.nvml import Look, Reading, look
from peel_agent.devices.processes import own_processes
from peel_agent.errors import ConfigurationError, DeviceUnavailable
from peel_agent.records.device import DeviceLease, SeenDevice

CONTEXT_BYTES = 2 * GIB
"""What a child takes beyond its fraction: the CUDA context and the libraries' workspaces, which no fraction limits."""

RESIDUE_SECONDS = 2
"""How long after a lease the utilisation that NVML reports is still that of our own child (it averages over <= 1 s)."""

INSTALL = 'pip install "peel-agent[nvidia]", with NVIDIA\'s driver on this machine, or use cpu'


@dataclass(frozen=True)
class _Held:
    lock: DeviceLock
    processes: frozenset[int]
    used: int


class Devices:
    """The devices that one agent may use, and those it has leased. Not for use by several threads at once.

    `select` is `auto`, `cpu`, `cuda:N` or a uuid. `memory_fraction` of a GPU must be free, and a child may take as
    much. `locks` is the folder of the lock files, the same for all agents of a machine. `allocation` is
    CUDA_VISIBLE_DEVICES as this process has it (None: not set). `now` is a clock in seconds. `sample` is to be called
    about every 5 s.
    """

    def __init__(
        self,
        select: str,
        memory_fraction: float,
        locks: Path,
        allocation: str | None,
        now: Callable[[], float],
        *,
        own: Callable[[], frozenset[int] | None] = own_processes,
    ) -> None:
        self._select = select
        self._fraction = memory_fraction
        self._locks = locks
        self._allocation = allocation
        self._now = now
        self._own = own
        self._quiet = QuietTimes()
        self._held: dict[str, _Held] = {}
        self._released: dict[str, float] = {}
        self._was_there = False  # the named device

    def survey(self) -> tuple[SeenDevice, ...]:
        """Every device that is ours, as it stands now; it does not count as a look for the record.

        Locks of other agents do not show here: only `acquire` tries them.
        """
        return tuple(_seen(reading, self._why_not(reading)) for reading in self._ours(look()))

    def sample(self) -> None:
        """Looks at every device and keeps in the record whether it was free."""
        if self._select != "cpu":
            self._look()

    def acquire(self) -> DeviceLease:
        """A device for one peel, decided now and without waiting: for `auto` an idle GPU, or else the CPU.

        Raises, for a device that was named, ConfigurationError when there is no such device here, and DeviceUnavailable
        (retryable) when it is busy, locked or cannot be read now.
        """
        if self._select == "cpu":
            return _cpu("`device.select` is `cpu`")
        seen = self._look()
        return self._acquire_idle(seen) if self._select == "auto" else self._acquire_named(seen)

    def release(self, lease: DeviceLease) -> None:
        """Gives the device back, once the child has ended. A lease of the CPU, or one given back before, is nothing."""
        held = self._held.pop(lease.visible, None)
        if held is not None:
            held.lock.release()
            self._released[lease.visible] = self._now()

    def must_give_way(self, lease: DeviceLease) -> str | None:
        """One sentence when somebody else moved in on the leased GPU, or it can no longer be watched; else None."""
        held = self._held.get(lease.visible)
        if held is None:
            return None
        ours = self._own()
        seen = look()
        reading = next((reading for reading in seen.readings if reading.uuid == lease.visible), None)
        if reading is None:
            return f"{lease.label} can no longer be seen: {seen.blind or seen.uncountable or 'it is gone'}"
        reason = self._somebody_else(held, reading, ours)
        return None if reason is None else f"{lease.label}: {reason}"

    def _ours(self, seen: Look) -> tuple[Reading, ...]:
        return allotment(seen, self._allocation).usable

    def _look(self) -> Look:
        """One look, for the record. A device of ours counts as free while nobody else is on it."""
        ours = self._own() if self._held else None
        seen = look()
        free = {}
        for reading in self._ours(seen):
            held = self._held.get(reading.uuid)
            reason = self._busy(reading) if held is None else self._somebody_else(held, reading, ours)
            free[reading.uuid] = reason is None
        self._quiet.note(free, self._now())
        return seen

    def _busy(self, reading: Reading) -> str | None:
        released = self._released.get(reading.uuid)
        return why_not(
            reading,
            self._fraction,
            named=self._select not in ("auto", "cpu"),
            allotted=self._allocation is not None,
            residue=released is not None and 0 <= self._now() - released < RESIDUE_SECONDS,
        )

    def _why_not(self, reading: Reading) -> str | None:
        if reading.uuid in self._held:
            return "this agent computes on it"
        return self._busy(reading) or self._quiet.why_not(reading.uuid)

    def _acquire_idle(self, seen: Look) -> DeviceLease:
        if seen.blind:
            return _cpu(seen.blind)
        ours = allotment(seen, self._allocation)
        reasons = {reading: self._why_not(reading) for reading in ours.usable}
        for reading in sorted(ours.usable, key=lambda reading: reading.free, reverse=True):
            if reasons[reading] is None:
                locked = lock(self._locks, reading.uuid)
                if not isinstance(locked, str):
                    reasons[reading] = f"idle for {self._quiet.seconds(reading.uuid):.0f} s, and chosen"
                    return self._leased(reading, locked, _listed(reasons, ours.note))
                reasons[reading] = locked
        return _cpu(_listed(reasons, ours.note) or "there is no GPU here")

    def _acquire_named(self, seen: Look) -> DeviceLease:
        try:
            if seen.blind:
                kind = ConfigurationError if seen.is_absent else DeviceUnavailable
                raise kind(f"`device.select` is `{self._select}`: {seen.blind}", remedy=INSTALL)
            reading = named(seen, self._select, self._allocation)
        except ConfigurationError as error:
            if self._was_there:  # it is the machine that changed, not the configuration
                raise DeviceUnavailable(error.what, remedy=error.remedy) from error
            raise
        self._was_there = True
        reason = self._why_not(reading)
        if reason is None:
            locked = lock(self._locks, reading.uuid)
            if not isinstance(locked, str):
                return self._leased(reading, locked, _named(self._select, reading))
            reason = locked
        raise DeviceUnavailable(
            f"`device.select` is `{self._select}`; {_seen(reading).label} is not free: {reason}",
            remedy="it is asked for again; name another GPU, or use auto or cpu, not to wait for it",
        )

    def _leased(self, reading: Reading, locked: DeviceLock, reason: str) -> DeviceLease:
        self._held[reading.uuid] = _Held(locked, frozenset(reading.processes or ()), reading.used)
        return DeviceLease(name="cuda:0", visible=reading.uuid, label=_seen(reading).label, reason=reason)

    def _somebody_else(self, held: _Held, reading: Reading, ours: frozenset[int] | None) -> str | None:
        """Who is on a leased device besides our child, whose number we cannot know in a container (`ours` None)."""
        if reading.trouble:
            return reading.trouble
        strangers = frozenset(reading.processes or ()) - held.processes
        if ours is None:
            strangers = strangers if len(strangers) > 1 else frozenset()
        elif strangers - ours:  # a child that started since `ours` was read, or a stranger
            strangers -= ours | (self._own() or frozenset())
        else:
            strangers = frozenset()
        if strangers:
            who = processes(tuple(sorted(strangers)))
            return f"{who} on it" if ours is not None else f"{who} on it, and only one of them is ours"
        limit = self._fraction * reading.total + CONTEXT_BYTES
        if reading.used - held.used > limit:
            return f"{reading.used / GIB:.1f} GiB are in use, more than the {limit / GIB:.1f} GiB that a peel may take"
        return None


def device_for(select: str, allocation: str | None) -> DeviceLease:
    """The device of a one-shot command: the one that is named, as it stands, or else the CPU. Nothing is locked.

    Without NVML the name is handed on as it is, and torch counts. Raises ConfigurationError when there is no such
    device, and DeviceUnavailable when it cannot be told now which one it is.
    """
    if select in ("auto", "cpu"):
        return _cpu("`auto` is the CPU here: no GPU was watched" if select == "auto" else "`device.select` is `cpu`")
    seen = look()
    if not seen.blind:
        reading = named(seen, select, allocation)
        if not reading.uuid:
            raise DeviceUnavailable(f"{_seen(reading).label}: {reading.trouble}", remedy="name another GPU, or use cpu")
        return DeviceLease("cuda:0", reading.uuid, _seen(reading).label, _named(select, reading))
    entries = [] if allocation is None else [entry for entry in allocation.split(",") if entry.strip()]
    visible, number = select, select.removeprefix("cuda:")
    if allocation is not None and not entries:
        raise out_of_range(select, 0, allocation)
    if number != select:
        if entries and int(number) >= len(entries):
            raise out_of_range(select, len(entries), allocation)
        visible = entries[int(number)].strip() if entries else number
    return DeviceLease("cuda:0", visible, select, f"`device.select` is `{select}`; {seen.blind}, so torch counts")


def _cpu(reason: str) -> DeviceLease:
    return DeviceLease(name="cpu", visible="", label="cpu", reason=reason)


def _listed(reasons: dict[Reading, str | None], note: str) -> str:
    """One sentence on every device: why it was chosen, or why not."""
    each = [f"{_seen(reading).label}: {reason or 'idle too'}" for reading, reason in reasons.items()]
    return "; ".join([*each, note] if note else each)


def _named(select: str, reading: Reading) -> str:
    counted = " (GPUs are counted by PCI bus id)" if select.startswith("cuda:") else ""
    return f"`device.select` is `{select}`, which is {_seen(reading).label}{counted}"


def _seen(reading: Reading, why_not: str | None = None) -> SeenDevice:
    return SeenDevice(
        uuid=reading.uuid,
        name=reading.name,
        place=reading.place,
        is_slice=bool(reading.gpu),
        free=reading.free,
        total=reading.total,
        utilisation=reading.utilisation,
        processes=reading.processes,
        why_not=why_not,
    )
