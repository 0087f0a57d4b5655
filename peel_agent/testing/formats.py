"""Conformance kit for `peel_agent.formats`: what the watch and load rooms rely on in every format plug-in.

For each check in CHECKS call `check(case, empty_folder)`; a broken claim raises AssertionError. Needs no test runner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peel_agent.errors import CheckpointError
from peel_agent.records import CheckpointRef, LocalListing, Readiness
from peel_agent.spi import Format

Producer = Callable[[Path], Mapping[str, Tensor]]
"""Writes a complete checkpoint to a path that does not exist yet and returns its tensors by name."""


@dataclass(frozen=True)
class FormatCase:
    """A format plug-in and one way to write its checkpoints.

    `entry` is its entry point (`package.module:attribute`), `name` the checkpoint's file or folder name, `step` what
    `step` must say of it, `weights` a pattern of the files in the folder that hold tensors.
    """

    format: Format
    entry: str
    produce: Producer
    name: str
    step: int | None
    weights: str = "*.safetensors"

    def write(self, folder: Path) -> tuple[Path, Mapping[str, Tensor]]:
        """A complete checkpoint of this case in `folder`, and its tensors."""
        path = folder / self.name
        return path, self.produce(path)

    def weight_files(self, path: Path) -> list[Path]:
        """The files of a checkpoint that hold tensors."""
        return sorted(path.glob(self.weights)) if path.is_dir() else [path]


def check_complete_once_written(case: FormatCase, folder: Path) -> None:
    """A whole checkpoint is claimed, with its weights among what is needed, complete, has stamps of its weights, and
    says its step.
    """
    path, _ = case.write(folder)
    claim = case.format.claim(LocalListing(path))
    if claim is None:
        raise AssertionError(f"{path.name} is not claimed")
    within = {file.relative_to(path).as_posix() for file in case.weight_files(path)} if path.is_dir() else set()
    _claim(within <= claim.needs, f"the claim does not need {sorted(within - claim.needs)}, which hold tensors")
    readiness = case.format.inspect(LocalListing(path))
    _claim(readiness.state == "complete", f"{path.name} is {readiness.state}: {readiness.reason}")
    stamped = {stamp.name for stamp in readiness.files}
    unstamped = {file.name for file in case.weight_files(path)} - stamped
    _claim(not unstamped, f"no stamp of {sorted(unstamped)}, which hold tensors")
    _claim(
        case.format.step(LocalListing(path)) == case.step,
        f"step is {case.format.step(LocalListing(path))}, not {case.step}",
    )


def check_truncation_is_never_complete(case: FormatCase, folder: Path) -> None:
    """A weight file cut short anywhere makes the checkpoint incomplete or damaged; mended, it is complete again."""
    path, _ = case.write(folder)
    for file in case.weight_files(path):
        content = file.read_bytes()
        for size in sorted({0, 1, 7, 8, 9, len(content) // 3, len(content) // 2, len(content) - 1}):
            file.write_bytes(content[:size])
            state = case.format.inspect(LocalListing(path)).state
            _claim(state != "complete", f"complete with {size} of {len(content)} bytes of {file.name}")
        file.write_bytes(content)
        _claim(case.format.inspect(LocalListing(path)).state == "complete", f"{file.name} as it was is not complete")


def check_missing_file_is_never_complete(case: FormatCase, folder: Path) -> None:
    """Without any one of its stamped files a checkpoint is not complete, and no method raises."""
    path, _ = case.write(folder)
    base = path if path.is_dir() else path.parent
    for stamp in case.format.inspect(LocalListing(path)).files:
        aside = folder / "aside"
        (base / stamp.name).rename(aside)
        readiness = _look(case, path)
        _claim(readiness.state != "complete", f"complete without {stamp.name}")
        aside.rename(base / stamp.name)


def check_stamps_follow_changes(case: FormatCase, folder: Path) -> None:
    """A stamped file that is written again changes the stamps, though its size stays."""
    path, _ = case.write(folder)
    base = path if path.is_dir() else path.parent
    for stamp in case.format.inspect(LocalListing(path)).files:
        before = case.format.inspect(LocalListing(path)).files
        later = stamp.mtime_ns + 1_000_000
        os.utime(base / stamp.name, ns=(later, later))
        _claim(
            case.format.inspect(LocalListing(path)).files != before,
            f"a change of {stamp.name} leaves the stamps as they were",
        )


def check_vanished_is_incomplete(case: FormatCase, folder: Path) -> None:
    """A path that vanished is incomplete; no method that the parent calls raises."""
    path, _ = case.write(folder)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    state = _look(case, path).state
    _claim(state == "incomplete", f"a vanished path is {state}")


def check_reads_what_was_written(case: FormatCase, folder: Path) -> None:
    """The weights have the names, shapes, dtypes and bits that were written, and refuse a name they do not have."""
    path, written = case.write(folder)
    weights = case.format.open(_ref(case, path))
    _claim(isinstance(weights.config(), Mapping), "config() is no mapping")
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    _claim(dict(weights.shapes()) == shapes, f"shapes() is {dict(weights.shapes())}, not {shapes}")
    for name, tensor in written.items():
        read = weights.read(name)
        _claim(read.dtype == tensor.dtype, f"{name} is read as {read.dtype}, not {tensor.dtype}")
        same = read.shape == tensor.shape and torch.equal(_bits(read), _bits(tensor))
        _claim(same, f"{name} is read with other bits than were written")
    try:
        weights.read("a name that no checkpoint has")
    except CheckpointError:
        return
    raise AssertionError("reading an unknown name raised no CheckpointError")


def check_parent_imports_no_torch(case: FormatCase, folder: Path) -> None:
    """Claim, inspect and step import no torch: the parent daemon stays small."""
    path, _ = case.write(folder)
    module, _, attribute = case.entry.partition(":")
    program = (
        "import sys, importlib, pathlib\n"
        "from peel_agent.records import LocalListing\n"
        "form = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])\n"
        "listing = LocalListing(pathlib.Path(sys.argv[3]))\n"
        "form.claim(listing), form.inspect(listing), form.step(listing)\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)\n"
    )
    command = [sys.executable, "-c", program, module, attribute, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    _claim(ran.returncode == 0, f"in a fresh interpreter: {ran.stderr}")


CHECKS: tuple[Callable[[FormatCase, Path], None], ...] = (
    check_complete_once_written,
    check_truncation_is_never_complete,
    check_missing_file_is_never_complete,
    check_stamps_follow_changes,
    check_vanished_is_incomplete,
    check_reads_what_was_written,
    check_parent_imports_no_torch,
)


def _claim(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _look(case: FormatCase, path: Path) -> Readiness:
    """Everything that the parent asks of a path."""
    case.format.claim(LocalListing(path))
    case.format.step(LocalListing(path))
    return case.format.inspect(LocalListing(path))


def _ref(case: FormatCase, path: Path) -> CheckpointRef:
    readiness = case.format.inspect(LocalListing(path))
    return CheckpointRef(
        path, case.format.step(LocalListing(path)), case.format.name, "conformance", 0.0, readiness.files
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
