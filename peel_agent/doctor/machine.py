"""What this machine has: libraries, plug-ins, devices, limits, and the port of the health endpoint."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from peel_agent import registry
from peel_agent.config import DeviceSettings, EngineSettings, HealthSettings, visible_gpus
from peel_agent.devices import Devices, device_for
from peel_agent.devices.idle import QuietTimes
from peel_agent.devices.nvml import look
from peel_agent.doctor.configuration import failed
from peel_agent.doctor.folder import opened_by_child
from peel_agent.engines import opened
from peel_agent.errors import DeviceUnavailable, PeelError
from peel_agent.health.listen import listening, place_of
from peel_agent.ledger import is_held
from peel_agent.records import Check, ModelSettings, ProbeSettings, SeenDevice
from peel_agent.spi import KINDS, Leasing
from peel_agent.worker import cgroup_limits

GIB = 2**30
LEAST_MEMORY = GIB
"""Of less a worker makes nothing: torch alone takes half of it."""

LEAST_FILES = 1024
"""Open files: a checkpoint in shards is held open whole."""

LEAST_WATCHES = 8192
LEAST_INSTANCES = 16
INOTIFY = Path("/proc/sys/fs/inotify")


def check_libraries() -> Iterator[Check]:
    """Python and the libraries of peel-agent's own list, as new as it needs, and whether torch can be imported."""
    for requirement in metadata.requires("peel-agent") or ():
        if "extra ==" not in requirement and (fault := _fault_of(requirement)) is not None:
            yield fault
    opened = opened_by_child(None, ModelSettings(), ProbeSettings())
    if opened.broken is not None:
        yield failed("libraries", opened.broken)
    else:
        python = ".".join(map(str, sys.version_info[:3]))
        yield Check("libraries", True, f"Python {python}, {opened.libraries}")


def _fault_of(requirement: str) -> Check | None:
    """What is wrong with the installed version of one such as `torch>=2.10`."""
    named = re.match(r"[\w.-]+", requirement)
    least = re.search(r">=\s*([\d.]+)", requirement)
    if named is None:
        return None
    name = named[0]
    remedy = f'pip install "{requirement}"'
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check("libraries", False, f"{name} is not installed", remedy)
    if least is not None and _numbers(installed) < _numbers(least[1]):
        return Check("libraries", False, f"{name} is {installed}, older than {least[1]}", remedy)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def check_plugins() -> Iterator[Check]:
    """The plug-ins that are installed; one that does not load is passed over until it is named."""
    problems = [problem for kind in KINDS for problem in registry.problems(kind)]
    for problem in problems:
        yield Check("plug-ins", None, problem, "repair or uninstall the distribution that it comes from")
    if not problems:
        yield Check("plug-ins", True, "all that are installed can be loaded")


# ---------------------------------------------------------------- devices


def check_device(settings: DeviceSettings, engine: EngineSettings = EngineSettings()) -> Iterator[Check]:
    """What a peel would compute on now, and why on no other device. A cluster is not asked for it."""
    lender = opened(engine)
    lease = lender.acquire() if isinstance(lender, Leasing) else None
    lender.close(0.0)
    if lease is not None:
        yield Check("device", True, f"{lease.label}, not asked from here: {lease.reason}")
        return
    devices = Devices(settings.select, settings.memory_fraction, Path(), visible_gpus(), lambda: 0.0)
    devices_seen = devices.survey() if settings.select != "cpu" else ()
    if settings.select not in ("auto", "cpu"):
        yield _named_device(settings.select, devices_seen)
        return
    if settings.select == "cpu":
        yield Check("device", True, "the CPU, as [device] select says")
        return
    free = [device for device in devices_seen if _why_busy(device) is None]
    each = "; ".join(f"{device.label}: {_why_busy(device) or 'free'}" for device in devices_seen)
    if free:
        words = f"auto: a GPU that stays free while the agent watches it is taken, else the CPU ({each})"
    else:
        words = f"auto: the CPU; {each or look().blind or 'there is no GPU here'}"
    yield Check("device", True, words)


def _named_device(select: str, devices_seen: tuple[SeenDevice, ...]) -> Check:
    try:
        lease = device_for(select, visible_gpus())
    except (PeelError, DeviceUnavailable) as error:
        return failed("device", error)
    device = next((candidate for candidate in devices_seen if candidate.uuid == lease.visible), None)
    if device is None:
        return Check("device", None, lease.reason, 'pip install "peel-agent[nvidia]", so that it can be watched')
    busy = _why_busy(device)
    if busy is not None:
        words = f"{device.label}, as [device] select says, is not free: {busy}"
        return Check("device", False, words, "the agent waits for it; name another GPU, or use auto or cpu")
    return Check("device", True, f"{device.label}, as [device] select says, is free")


def _why_busy(device: SeenDevice) -> str | None:
    """Why nothing may start there; not that it has not been watched yet, which the agent will do."""
    return None if device.why_not == QuietTimes().why_not(device.uuid) else device.why_not


# ---------------------------------------------------------------- limits


def check_limits(settings: DeviceSettings, inotify: Path = INOTIFY) -> Iterator[Check]:
    """Memory, open files and inotify."""
    yield _memory(settings.memory_fraction, psutil.virtual_memory().total, psutil.virtual_memory().available)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        remedy = f"ulimit -n {LEAST_FILES}, or LimitNOFILE={LEAST_FILES} in the unit (the hard limit is {hard})"
        yield Check("open files", False, f"{soft} may be open at once, fewer than {LEAST_FILES}", remedy)
    else:
        yield Check(
            "open files", True, f"{'any number' if soft == resource.RLIM_INFINITY else soft} may be open at once"
        )
    yield from _inotify(inotify)


def _memory(fraction: float, total: int, available: int) -> Check:
    limits = cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    whose = "the control group's" if limits and min(limits) < total else "the machine's"
    total = min([total, *limits])
    share = int(min(fraction * total, available))
    words = f"a worker on the CPU may take {share / GIB:.1f} GiB of {whose} {total / GIB:.1f} GiB"
    if share < LEAST_MEMORY:
        return Check("memory", False, words, "raise [device] memory_fraction, or the memory limit of this service")
    return Check("memory", True, words)


def _inotify(folder: Path) -> Iterator[Check]:
    least = {"max_user_watches": LEAST_WATCHES, "max_user_instances": LEAST_INSTANCES}
    try:
        values = {name: int((folder / name).read_text(encoding="ascii")) for name in least}
    except (OSError, ValueError):
        yield Check("inotify", None, "its limits could not be read", "nothing to do: timed scans see everything, later")
        return
    low = [name for name, value in values.items() if value < least[name]]
    words = ", ".join(f"fs.inotify.{name} is {value}" for name, value in values.items())
    remedy = ", ".join(f"sysctl fs.inotify.{name}={least[name]}" for name in low)
    yield Check("inotify", not low, words, f"{remedy}: without events checkpoints are seen later" if low else None)


# ---------------------------------------------------------------- health


def check_health(settings: HealthSettings, state_dir: Path | None) -> Iterator[Check]:
    """Whether the address of the health endpoint is free, unless the agent that runs has it."""
    if settings.listen is None:
        return
    place = place_of(settings.listen)
    if place is None:
        yield Check("health endpoint", True, "it is turned off")
    elif state_dir is not None and is_held(state_dir):
        yield Check("health endpoint", None, f"{place} is the running agent's", f"ask it: curl http://{place}/readyz")
    else:
        listening(place).close()
        yield Check("health endpoint", True, f"{place} is free")
