"""Which of this machine's GPUs are ours: CUDA_VISIBLE_DEVICES as it was inherited, and the one that was named.

The text is read as CUDA reads it: a list of indices, of GPU uuids or of MIG ids, where a beginning is enough that no
other has. An entry that names nothing hides itself and all after it; an entry that comes twice hides everything.
Indices count GPUs by PCI bus id, as CUDA_DEVICE_ORDER=PCI_BUS_ID does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peel_agent.devices.nvml import Look, Reading
from peel_agent.errors import ConfigurationError, DeviceUnavailable, printable


@dataclass(frozen=True)
class Allotment:
    """The devices that are ours.

    `counted` are those that `cuda:N` counts: of a GPU that is divided into MIG slices the first slice, as in CUDA.
    `usable` are all that may be named by uuid. `note` says what an allocation hides, or is empty.
    """

    counted: tuple[Reading, ...] = ()
    usable: tuple[Reading, ...] = ()
    note: str = ""


def allotment(look: Look, allocation: str | None) -> Allotment:
    """What CUDA_VISIBLE_DEVICES (None: not set) leaves us of the devices seen."""
    if allocation is None:
        heads = [_head(look, reading) for reading in look.readings if not reading.gpu and reading.place is not None]
        divided = {reading.gpu for reading in look.readings if reading.gpu}
        usable = tuple(reading for reading in look.readings if not (reading.is_divided and reading.uuid in divided))
        return Allotment(counted=tuple(heads), usable=usable)
    if not allocation.strip():
        return Allotment(note="CUDA_VISIBLE_DEVICES is empty: no GPU was given to this process")
    return _allocated(look, [entry.strip() for entry in allocation.split(",")])


def _allocated(look: Look, entries: list[str]) -> Allotment:
    allocated: list[Reading] = []
    note = ""
    for entry in entries:
        reading = _entry(look, entry) if _kind(entry) == _kind(entries[0]) else None
        if reading is None:
            note = f"`{printable(entry)}` in CUDA_VISIBLE_DEVICES names no GPU here: it and what follows are not used"
            if _kind(entry) == "index" and look.uncountable:
                note = look.uncountable
            break
        if reading in allocated:
            return Allotment(
                note=f"`{printable(entry)}` in CUDA_VISIBLE_DEVICES names a GPU twice: CUDA then shows none"
            )
        allocated.append(reading)
    return Allotment(counted=tuple(allocated), usable=tuple(allocated), note=note)


def _kind(entry: str) -> str:
    return "index" if re.fullmatch(r"\+?\d{1,9}", entry) else entry[:4]


def _entry(look: Look, entry: str) -> Reading | None:
    match _kind(entry):
        case "index":
            at = [r for r in look.readings if r.place == int(entry) and not r.gpu and not look.uncountable]
        case "GPU-":
            at = [r for r in look.readings if r.uuid.startswith(entry) and not r.gpu]
        case "MIG-":
            at = [r for r in look.readings if r.gpu and (r.uuid.startswith(entry) or f"MIG-{r.gpu}/{r.slot}" == entry)]
        case _:
            at = []
    return _head(look, at[0]) if len(at) == 1 else None


def _head(look: Look, gpu: Reading) -> Reading:
    """The GPU itself, or its first slice when it is divided."""
    return next((r for r in look.readings if gpu.is_divided and r.gpu == gpu.uuid), gpu)


def named(look: Look, select: str, allocation: str | None) -> Reading:
    """The device that `select` (`cuda:N`, or a uuid or its beginning) names among those that are ours.

    Raises ConfigurationError when there is none, and DeviceUnavailable when it may be the one that cannot be read now.
    """
    ours = allotment(look, allocation)
    number = re.fullmatch(r"cuda:(\d+)", select)
    if number is None:
        matching = [reading for reading in ours.usable if reading.uuid.startswith(select)]
    elif allocation is None and look.uncountable:
        matching = []
    else:
        matching = list(ours.counted[int(number[1]) :][:1])
    if len(matching) == 1 and not matching[0].is_divided:
        return matching[0]
    if look.uncountable and (allocation is None or allocation.strip()):
        raise DeviceUnavailable(
            f"`device.select` is `{select}`: {look.uncountable}",
            remedy="look at nvidia-smi and dmesg; name a GPU by its uuid, or use cpu",
        )
    if number is not None and not matching:
        raise out_of_range(select, len(ours.counted), allocation)
    for gpu in look.readings:
        if gpu.is_divided and (gpu in matching or gpu.uuid.startswith(select)):
            raise _divided(gpu, [reading.uuid for reading in ours.usable if reading.gpu == gpu.uuid])
    some = ", ".join(reading.uuid for reading in ours.usable if reading.uuid)
    listed = f"use one of {some}, or cpu" if some else "use cpu"
    matches = "is the beginning of several devices" if matching else "is none of the devices"
    given = "" if allocation is None else " that CUDA_VISIBLE_DEVICES leaves"
    raise ConfigurationError(f"`device.select` is `{select}`, which {matches}{given} here", remedy=listed)


def _divided(gpu: Reading, slices: list[str]) -> ConfigurationError:
    return ConfigurationError(
        f"GPU {gpu.place} ({gpu.uuid}) is divided into MIG slices",
        remedy=f"name one of {', '.join(slices)}, or use cpu"
        if slices
        else "give it a slice (nvidia-smi mig), or use cpu",
    )


def out_of_range(select: str, count: int, allocation: str | None) -> ConfigurationError:
    """The error for a `cuda:N` beyond the GPUs that are here."""
    leaves = (
        f"this machine has {count} GPUs" if allocation is None else f"CUDA_VISIBLE_DEVICES leaves {count} GPUs here"
    )
    range_ = (
        f"use cuda:0 to cuda:{count - 1}, a GPU's uuid, or cpu" if count else "ask the scheduler for a GPU, or use cpu"
    )
    return ConfigurationError(f"`device.select` is `{select}`; {leaves}", remedy=range_)
