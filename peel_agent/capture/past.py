"""The checkpoint before, read block by block beside the one that is peeled (method.md 4b)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peel_agent.capture.ahead import ReadAhead, Reader
from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.errors import OtherArchitecture, TornCheckpoint
from peel_agent.precision import Quantisers
from peel_agent.records import PastBlock, Snapshot


class PastBlocks:
    """See records.Past. One block's weights are in memory at a time, and the next one's where blocks come in order."""

    def __init__(self, snapshot: Snapshot, step: int | None, trace: BlockwiseTrace) -> None:
        self.step = step
        self._snapshot = snapshot
        self._quantisers = Quantisers(snapshot.sets, transposed=snapshot.anatomy.projection_layout == "in_out")
        self._names = trace.stored_names
        self._check_shapes(trace)
        reader = Reader(snapshot.weights, trace.device)
        self._ahead = ReadAhead(reader)
        matrix = max(self._names[0], key=lambda name: len(self._names[0][name]))
        self.rounding = _narrower(trace.stored_dtype, reader.read_one(matrix).dtype)
        self._last: tuple[int, PastBlock] | None = None

    def _check_shapes(self, trace: BlockwiseTrace) -> None:
        """Raises OtherArchitecture unless every weight of every block was there before, in the same shape."""
        shapes = self._snapshot.weights.shapes()
        for names in self._names:
            for full, shape in names.items():
                if shapes.get(full) != shape:
                    before = f"of shape {list(shapes[full])}" if full in shapes else "not in it"
                    raise OtherArchitecture(
                        f"{self._snapshot.ref.label} has another architecture: {full} is {before}, here {list(shape)}",
                        remedy="compare with a checkpoint of the same model",
                    )
        blocks = self._snapshot.model.get_submodule(self._snapshot.anatomy.blocks)
        if len(list(blocks.children())) != len(trace.block_names):
            raise OtherArchitecture(
                f"{self._snapshot.ref.label} has {len(list(blocks.children()))} blocks, not {len(trace.block_names)}",
                remedy="compare with a checkpoint of the same model",
            )

    def block(self, index: int) -> PastBlock:
        if self._last is None or self._last[0] != index:
            in_order = self._last is None or self._last[0] + 1 == index
            self._last = None  # lets go of the block before it reads the next one
            self._last = (index, self._read(index, index + 1 if in_order else None))
        return self._last[1]

    def _read(self, index: int, then: int | None) -> PastBlock:
        prefix = f"{self._snapshot.anatomy.blocks}.{index}."
        try:
            tensors = self._ahead.take(self._names[index]).tensors()
        except OSError as error:
            raise TornCheckpoint(
                f"{self._snapshot.ref.label} vanished while it was read", remedy="nothing to do: it is gone"
            ) from error
        stored = {
            full.removeprefix(prefix): tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype)
            for full, tensor in tensors.items()
        }
        if then is not None and then < len(self._names):
            self._ahead.begin(self._names[then])
        return PastBlock(stored, self._effective(stored, prefix))

    def _effective(self, stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        sets = {key: self._quantisers.of(prefix + key, weight) for key, weight in stored.items()}
        return {key: self._quantisers.effective(weight, sets[key]) for key, weight in stored.items()}


def _narrower(one: torch.dtype, other: torch.dtype) -> torch.dtype | None:
    """The dtype with fewer digits of two that differ, None for equal ones."""
    if one == other or not (one.is_floating_point and other.is_floating_point):
        return None
    return one if torch.finfo(one).eps > torch.finfo(other).eps else other
