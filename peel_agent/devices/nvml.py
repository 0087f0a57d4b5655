"""Reads the state of every GPU of this machine through NVML. CUDA is never initialised.

Each look initialises NVML and shuts it down again: a handle that is kept open holds a lost GPU's driver, and does not
notice a GPU that was divided into MIG slices meanwhile. NVML itself says nothing of CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from peel_agent.errors import printable

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, DRIVER_NOT_LOADED, NO_LIBRARY, NO_FUNCTION = 3, 4, 6, 9, 12, 13
LOST, MISMATCH, WRONG_VERSION = 15, 18, 25
"""NVML's return codes (nvml.h, nvmlReturn_t)."""

COMMAND = 'pip install "peel-agent[nvidia]"'

WORDS = {
    NO_PERMISSION: "this user may not read it",
    DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    NO_LIBRARY: "there is no NVIDIA driver here (libnvidia-ml.so.1 was not found)",
    LOST: "it is lost: it fell off the bus, or its driver died",
    MISMATCH: "the NVIDIA driver was updated and the machine was not restarted since (driver and library differ)",
}

MODES = {0: "", 2: "prohibited", 1: "exclusive", 3: "exclusive"}
"""Compute modes (nvml.h, nvmlComputeMode_t): how many processes may compute at once."""


@dataclass(frozen=True)
class Reading:
    """One GPU, or one MIG slice, at one moment.

    `place` counts GPUs by PCI bus id from 0, as CUDA_DEVICE_ORDER=PCI_BUS_ID does (None: the bus id cannot be read).
    `gpu` is the uuid of the GPU that a slice belongs to, `slot` its `<GPU instance>/<compute instance>`. Memory is in
    bytes, utilisation in per cent, process numbers are the host's (None of either: not reported). `trouble` says why
    the rest could not be read.
    """

    uuid: str = ""
    name: str = ""
    place: int | None = None
    gpu: str = ""
    slot: str = ""
    is_divided: bool = False
    total: int = 0
    free: int = 0
    used: int = 0
    utilisation: int | None = None
    processes: tuple[int, ...] | None = ()
    mode: str = ""
    trouble: str = ""


@dataclass(frozen=True)
class Look:
    """All GPUs in PCI order, each one's slices after it; or why there is nothing to see.

    `blind` says why NVML does not answer, `is_absent` that it is not there at all. `uncountable` says why an index
    cannot be matched with a GPU now.
    """

    readings: tuple[Reading, ...] = ()
    blind: str = ""
    is_absent: bool = False
    uncountable: str = ""


def look() -> Look:
    """What NVML says of every GPU now. Raises nothing: what cannot be read is said in the answer."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return Look(blind=f"GPUs are not looked at: nvidia-ml-py is not installed ({COMMAND})", is_absent=True)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Look(blind=_words(error), is_absent=error.value in (NO_LIBRARY, DRIVER_NOT_LOADED))
    try:
        return _numbered(list(_gpus(nvml)))
    except nvml.NVMLError as error:
        return Look(blind=_words(error))
    finally:
        with suppress(nvml.NVMLError):  # of a driver that died meanwhile; what was read tells of it
            nvml.nvmlShutdown()


def _gpus(nvml: Any) -> Iterator[tuple[str, list[Reading]]]:
    """For every GPU its PCI bus id ("" when it cannot be read), and the readings of it and its slices."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            info = nvml.nvmlDeviceGetPciInfo(handle)
        except nvml.NVMLError as error:
            yield "", [Reading(trouble=_words(error))]
        else:
            yield f"{info.domain:08x}:{info.bus:02x}:{info.device:02x}", _gpu(nvml, handle)


def _numbered(gpus: list[tuple[str, list[Reading]]]) -> Look:
    """The readings with their places: GPUs in PCI order, then those whose bus id could not be read.

    A GPU that this user may not open is not counted: CUDA does not count it either.
    """
    known = sorted((gpu for gpu in gpus if gpu[0]), key=lambda gpu: gpu[0])
    hidden = [of_gpu[0] for bus, of_gpu in gpus if not bus]
    readings = [replace(reading, place=place) for place, (_, of_gpu) in enumerate(known) for reading in of_gpu]
    causes = [reading.trouble for reading in hidden if reading.trouble != WORDS[NO_PERMISSION]]
    uncountable = f"GPUs cannot be counted while one of them cannot be read ({causes[0]})" if causes else ""
    return Look(readings=(*readings, *hidden), uncountable=uncountable)


