"""devices: a spare GPU is found, leased and given back; what is wrong with the others is named, and stops nothing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peel_agent.devices import Devices, device_for
from peel_agent.devices.allocation import allotment
from peel_agent.devices.nvml import Look, Reading
from peel_agent.devices.processes import INITIAL_NAMESPACE, own_processes
from peel_agent.errors import ConfigurationError, DeviceUnavailable
from peel_agent.journal import Journal
from peel_agent.leases import Leases
from peel_agent.records.device import DeviceLease
from tests import nvml
from tests.nvml import DENIED, GIB, LOST, MISMATCH, NOT_LOADED, Gpu, Machine
from tests.rooms.test_leases import NoEngine
from tests.waiting import wait_for

A, B, C = "GPU-aaaa1111-0000-0000", "GPU-bbbb2222-0000-0000", "GPU-bbcc3333-0000-0000"
SLICE, SLICE_2 = "MIG-dddd4444-0000-0000", "MIG-eeee5555-0000-0000"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return nvml.machine(library, tmp_path, monkeypatch)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def agent(machine: Machine, tmp_path: Path, clock: Clock) -> Callable[..., Devices]:
    def make(select: str = "auto", allocation: str | None = None, own: frozenset[int] | None = None) -> Devices:
        return Devices(select, 0.5, tmp_path / "locks", allocation, clock, own=lambda: own)

    return make


def watch(devices: Devices, clock: Clock, seconds: int = 30) -> None:
    """The agent's loop for so long: a look every 5 s."""
    devices.sample()
    for _ in range(seconds // 5):
        clock.now += 5
        devices.sample()


def sliced(**changes: object) -> Gpu:
    slices = tuple(
        Gpu(uuid, name="MIG_1g.10gb", total=10 * GIB, reserved=0, gi=7, ci=place, **changes)  # type: ignore[arg-type]
        for place, uuid in enumerate((SLICE, SLICE_2))
    )
    return Gpu(B, bus=2, utilisation=-1, slices=slices)


# What one GPU looks like -> what is said of it, and whether it may be used when it is named (auto never takes these).
NOT_IDLE: dict[str, tuple[Gpu, str, bool]] = {
    "at work": (Gpu(A, utilisation=97, pids=(4242,), used=60 * GIB), "process 4242 computes on it", False),
    "at work, no process to be seen": (Gpu(A, utilisation=97), "its utilisation is 97 %", False),
    "just at work": (Gpu(A, utilisation=10), "its utilisation is 10 %", False),
    "saving: memory held, process hidden": (Gpu(A, used=3 * GIB), "3.0 GiB of it are in use, by no process", False),
    "saving: process seen": (Gpu(A, pids=(7,)), "process 7 computes on it", False),
    "of many": (Gpu(A, pids=tuple(range(11, 19))), "processes 11, 12, 13 and 5 more compute on it", False),
    "little memory": (Gpu(A, used=GIB, total=3 * GIB, reserved=GIB), "1.0 GiB of it are in use", False),
    "reserved memory": (Gpu(A, reserved=41 * GIB), "39.0 of 80.0 GiB are free; 50% are asked for", False),
    "lost": (Gpu(A, error=LOST), "it is lost", False),
    "lost, and its name too": (Gpu(A, handle_error=LOST), "a GPU: it is lost", False),
    "not ours to open": (Gpu(A, handle_error=DENIED), "a GPU: this user may not read it", False),
    "processes not ours to see": (Gpu(A, process_error=DENIED), "this user may not read it", False),
    "no uuid": (Gpu(A, uuid_error=LOST), "its uuid cannot be read", False),
    "an error of no known name": (Gpu(A, error=999), "NVML says: Unknown Error", False),
    "processes not reported": (Gpu(A, process_error=3), "its processes are not reported", True),
    "utilisation unknown": (Gpu(A, utilisation=-1), "its utilisation is not reported", True),
    "for one process at a time": (Gpu(A, mode=3), "its compute mode is exclusive", True),
    "for no process": (Gpu(A, mode=2), "its compute mode is prohibited", False),
    "divided, without a slice": (Gpu(A, slices=()), "it is divided into MIG slices", False),
}


@pytest.mark.parametrize("kind", NOT_IDLE)
def test_auto_leaves_a_gpu_alone_unless_it_is_idle(
    kind: str, machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    """It says why, and takes the GPU beside it that is idle; without one, the CPU."""
    gpu, reason, _ = NOT_IDLE[kind]
    machine.write(gpu)
    devices = agent()
    watch(devices, clock)
    alone = devices.acquire()
    assert (alone.name, alone.visible, alone.label) == ("cpu", "", "cpu")
    assert reason in alone.reason
    machine.write(gpu, Gpu(C, bus=9))
    watch(devices, clock)
    beside = devices.acquire()
    assert (beside.name, beside.visible) == ("cuda:0", C)
    assert reason in beside.reason
    assert machine.is_closed()


@pytest.mark.parametrize("kind", NOT_IDLE)
def test_a_named_gpu_is_waited_for(kind: str, machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
    """A named GPU that is busy or cannot be read is an error that may pass; what only auto asks for is not asked."""
    gpu, _, may_be_named = NOT_IDLE[kind]
    machine.write(gpu)
    devices = agent(A)
    watch(devices, clock)
    if may_be_named:
        assert devices.acquire().visible == A
        return
    hidden = gpu.handle_error == DENIED or gpu.uuid_error or gpu.slices is not None  # no such GPU, as far as is known
    with pytest.raises(ConfigurationError if hidden else DeviceUnavailable) as error:
        devices.acquire()
    assert error.value.retryable is not bool(hidden)
    machine.write(Gpu(A))
    watch(devices, clock)
    assert devices.acquire().visible == A


@pytest.mark.parametrize("select", ["auto", A, "GPU-aaaa", "cuda:0"])
@pytest.mark.parametrize(
    "gpu",
    [
        Gpu(A),
        Gpu(A, utilisation=9),
        Gpu(A, used=GIB // 2),
        Gpu(A, reserved=GIB - 1, old=1),
        Gpu(A, total=8 * GIB, used=GIB // 4, old=1),
    ],
    ids=["empty", "a glance of work", "a display", "an old driver", "a small one"],
)
def test_an_idle_gpu_is_leased_by_its_uuid(
    gpu: Gpu, select: str, machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    machine.write(gpu)
    devices = agent(select)
    watch(devices, clock)
    (seen,) = devices.survey()
    assert (seen.uuid, seen.total, seen.utilisation, seen.why_not) == (A, gpu.total, gpu.utilisation, None)
    lease = devices.acquire()
    assert lease.label == "GPU 0 (H100, GPU-aaaa1111...)"
    assert (lease.name, lease.visible) == ("cuda:0", A)
    assert lease.label in lease.reason
    assert devices.survey()[0].why_not == "this agent computes on it"
    assert devices.must_give_way(lease) is None


def test_the_emptiest_idle_gpu_is_taken(machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
    machine.write(Gpu(A, bus=1, total=16 * GIB), Gpu(B, bus=2), Gpu(C, bus=3, pids=(1,)))
    devices = agent()
    watch(devices, clock)
    assert [devices.acquire().visible for _ in range(3)] == [B, A, ""]


BLIND: dict[str, tuple[int | str, str, bool]] = {
    "driver not loaded": (NOT_LOADED, "the NVIDIA driver is not loaded", True),
    "driver and library differ": (MISMATCH, "the machine was not restarted", False),
    "no permission": (DENIED, "this user may not read it", False),
    "unknown": (999, "NVML says", False),
    "no library": ("library", "libnvidia-ml.so.1 was not found", True),
    "no Python module": ("module", "nvidia-ml-py is not installed", True),
}


@pytest.mark.parametrize("kind", BLIND)
def test_without_nvml_auto_is_the_cpu_and_says_why(
    kind: str, machine: Machine, agent: Callable[..., Devices], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """A GPU that was named is refused: for good where NVIDIA's software is not there, else until it answers."""
    cause, reason, is_absent = BLIND[kind]
    machine.write(Gpu(A))
    if cause == "library":
        nvml.without_library(monkeypatch)
    elif cause == "module":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        machine.init = int(cause)
        machine.write()
    watch(agent(), clock)
    lease = agent().acquire()
    assert (lease.name, lease.visible) == ("cpu", "")
    assert reason in lease.reason
    assert agent().survey() == ()
    with pytest.raises(ConfigurationError if is_absent else DeviceUnavailable, match=reason):
        agent("cuda:0").acquire()


def test_a_named_gpu_that_vanishes_is_waited_for(machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
    """What was there when the agent started is no error of the configuration when it is gone."""
    machine.write(Gpu(A), Gpu(B, bus=1))
    devices = agent(B)
    watch(devices, clock)
    devices.release(devices.acquire())
    machine.write(Gpu(A))
    with pytest.raises(DeviceUnavailable, match="none of the devices"):
        devices.acquire()
    machine.init = NOT_LOADED
    machine.write()
    with pytest.raises(DeviceUnavailable, match="not loaded"):
        devices.acquire()


def test_cpu_looks_at_no_gpu(machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
    machine.file.unlink()  # a look would end this process
    devices = agent("cpu")
    watch(devices, clock)
    lease = devices.acquire()
    assert (lease.name, lease.visible, lease.reason) == ("cpu", "", "`device.select` is `cpu`")
    assert devices.must_give_way(lease) is None
    devices.release(lease)


class TestWatchedForThirtySeconds:
    """Trainers look idle while they save: a GPU must have been free at every look for 30 s."""

    def test_free_only_now(self, machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
        machine.write(Gpu(A))
        devices = agent()
        assert "not been seen free for 30 s yet" in devices.acquire().reason
        watch(devices, clock, seconds=25)
        assert "not been seen free" in devices.acquire().reason
        clock.now += 5
        assert devices.acquire().visible == A

    def test_one_busy_look_begins_anew(self, machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
        machine.write(Gpu(A))
        devices = agent()
        watch(devices, clock, seconds=300)
        machine.gpus[0].utilisation = 80
        machine.write()
        clock.now += 5
        devices.sample()
        machine.gpus[0].utilisation = 0
        machine.write()
        clock.now += 5
        watch(devices, clock, seconds=25)
        assert devices.acquire().name == "cpu"

    @pytest.mark.parametrize(("step", "name"), [(15, "cuda:0"), (16, "cpu"), (3600, "cpu"), (-60, "cpu")])
    def test_nothing_is_known_of_a_long_gap(
        self, step: int, name: str, machine: Machine, agent: Callable[..., Devices], clock: Clock
    ) -> None:
        """A loop that stood still, or a clock that was set back, leaves no proof behind."""
        machine.write(Gpu(A))
        devices = agent()
        watch(devices, clock, seconds=300)
        clock.now += step
        assert devices.acquire().name == name

    def test_a_gpu_that_was_away_begins_anew(
        self, machine: Machine, agent: Callable[..., Devices], clock: Clock
    ) -> None:
        machine.write(Gpu(A))
        devices = agent()
        watch(devices, clock)
        machine.init = 999
        machine.write()
        devices.sample()
        machine.init = 0
        machine.write()
        assert devices.acquire().name == "cpu"


# Bus order A, B, C; NVML tells of them in the order C, A, B. B is divided.
ALLOCATIONS: list[tuple[str | None, list[str]]] = [
    (None, [A, SLICE, SLICE_2, C]),
    ("", []),
    (" ", []),
    ("NoDevFiles", []),
    ("-1", []),
    ("none", []),
    ("0", [A]),
    ("2", [C]),
    ("2,0", [C, A]),
    (" 2 , 0 ", [C, A]),
    ("1", [SLICE]),
    ("0,-1,2", [A]),
    ("0,9,2", [A]),
    ("9,0", []),
    ("0,,2", [A]),
    (",0", []),
    ("0,0", []),
    ("0,2,0", []),
    ("0,1x", [A]),
    (A, [A]),
    ("GPU-aaaa", [A]),
    ("GPU-bb", []),
    ("GPU-bbc,GPU-a", [C, A]),
    ("GPU-aaaa,GPU-ffff,GPU-bbcc", [A]),
    ("GPU-aaaa,GPU-aa", []),
    ("GPU-aaaa,2", [A]),
    ("2,GPU-aaaa", [C]),
    (B, [SLICE]),
    (SLICE_2, [SLICE_2]),
    ("MIG-dddd", [SLICE]),
    (f"{SLICE_2},{SLICE}", [SLICE_2, SLICE]),
    ("MIG-ffff", []),
    (f"MIG-{B}/7/1", [SLICE_2]),
    (f"MIG-{B}/7/9", []),
    (f"{SLICE},{A}", [SLICE]),
    ("GPU-aaaa\x1b[31m", []),
]


def three() -> tuple[Gpu, Gpu, Gpu]:
    return Gpu(C, bus=9), Gpu(A, bus=1), sliced()


@pytest.mark.parametrize(("allocation", "expected"), ALLOCATIONS, ids=repr)
def test_an_allocation_is_read_as_cuda_reads_it(
    allocation: str | None, expected: list[str], machine: Machine, agent: Callable[..., Devices]
) -> None:
    """Indices by PCI bus id, uuids and their beginnings, MIG ids of both kinds; nothing beyond what was given."""
    machine.write(*three())
    assert [seen.uuid for seen in agent(allocation=allocation).survey()] == expected


UNDIVIDED = [case for case in ALLOCATIONS if case[0] and not {SLICE, SLICE_2} & set(case[1]) and "MIG" not in case[0]]


@pytest.mark.parametrize("allocation", [text for text, _ in UNDIVIDED if text != "0,1x"], ids=repr)
def test_torch_reads_the_same_allocation(
    allocation: str, machine: Machine, agent: Callable[..., Devices], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own reader, on GPUs that are not divided, is the second implementation."""
    machine.write(Gpu(A, bus=1), Gpu(B, bus=2), Gpu(C, bus=3))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allocation)
    read = torch.cuda._parse_visible_devices()
    if read and isinstance(read[0], str):
        read = torch.cuda._transform_uuid_to_ordinals(read, [A, B, C])
    known = [[A, B, C][i] for i in itertools.takewhile(lambda i: i < 3, read)]
    assert [seen.uuid for seen in agent(allocation=allocation).survey()] == known


@given(st.text(alphabet="01239+-,GPUMIGabde/ \x00", max_size=40))
def test_an_allocation_never_gives_more_than_there_is(text: str) -> None:
    """Whatever the text: no error, no device twice, none that is not of this machine."""
    seen = Look(tuple(Reading(uuid=uuid, place=place) for place, uuid in enumerate((A, B, C))))
    ours = allotment(seen, text).usable
    assert len(set(ours)) == len(ours)
    assert set(ours) <= set(seen.readings)


# (cuda:N, allocation) -> the device, or the error's text
COUNTED: list[tuple[str, str | None, str]] = [
    ("cuda:0", None, A),
    ("cuda:1", None, SLICE),
    ("cuda:2", None, C),
    ("cuda:3", None, "`device.select` is `cuda:3`; this machine has 3 GPUs"),
    ("cuda:0", "2,0", C),
    ("cuda:1", "2,0", A),
    ("cuda:2", "2,0", "`device.select` is `cuda:2`; CUDA_VISIBLE_DEVICES leaves 2 GPUs here"),
    ("cuda:0", "", "CUDA_VISIBLE_DEVICES leaves 0 GPUs here"),
    ("cuda:0", SLICE_2, SLICE_2),
    (A, None, A),
    (A, "0", A),
    (A, "2", "none of the devices that CUDA_VISIBLE_DEVICES leaves here"),
    (A, "", "none of the devices that CUDA_VISIBLE_DEVICES leaves here"),
    (SLICE_2, None, SLICE_2),
    (SLICE_2, SLICE, "none of the devices that CUDA_VISIBLE_DEVICES leaves here"),
    ("MIG-", None, "the beginning of several devices"),
    ("GPU-ffff", None, "none of the devices here"),
    (B, None, f"{SLICE}, {SLICE_2}"),
]


@pytest.mark.parametrize(("select", "allocation", "expected"), COUNTED)
def test_a_device_is_named_within_what_is_ours(
    select: str, allocation: str | None, expected: str, machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    """For the agent and for a one-shot command alike; an error names the value and what could be said instead."""
    machine.write(*three())
    devices = agent(select, allocation)
    watch(devices, clock)
    for lease in (devices.acquire, lambda: device_for(select, allocation)):
        if expected in (A, C, SLICE, SLICE_2):
            assert lease().visible == expected
            continue
        with pytest.raises(ConfigurationError) as error:
            lease()
        assert expected in str(error.value)
        assert "use" in error.value.remedy or "name one of" in error.value.remedy


def test_a_whole_gpu_of_unknown_utilisation_is_not_idle(
    machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    """Not even when a scheduler gave it to us: it may have given it to the training beside us too."""
    machine.write(Gpu(A, utilisation=-1))
    devices = agent(allocation=A)
    watch(devices, clock)
    assert "its utilisation is not reported" in devices.acquire().reason


def test_gpus_are_not_counted_while_one_is_lost(machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
    """Nobody can say which GPU `cuda:1` is while one gives no bus id; a uuid still names one."""
    machine.write(Gpu(A, bus=1), Gpu(B, bus=2, handle_error=LOST), Gpu(C, bus=3))
    for select, allocation in (("cuda:1", None), ("cuda:0", "1"), (B, None)):
        with pytest.raises(DeviceUnavailable, match="cannot be counted while one of them cannot be read"):
            agent(select, allocation).acquire()
    assert "cannot be counted" in agent(allocation="1").acquire().reason
    for select, allocation in ((C, None), ("cuda:0", C)):
        devices = agent(select, allocation)
        watch(devices, clock)
        devices.release(devices.acquire())


def test_a_gpu_of_others_is_not_counted(machine: Machine, agent: Callable[..., Devices]) -> None:
    """A scheduler that closes the devices of others leaves CUDA, and us, the rest from 0 on."""
    machine.write(Gpu(A, bus=1, handle_error=DENIED), Gpu(B, bus=2), Gpu(C, bus=3))
    assert [(seen.uuid, seen.place) for seen in agent(allocation="1").survey()] == [(C, 1)]


MIG = [
    ("auto", None, {}, "", "its utilisation is not reported"),
    ("auto", SLICE_2, {}, SLICE_2, "idle for 30 s"),
    ("auto", "1", {}, SLICE, "idle for 30 s"),
    ("auto", SLICE_2, {"process_error": 3}, "", "its processes are not reported"),
    ("auto", SLICE_2, {"pids": (9,)}, "", "process 9 computes"),
    ("auto", SLICE_2, {"used": 2 * GIB}, "", "2.0 GiB of it are in use"),
    ("auto", SLICE_2, {"error": LOST}, "", "is lost"),
    (SLICE, None, {}, SLICE, "MIG slice of GPU 1 (MIG"),
]


@pytest.mark.parametrize(("select", "allocation", "changes", "visible", "reason"), MIG)
def test_a_slice_is_used_only_when_named_or_allotted(
    select: str,
    allocation: str | None,
    changes: dict[str, object],
    visible: str,
    reason: str,
    machine: Machine,
    agent: Callable[..., Devices],
    clock: Clock,
) -> None:
    """A MIG slice reports no utilisation, and what is unknown is not idle."""
    machine.write(Gpu(A, bus=1, pids=(1,)), sliced(**changes))
    devices = agent(select, allocation)
    watch(devices, clock)
    lease = devices.acquire()
    assert lease.visible == visible
    assert reason in lease.reason


class TestLocks:
    """Two agents of a machine never lease the same GPU."""

    def test_another_agent_has_it(
        self, machine: Machine, agent: Callable[..., Devices], clock: Clock, tmp_path: Path
    ) -> None:
        machine.write(Gpu(A))
        first, auto, insisting = agent(), agent(), agent(A)
        for _ in range(7):
            clock.now += 5
            for devices in (first, auto, insisting):
                devices.sample()
        lease = first.acquire()
        assert lease.visible == A
        assert (tmp_path / "locks" / f"{A}.lock").read_text().strip() == str(os.getpid())
        assert f"another agent holds it (process {os.getpid()})" in auto.acquire().reason
        with pytest.raises(DeviceUnavailable, match="another agent holds it"):
            insisting.acquire()
        first.release(lease)
        first.release(lease)
        assert auto.acquire().visible == A
        with pytest.raises(DeviceUnavailable):
            insisting.acquire()

    def test_a_killed_agent_s_gpu_is_free(
        self, machine: Machine, agent: Callable[..., Devices], clock: Clock, tmp_path: Path
    ) -> None:
        machine.write(Gpu(A))
        code = f"""
            import time
            from pathlib import Path
            from peel_agent.devices.locks import lock
            held = lock(Path({str(tmp_path / "locks")!r}), {A!r})
            print("locked", flush=True)
            time.sleep(3600)
        """
        other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        with other, other.stdout:
            assert other.stdout.readline() == "locked\n"
            devices = agent()
            watch(devices, clock)
            assert f"another agent holds it (process {other.pid})" in devices.acquire().reason
            other.kill()
            other.wait()
        wait_for(lambda: devices.acquire().visible == A)

    @pytest.mark.parametrize("obstacle", ["a file where the folder should be", "a link where the file should be"])
    def test_a_gpu_that_cannot_be_locked_is_not_used(
        self, obstacle: str, machine: Machine, agent: Callable[..., Devices], clock: Clock, tmp_path: Path
    ) -> None:
        machine.write(Gpu(A))
        if obstacle.startswith("a file"):
            (tmp_path / "locks").write_text("")
        else:
            (tmp_path / "locks").mkdir()
            (tmp_path / "locks" / f"{A}.lock").symlink_to(tmp_path / "precious")
        devices = agent()
        watch(devices, clock)
        assert "it cannot be locked" in devices.acquire().reason
        assert not (tmp_path / "precious").exists()


# Own numbers (None in a container, where they are not known), what the GPU shows -> what is said, None to stay.
CHILD, STRANGER = 501, 777
MOVING_IN: dict[str, tuple[frozenset[int] | None, Gpu, str | None]] = {
    "nobody yet": (None, Gpu(A), None),
    "our child, number unknown": (None, Gpu(A, pids=(CHILD,), used=40 * GIB, utilisation=100), None),
    "our child and another": (None, Gpu(A, pids=(CHILD, STRANGER)), "processes 501, 777 compute on it, and only one"),
    "one beyond our fraction": (None, Gpu(A, pids=(CHILD,), used=70 * GIB), "70.0 GiB are in use, more than the 42.0"),
    "processes hidden": (None, Gpu(A, used=70 * GIB), "70.0 GiB are in use"),
    "our child, number known": (frozenset({CHILD}), Gpu(A, pids=(CHILD,), used=40 * GIB), None),
    "a stranger before our child": (frozenset({CHILD}), Gpu(A, pids=(STRANGER,)), "process 777 computes on it"),
    "a stranger beside our child": (frozenset({CHILD}), Gpu(A, pids=(CHILD, STRANGER)), "process 777 computes on it"),
    "several of ours": (frozenset({CHILD, 502}), Gpu(A, pids=(CHILD, 502)), None),
    "lost": (None, Gpu(A, error=LOST), "it is lost"),
    "lost, and its name too": (None, Gpu(A, handle_error=LOST), "can no longer be seen: GPUs cannot be counted"),
    "gone": (None, Gpu(C), "can no longer be seen: it is gone"),
}


@pytest.mark.parametrize("kind", MOVING_IN)
def test_somebody_who_moves_in_is_seen(
    kind: str, machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    own, gpu, reason = MOVING_IN[kind]
    machine.write(Gpu(A))
    devices = agent(own=own)
    watch(devices, clock)
    lease = devices.acquire()
    machine.write(gpu)
    said = devices.must_give_way(lease)
    if reason is None:
        assert said is None
    else:
        assert said is not None
        assert reason in said
        assert said.startswith(lease.label)
    devices.release(lease)
    assert devices.must_give_way(lease) is None
    assert machine.is_closed()


def test_a_driver_that_stops_answering_ends_the_lease(
    machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    machine.write(Gpu(A))
    devices = agent()
    watch(devices, clock)
    lease = devices.acquire()
    machine.init = MISMATCH
    machine.write()
    assert "the machine was not restarted" in (devices.must_give_way(lease) or "")


def test_one_peel_follows_another_on_the_same_gpu(
    machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    """Our own child's work does not count against the GPU; that of somebody who came meanwhile does."""
    machine.write(Gpu(A))
    devices = agent()
    watch(devices, clock)
    lease = devices.acquire()
    machine.write(Gpu(A, pids=(CHILD,), used=20 * GIB, utilisation=100))
    watch(devices, clock, seconds=60)
    machine.write(Gpu(A, utilisation=70))  # NVML still averages over what our child did
    clock.now += 1
    devices.release(lease)
    lease = devices.acquire()
    assert lease.visible == A
    devices.release(lease)
    clock.now += 2
    assert "its utilisation is 70 %" in devices.acquire().reason


def test_one_agent_peels_on_several_gpus_at_once(machine: Machine, agent: Callable[..., Devices], clock: Clock) -> None:
    """Each run that waits gets an idle GPU of its own, then one gets the CPU; what is given back goes to the next."""
    machine.write(Gpu(A, bus=1), Gpu(B, bus=2, used=GIB))
    devices = agent()
    watch(devices, clock)
    leases = Leases(devices, NoEngine(), Journal(lambda _: None, lambda: 0.0))
    leased = {run: leases.ask(run) for run in ("a", "b", "c", "d")}
    assert {run: lease and (lease.name, lease.visible) for run, lease in leased.items()} == {
        "a": ("cuda:0", A),
        "b": ("cuda:0", B),
        "c": ("cpu", ""),
        "d": None,
    }
    assert leased["b"] is not None
    leases.give_back(leased["b"])
    clock.now += 5
    leases.look()
    again = leases.ask("d")
    assert again is not None
    assert again.visible == B


def test_a_stranger_during_a_peel_counts_afterwards(
    machine: Machine, agent: Callable[..., Devices], clock: Clock
) -> None:
    machine.write(Gpu(A))
    devices = agent()
    watch(devices, clock)
    lease = devices.acquire()
    machine.write(Gpu(A, pids=(CHILD, STRANGER)))
    watch(devices, clock, seconds=10)
    machine.write(Gpu(A))
    devices.release(lease)
    assert devices.acquire().name == "cpu"


def test_a_child_that_starts_while_we_look_is_ours(machine: Machine, tmp_path: Path, clock: Clock) -> None:
    machine.write(Gpu(A))
    known = [frozenset[int](), frozenset({CHILD})]
    devices = Devices("auto", 0.5, tmp_path / "locks", None, clock, own=lambda: known.pop(0))
    watch(devices, clock)
    lease = devices.acquire()
    machine.write(Gpu(A, pids=(CHILD,)))
    assert devices.must_give_way(lease) is None
    assert known == []


ONE_SHOT: list[tuple[str, str | None, str, str]] = [
    ("auto", None, "cpu", ""),
    ("cpu", None, "cpu", ""),
    ("cuda:1", None, "cuda:0", "1"),
    ("cuda:1", "4,5", "cuda:0", "5"),
    ("cuda:0", f" {SLICE}", "cuda:0", SLICE),
    ("GPU-1b2c", None, "cuda:0", "GPU-1b2c"),
    ("GPU-1b2c", "4,5", "cuda:0", "GPU-1b2c"),
]


@pytest.mark.parametrize(("select", "allocation", "name", "visible"), ONE_SHOT)
def test_a_one_shot_command_needs_no_nvml(
    select: str, allocation: str | None, name: str, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the name is handed on, and torch counts."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    lease = device_for(select, allocation)
    assert (lease.name, lease.visible) == (name, visible)
    assert lease.reason


@pytest.mark.parametrize(
    ("select", "allocation", "count"), [("cuda:2", "4,5", 2), ("cuda:0", "", 0), ("GPU-1b2c", "", 0)]
)
def test_a_one_shot_command_takes_no_gpu_that_was_not_given(
    select: str, allocation: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigurationError, match=f"leaves {count} GPUs here"):
        device_for(select, allocation)


def test_a_one_shot_command_takes_the_named_gpu_as_it_stands(machine: Machine) -> None:
    """Nobody watched it, and who names it for one command knows; auto is the CPU even beside an idle GPU."""
    machine.write(Gpu(C, bus=9), Gpu(A, bus=1, pids=(1,), utilisation=100))
    assert device_for("cuda:0", None) == DeviceLease(
        name="cuda:0",
        visible=A,
        label="GPU 0 (H100, GPU-aaaa1111...)",
        reason="`device.select` is `cuda:0`, which is GPU 0 (H100, GPU-aaaa1111...) (GPUs are counted by PCI bus id)",
    )
    assert device_for("auto", None).name == "cpu"
    machine.write(Gpu(A, uuid_error=LOST))
    with pytest.raises(DeviceUnavailable, match="its uuid cannot be read"):
        device_for("cuda:0", None)


def test_own_processes_are_known_on_the_host_only(tmp_path: Path) -> None:
    """In a container NVML tells the host's process numbers, which are not ours to compare."""
    host, container = tmp_path / "host", tmp_path / "container"
    host.symlink_to(INITIAL_NAMESPACE)
    container.symlink_to("pid:[4026532999]")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as child:
        assert {os.getpid(), child.pid} <= (own_processes(host) or set())
        child.communicate("\n")
    assert own_processes(container) is None
    assert own_processes(tmp_path / "missing") is None


def test_nvidia_s_library_is_found_by_the_loader(library: Path, tmp_path: Path) -> None:
    """In a process of its own, with the library on the loader's path; neither torch nor CUDA comes with it."""
    description = tmp_path / "gpus.txt"
    description.write_text(f"init 0\n{Gpu(A).line('gpu')}\n")
    code = f"""
        import sys
        from pathlib import Path
        from peel_agent.devices import Devices
        (seen,) = Devices("auto", 0.5, Path({str(tmp_path)!r}), None, lambda: 0.0).survey()
        assert "torch" not in sys.modules
        assert not [line for line in open("/proc/self/maps") if "libcuda" in line]
        print(seen.uuid)
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent), "NVML_STUB": str(description)}
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == A


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_of_this_machine(tmp_path: Path, clock: Clock) -> None:
    """NVML and torch tell the same uuids and memory, and a process that computes is seen."""
    devices = Devices("auto", 0.5, tmp_path, None, clock)
    held = torch.zeros(2**30, dtype=torch.uint8, device="cuda:0")
    seen = {one.uuid: one for one in devices.survey()}
    whole = torch.cuda.get_device_properties(0)
    mine = next(one for uuid, one in seen.items() if str(whole.uuid) in uuid)
    assert mine.total == pytest.approx(whole.total_memory, rel=0.05)
    assert mine.total - mine.free >= held.nbytes
    assert mine.why_not is not None
