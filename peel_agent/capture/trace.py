"""Runs a checkpoint block by block; a block's weights are read ahead of its visit and dropped with it.

The model's own forward is run once with every block replaced by a tap: that gives the embeddings and the exact
arguments (positions, masks) which the model hands to each block, for any architecture and with no copy of its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peel_agent.capture.ahead import ReadAhead, Reader
from peel_agent.capture.block import Handed, ResidentBlock
from peel_agent.errors import ConfigurationError
from peel_agent.precision import Quantisers, quantise
from peel_agent.records import FULL_PRECISION, Block, Chunk, Probe, Projection, Snapshot, TokenIds

CHUNK_TOKENS = 4096
CHUNK_TOKENS_ON_GPU = 16_384
"""More at once: to begin a computation there takes longer than a small one."""


def open_trace(snapshot: Snapshot, probe: Probe, *, device: str = "cpu") -> BlockwiseTrace:
    """The snapshot as a Trace (records.Trace) on `device`, computing in float32 with TF32 off."""
    torch.set_float32_matmul_precision("highest")
    return BlockwiseTrace(snapshot, probe, usable_device(device))


def usable_device(name: str) -> torch.device:
    """The torch device of this name; ConfigurationError when this process cannot compute on it."""
    gpus = torch.cuda.device_count()
    usable = ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    if name not in usable:
        raise ConfigurationError(
            f"cannot compute on `{name}`: torch {torch.__version__} sees {gpus} GPUs here",
            remedy=f"use --device {' or --device '.join(usable)}",
        )
    return torch.device(name)


def settled(clock: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """The clock, read when the device has done what it was given: a GPU is still at it when Python goes on."""
    if device.type != "cuda":
        return clock

    def read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return read


class _Tap(nn.Module):
    """Stands in for a block: keeps what the model hands to it and returns the stream unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: Tensor | None = None
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}

    def forward(self, stream: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.stream, self.arguments, self.keywords = stream, arguments, keywords
        return stream


class BlockwiseTrace:
    """See records.Trace."""

    def __init__(self, snapshot: Snapshot, probe: Probe, device: torch.device) -> None:
        self.probe = probe
        self.device = device
        self.tied_head = snapshot.tied_head
        self._snapshot = snapshot
        self._model = snapshot.model
        self._body = snapshot.body
        self._initialise = snapshot.initialise
        tokens = CHUNK_TOKENS if device.type == "cpu" else CHUNK_TOKENS_ON_GPU
        self.chunk = Chunk(max(1, tokens // probe.sequence_length), probe.sequence_length)
        container = self._model.get_submodule(snapshot.anatomy.blocks)
        assert isinstance(container, nn.ModuleList)
        self._blocks = list(container)
        self._taps = [_Tap() for _ in self._blocks]
        self._handed: dict[int, list[Handed]] = {}
        for index, tap in enumerate(self._taps):
            container[index] = tap
        self.block_names = tuple(f"{snapshot.anatomy.blocks}.{index}" for index in range(len(self._blocks)))
        for block in self._blocks:
            _settle_buffers(block, device)
        self._quantisers = Quantisers(snapshot.sets, transposed=snapshot.anatomy.projection_layout == "in_out")
        self._reader = Reader(snapshot.weights, device)
        self._stored = [
            {f"{name}.{key}": _computed_as(tensor) for key, tensor in block.state_dict().items()}
            for name, block in zip(self.block_names, self._blocks, strict=True)
        ]
        outside = {
            name: self._reader.read_one(name).to(device).to(_computed_as(tensor))
            for name, tensor in self._model.state_dict().items()
        }
        weight = outside[f"{snapshot.anatomy.head}.weight"]
        self.head_latents = weight.T
        self.head_set = self._quantisers.named(f"{snapshot.anatomy.head}.weight") or FULL_PRECISION
        outside |= {
            name: quantise(stored, weight_set)
            for name, stored in outside.items()
            if (weight_set := self._quantisers.named(name))
        }
        self._model.load_state_dict(outside, strict=True, assign=True)
        self._model.to(device).requires_grad_(requires_grad=False)
        head: Any = self._model.get_submodule(snapshot.anatomy.head)
        self.head = Projection(head.weight.T, head.bias, snapshot.anatomy.softcap)
        self._rehearse(probe.fit[:1])
        self.width = int(self.embed(probe.fit[:1]).shape[-1])

    @property
    def stored_names(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Full name and shape of every weight of each block."""
        named = zip(self.block_names, self._blocks, strict=True)
        return tuple(
            {f"{name}.{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}
            for name, module in named
        )

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the first block's first matrix is stored as."""
        names = self.stored_names[0]
        return self._reader.read_one(max(names, key=lambda name: len(names[name]))).dtype

    def _rehearse(self, ids: TokenIds) -> Tensor:
        """Runs the model without its blocks; the taps then hold each block's arguments. Returns h_0."""
        with torch.no_grad():
            self._body(torch.from_numpy(ids).to(self.device))
        stream = self._taps[0].stream
        assert stream is not None
        return stream

    def embed(self, ids: TokenIds) -> Tensor:
        step = self.chunk.sequences
        return torch.cat([self._rehearse(ids[start : start + step]) for start in range(0, len(ids), step)])

    def _handed_at(self, length: int) -> list[Handed]:
        """What each block is handed for sequences of this length: masks and positions hang on nothing else."""
        if length not in self._handed:
            self._rehearse(self.probe.fit[:1, :length])
            self._handed[length] = [(tap.arguments, tap.keywords) for tap in self._taps]
        return self._handed[length]

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        indices = range(len(self._blocks))[start:stop]
        with ReadAhead(self._reader) as ahead:
            for index in indices:
                yield self._block(index, ahead, index + 1 if index + 1 in indices else None)

    def _block(self, index: int, ahead: ReadAhead, then: int | None) -> Block:
        """The block, and the reading of the one that is visited `then` begun."""
        prefix, wanted = f"{self.block_names[index]}.", self._stored[index]
        stored = {
            name.removeprefix(prefix): tensor.to(wanted[name]) for name, tensor in ahead.take(wanted).tensors().items()
        }
        if then is not None:
            ahead.begin(self._stored[then])
        return ResidentBlock(
            index=index,
            name=self.block_names[index],
            module=self._blocks[index],
            stored=stored,
            quantisers=self._quantisers,
            anatomy=self._snapshot.anatomy,
            handed=lambda length: self._handed_at(length)[index],
            initialise=self._initialise,
        )

    def normalise(self, h: Tensor) -> Tensor:
        norm: Callable[[Tensor], Tensor] = self._model.get_submodule(self._snapshot.anatomy.final_norm)
        return norm(h)


def _computed_as(tensor: Tensor) -> torch.dtype:
    """float32 for what the model has in any floating dtype."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _settle_buffers(block: nn.Module, device: torch.device) -> None:
    """Moves the buffers that no checkpoint stores to the device; parameters stay on the meta device."""
    for module in block.modules():
        for name in module._non_persistent_buffers_set:
            buffer = getattr(module, name)
            if buffer is not None:
                setattr(module, name, buffer.to(device))
