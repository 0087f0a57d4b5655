"""A checkpoint opened, and the model run block by block: what load and capture hand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from peel_agent.records.checkpoint import CheckpointRef
from peel_agent.records.precision import WeightSet
from peel_agent.records.report import PartName, Skipped

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

TokenIds: TypeAlias = "NDArray[np.int64]"


class Weights(Protocol):
    """Tensors of one checkpoint by name, read on demand and never memory-mapped."""

    def config(self) -> Mapping[str, Any]:
        """The model configuration stored beside the weights (`config.json`)."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype. One call at a time, not always from the same thread."""


@dataclass(frozen=True)
class Experts:
    """One weight [experts, rows, columns] of the model that checkpoints store expert by expert.

    `parts` are the names of an expert's matrices, all of one shape, whose rows follow one another in the model;
    `{expert}` in them stands for the expert's number.
    """

    parts: tuple[str, ...]


@dataclass(frozen=True)
class AdjacentPairs:
    """A query or key projection of `heads` heads, stored as `name` for rotary positions that turn adjacent rows.

    The model turns row i of a head together with row i + head_dim / 2: rows 2i and 2i + 1 of what is stored.
    """

    name: str
    heads: int


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a decoder are, as module names; those of parts are relative to the block.

    A block maps h [B, S, d] to `mid + mlp(mid)` with `mid = h + attention(h)`. `mlp_path` are the modules that are run
    one after another on mid, norms included, and give what the MLP part adds; it is empty where both parts are added at
    once, which leaves no stream between them. `attention_output` and `mlp_output` are the linear layers whose outputs
    are added to the stream as they are, or None where something comes between, such as a norm or a choice of experts.
    `projection_layout` says how these store their weight: `out_in` as torch.nn.Linear does, `in_out` as transformers'
    Conv1D. Logits are capped as `softcap * tanh(logits / softcap)` when it is given. `stored_as` holds, by the model's
    name of a weight, what checkpoints have instead where the two differ; `{block}` stands for the number of a block.
    Checkpoints with the model's own names are read too.
    """

    blocks: str
    attention_output: str | None
    mlp_path: tuple[str, ...]
    mlp_output: str | None
    final_norm: str
    head: str
    projection_layout: Literal["out_in", "in_out"] = "out_in"
    softcap: float | None = None
    stored_as: Mapping[str, str | Experts | AdjacentPairs] = field(default_factory=dict)


@dataclass(frozen=True)
class CustomModel:
    """What a `[model] factory` gives: a decoder that transformers does not have, and where its parts are.

    The weights of `module` are not used: they come from the checkpoint, by the names of its state dict. It is called
    with token ids [B, S], int64, of at most `context` tokens, and gives to each block of `anatomy.blocks`, a
    torch.nn.ModuleList, the stream [B, S, d] as first argument; a block returns the stream, alone or first of a tuple.
    `anatomy.head` is a torch.nn.Linear. `body`, when it is given, is called instead of the module: it may leave out the
    head. `initialise` fills one submodule as the architecture does, by default with its own reset_parameters.
    """

    module: nn.Module
    anatomy: Anatomy
    context: int
    body: Callable[[Tensor], Any] | None = None
    initialise: Callable[[nn.Module], Any] | None = None


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint opened: the model's modules on the meta device, and the weights to fill them with."""

    ref: CheckpointRef
    model: nn.Module
    family: str
    anatomy: Anatomy
    weights: Weights
    width: int
    vocabulary: int
    context: int
    parameters: int
    precision: str
    tied_head: bool
    body: Callable[[Tensor], Any]
    """Runs token ids [B, S] through embeddings and blocks."""
    initialise: Callable[[nn.Module], Any]
    sets: Mapping[str, WeightSet] = field(default_factory=dict)
    """Weight sets by glob, for weights that are stored as latents."""


@dataclass(frozen=True)
class Probe:
    """Token sequences held fixed for the run, split by sequence into three disjoint parts.

    Each part is an int64 array [sequences, sequence_length]. References are solved on `fit`, chosen on `select`, and
    every published number is measured on `confirm` (method.md 1). `left_out` says which tokens of its file are in none
    of them although they might have been, such as masked ones.
    """

    fit: TokenIds
    select: TokenIds
    confirm: TokenIds
    fingerprint: str
    left_out: tuple[Skipped, ...] = ()

    @property
    def sequence_length(self) -> int:
        return int(self.fit.shape[1])