def _gpu(nvml: Any, handle: Any) -> list[Reading]:
    known = _identified(nvml, handle)
    try:
        mode = _or(lambda: nvml.nvmlDeviceGetMigMode(handle), (0, 0), nvml)
        slices = list(_slices(nvml, handle, known.uuid)) if mode[0] else []
    except nvml.NVMLError as error:
        return [replace(known, trouble=_words(error))]
    if mode[0]:
        return [replace(known, is_divided=True, trouble="it is divided into MIG slices"), *slices]
    return [_read(nvml, handle, known)]


def _slices(nvml: Any, gpu: Any, uuid: str) -> Iterator[Reading]:
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
        except nvml.NVMLError as error:
            if error.value not in (NOT_FOUND, NO_PERMISSION):  # no slice here, or somebody else's
                raise
            continue
        known = replace(_identified(nvml, handle), gpu=uuid)
        try:
            slot = f"{nvml.nvmlDeviceGetGpuInstanceId(handle)}/{nvml.nvmlDeviceGetComputeInstanceId(handle)}"
        except nvml.NVMLError as error:
            yield replace(known, trouble=_words(error))
        else:
            yield _read(nvml, handle, replace(known, slot=slot))


def _identified(nvml: Any, handle: Any) -> Reading:
    """The uuid and the name; empty where they cannot be read."""
    texts = []
    for read in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName):
        try:
            texts.append(printable(str(read(handle))))
        except nvml.NVMLError:
            texts.append("")
    return Reading(uuid=texts[0], name=texts[1])


def _read(nvml: Any, handle: Any, known: Reading) -> Reading:
    """What is known of a device, with its memory, processes, utilisation and mode; or with what is wrong with it."""
    try:
        memory = _memory(nvml, handle)
        processes = _or(lambda: _processes(nvml, handle), None, nvml)
        rates, mode = (None, 0) if known.gpu else _load(nvml, handle)  # NVML reports neither for a slice
    except nvml.NVMLError as error:
        return replace(known, trouble=_words(error))
    return replace(
        known,
        total=memory.total,
        free=memory.free,
        used=memory.used,
        utilisation=None if rates is None else rates.gpu,
        processes=None if processes is None else tuple(sorted({process.pid for process in processes})),
        mode=MODES.get(mode, "unknown"),
        trouble="" if known.uuid else "its uuid cannot be read",
    )


def _load(nvml: Any, handle: Any) -> tuple[Any, Any]:
    """The utilisation rates (None where they are not reported) and the compute mode."""
    rates = _or(lambda: nvml.nvmlDeviceGetUtilizationRates(handle), None, nvml)
    return rates, _or(lambda: nvml.nvmlDeviceGetComputeMode(handle), 0, nvml)


def _memory(nvml: Any, handle: Any) -> Any:
    """Its `used` is what processes use where the driver tells it apart, else also what the driver reserves."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError as error:
        if error.value not in (NOT_SUPPORTED, NO_FUNCTION, WRONG_VERSION):
            raise
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _processes(nvml: Any, handle: Any) -> Any:
    try:
        return nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except nvml.NVMLError as error:
        if error.value != NO_FUNCTION:
            raise
        return nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)  # drivers before 510


def _or(read: Callable[[], Any], otherwise: Any, nvml: Any) -> Any:
    """What was read, or `otherwise` where this GPU or this driver knows no such thing."""
    try:
        return read()
    except nvml.NVMLError as error:
        if error.value not in (NOT_SUPPORTED, NO_FUNCTION):
            raise
        return otherwise


def _words(error: Any) -> str:
    return WORDS.get(error.value) or printable(f"NVML says: {error}")
