"""A machine with the GPUs of one's choice: NVML's own Python module, on a library that reads them from a file."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pynvml
import pytest

GIB = 2**30
LOST, DENIED, NOT_LOADED, MISMATCH = 15, 4, 9, 18


@dataclass
class Gpu:
    """One GPU, or one MIG slice among a GPU's `slices`; the other fields are those of tests/nvml_stub.c."""

    uuid: str
    bus: int = 0
    name: str = "H100"
    total: int = 80 * GIB
    used: int = 0
    reserved: int = GIB // 2
    utilisation: int = 0
    mode: int = 0
    pids: tuple[int, ...] = ()
    old: int = 0
    handle_error: int = 0
    pci_error: int = 0
    uuid_error: int = 0
    error: int = 0
    process_error: int = 0
    gi: int = 0
    ci: int = 0
    slices: tuple[Gpu, ...] | None = None

    def line(self, kind: str) -> str:
        plain = [f for f in dataclasses.fields(self) if f.name not in ("pids", "slices")]
        keys = [f"{f.name}={getattr(self, f.name)}" for f in plain if getattr(self, f.name) != ""]
        keys += [f"pid={pid}" for pid in self.pids] + [f"divided={int(self.slices is not None)}"]
        return " ".join([kind, *keys])


@dataclass
class Machine:
    """What NVML tells; a change of `gpus` or `init` is there at the next look once `write` was called."""

    file: Path
    library: ctypes.CDLL
    gpus: list[Gpu] = field(default_factory=list)
    init: int = 0

    def write(self, *gpus: Gpu) -> None:
        """Tells of these GPUs, or of those of before as they are now."""
        self.gpus = list(gpus) or self.gpus
        lines = [f"init {self.init}"]
        for gpu in self.gpus:
            lines += [gpu.line("gpu"), *(one.line("slice") for one in gpu.slices or ())]
        self.file.write_text("\n".join(lines) + "\n")

    def is_closed(self) -> bool:
        """Whether NVML is shut down."""
        return int(self.library.stub_open()) == 0


def build(folder: Path) -> Path:
    """The library, compiled into `folder` under the name that NVML's module loads."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "these tests compile a stand-in for NVIDIA's library: install a C compiler, such as gcc"
    library = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml_stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return library


def machine(library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without a GPU, as this process's NVML sees it until the end of the test."""
    loaded = ctypes.CDLL(str(library))
    monkeypatch.setattr(pynvml, "nvmlLib", loaded)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("NVML_STUB", str(folder / "gpus.txt"))
    new = Machine(folder / "gpus.txt", loaded)
    new.write()
    return new


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """No libnvidia-ml.so.1 is on the loader's path."""

    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", missing)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