@dataclass(frozen=True)
class Projection:
    """An output projection y = x @ weight + bias with weight [in, out] and bias [out] or None.

    With `softcap`, which only heads have, y is capped smoothly to that size.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None = None


@dataclass(frozen=True)
class Observation:
    """One block seen from inside on B sequences of S tokens.

    mid [B, S, d]: the stream between the parts, or the input again where a block has no parts. output [B, S, d].
    """

    mid: Tensor
    output: Tensor


@dataclass(frozen=True)
class Features:
    """What the two output projections of a block are fed.

    attention [B, S, heads * head_dim], mlp [B, S, d_ff]; mid and output as in Observation.
    """

    attention: Tensor
    mid: Tensor
    mlp: Tensor
    output: Tensor


@dataclass(frozen=True)
class Gradient:
    """A block seen from inside on the way back, for the gradient of a loss at its output.

    Features as in Observation; mid [B, S, d] is the loss's gradient at the stream between the parts, input [B, S, d]
    that at the block's input.
    """

    attention_features: Tensor
    mlp_features: Tensor
    mid: Tensor
    input: Tensor


@dataclass(frozen=True)
class PastBlock:
    """A block's weights at the checkpoint before, by the block's own names.

    `stored` is what the file holds (latents of low-bit weights) in float32, `effective` what its forward pass used.
    """

    stored: Mapping[str, Tensor]
    effective: Mapping[str, Tensor]


class Past(Protocol):
    """The checkpoint before, of the same architecture, its weights read block by block.

    `rounding` is the narrower dtype when the two checkpoints were stored in different ones: both are then compared in
    it, so that rounding alone is no change.
    """

    step: int | None
    rounding: torch.dtype | None

    def block(self, index: int) -> PastBlock:
        """The weights of one block. TornCheckpoint when its files are gone."""


class Block(Protocol):
    """One trained block with its weights resident. `attention` and `mlp` stand in for its two output projections.

    `has_parts` says whether there is a stream between attention and MLP, `has_projections` whether there are output
    projections whose outputs are added to the stream as they are; without, what needs them raises.

    `parameters` are the weights that the forward pass uses, `latents` those from which low-bit ones are made, and
    `sets` the weight sets of the latter by name; the sets of the two projections are at hand too.
    """

    index: int
    name: str
    has_parts: bool
    has_projections: bool
    parameters: Mapping[str, Tensor]
    latents: Mapping[str, Tensor]
    sets: Mapping[str, WeightSet]
    part_names: Mapping[PartName, tuple[str, ...]]
    """The weights of attention and MLP, norms in front of them included; empty where a block has no parts."""
    attention_projection: Projection
    mlp_projection: Projection
    attention_set: WeightSet
    mlp_set: WeightSet

    def run(self, h: Tensor, *, attention: Projection | None = None, mlp: Projection | None = None) -> Tensor:
        """The block's output [B, S, d] for its input h [B, S, d]."""

    def run_as(self, h: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The output with some other effective weights, without gradients."""

    def observe(self, h: Tensor) -> Observation:
        """The same with the stream between its parts."""

    def features(self, h: Tensor) -> Features:
        """The same with what its output projections are fed."""

    def run_with(self, h: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The block's output with other parameters of the same names and shapes; gradients flow to them.

        Those in a weight set are taken as latents: quantised, with the gradient of the identity.
        """

    def backward(self, h: Tensor, gradient: Tensor) -> Gradient:
        """What a loss's gradient [B, S, d] at the output for input h [B, S, d] is further inside."""

    def stored(self, *, attention: Projection | None = None, mlp: Projection | None = None) -> Mapping[str, Tensor]:
        """Output projections under the block's own parameter names and in their layout."""

    def initial_parameters(self) -> Mapping[str, Tensor]:
        """Parameters as the architecture initialises them, by a fixed seed."""

    def run_mlp_part(self, mid: Tensor, *, mlp: Projection | None = None) -> Tensor:
        """The block's output mid + mlp(mlp_norm(mid)) from the stream between its parts, both [B, S, d]."""

    def observe_mlp_part(self, mid: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's features [B, S, d_ff] and the block's output [B, S, d] from the stream between its parts."""


@dataclass
class Chunk:
    """How many sequences are run at once, and how long those are: of shorter ones more are run.

    The one thing here that changes, for when memory runs out it is halved.
    """

    sequences: int
    length: int | None = None

    def of(self, length: int) -> int:
        """How many sequences of this length."""
        return self.sequences * max(1, (self.length or length) // length)

    def halve(self) -> bool:
        """Whether there was anything left to halve."""
        possible = self.sequences > 1
        self.sequences = max(1, self.sequences // 2)
        return possible


class Trace(Protocol):
    """A checkpoint ready to be run block by block over the probe: what the peel room sees of a model.

    Streams are float32 tensors [N, S, d] on `device`; block l (0-based) maps h_l to h_{l+1} in transformers'
    numbering of hidden states.
    """

    probe: Probe
    block_names: tuple[str, ...]
    width: int
    chunk: Chunk
    tied_head: bool
    head: Projection
    head_latents: Tensor
    """[d, V]: what the head's weight is made from; the weight itself unless it is in a weight set."""
    head_set: WeightSet

    def embed(self, ids: TokenIds) -> Tensor:
        """h_0 [N, S, d] for token ids [N, S]."""

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """The blocks from `start` to before `stop` (all, by default) in order, each one's weights read before it comes.

        Weights take memory as long as their block is held, and no longer. The next block's, as they are stored, are
        read while a block is in use: two blocks are in flight.
        """

    def normalise(self, h: Tensor) -> Tensor:
        """The final norm, [B, S, d] to [B, S, d]: the features that the head multiplies."""
