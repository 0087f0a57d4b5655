"""The next block's weights, read and brought to the device while the block before them is computed with."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from peel_agent.records import Weights


class Arriving:
    """Weights by name, in their stored dtype, on the device or on their way to it."""

    def __init__(self, tensors: Mapping[str, Tensor], copied: torch.cuda.Event | None) -> None:
        self._tensors = tensors
        self._copied = copied

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights; what this thread computes with them begins once they are there."""
        if self._copied is not None:
            for tensor in self._tensors.values():
                computing = torch.cuda.current_stream(tensor.device)
                computing.wait_event(self._copied)
                tensor.record_stream(computing)  # their memory is not the side stream's again before it is done
        return self._tensors


class Reader:
    """Reads a checkpoint's weights, one at a time whichever thread asks, and brings them to a device.

    To a GPU each is copied out of pinned memory on a stream of its own, so that neither reading nor copying waits for
    what is computed, nor holds it up.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights = weights
        self._one_at_a_time = threading.Lock()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, names: Iterable[str]) -> Arriving:
        """The weights of these names; raises what the format's `read` raises."""
        if self._copies is None:
            return Arriving({name: self.read_one(name) for name in names}, None)
        with torch.cuda.stream(self._copies):
            tensors = {
                name: self.read_one(name).pin_memory().to(self._copies.device, non_blocking=True) for name in names
            }
            return Arriving(tensors, self._copies.record_event())

    def read_one(self, name: str) -> Tensor:
        """One weight as stored, on the CPU."""
        with self._one_at_a_time:
            return self._weights.read(name)


class ReadAhead:
    """A loop over blocks that takes each one's weights and begins to read the next one's, in a thread.

    Two blocks are in flight at most: the one that was taken, and the next one as it is stored. Whatever ends the loop
    ends the reading, after the tensor in work.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: tuple[Collection[str], Future[Arriving]] | None = None
        self._is_over = False

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        self._begun = None
        self._thread.shutdown(cancel_futures=True)

    def begin(self, names: Collection[str]) -> None:
        """Begins to read these weights, which are taken next."""
        wanted = (name for name in names if not self._is_over)
        try:
            self._begun = (names, self._thread.submit(self._reader.read, wanted))
        except RuntimeError:  # no memory for a thread: they are read when they are taken
            self._begun = None

    def take(self, names: Collection[str]) -> Arriving:
        """These weights, read now unless they were begun; an error of the reading is raised here.

        What did not fit into memory beside the block in use is read again.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] is names:
            try:
                return begun[1].result()
            except (MemoryError, RuntimeError):
                pass
        del begun  # and with it what was read before memory ran out
        return self._reader.read(names)
