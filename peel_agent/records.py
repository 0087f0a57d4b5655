"""The frozen records that cross the doors between rooms.

    watch -> CheckpointRef -> load -> Snapshot, Probe -> capture -> Trace -> peel -> PeelReport
          -> judge -> Verdict -> publish -> Publication -> trackers

Importing this module imports neither torch nor numpy: the parent daemon lives on these records alone.
All losses, margins, bounds and gaps are in nats per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

SCHEMA = "peel-agent/report/1"

Status = Literal["above", "below", "undecided"]
Zone = Literal["effective", "caution", "ineffective", "undecided"]
PartName = Literal["attention", "mlp"]
TokenIds: TypeAlias = "NDArray[np.int64]"


# ---------------------------------------------------------------- watch


@dataclass(frozen=True)
class FileStamp:
    """One file of a checkpoint as seen in its directory entry: enough to notice a later change."""

    name: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Readiness:
    """What a format plug-in found at a path.

    `complete`: marker parses and every indexed file has its expected size. `incomplete`: may still become complete.
    `damaged`: never will, whatever is written next. `reason` names the file and the two values that disagree.
    """

    state: Literal["complete", "incomplete", "damaged"]
    reason: str
    files: tuple[FileStamp, ...] = ()


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that was whole when it was last looked at.

    `step` is the training step (None when nothing in the checkpoint says so), `committed_at` the newest modification
    time of its files in Unix seconds, `fingerprint` a digest of names, sizes and times of its files.
    """

    path: Path
    step: int | None
    format: str
    fingerprint: str
    committed_at: float
    files: tuple[FileStamp, ...] = ()


# ---------------------------------------------------------------- load


class Weights(Protocol):
    """Tensors of one checkpoint by name, read on demand and never memory-mapped."""

    def config(self) -> Mapping[str, Any]:
        """The model configuration stored beside the weights (`config.json`)."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype."""


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a pre-norm decoder are, as module names.

    A block maps h [B, S, d] to `mid + mlp(mlp_norm(mid))` with `mid = h + attention(attention_norm(h))`. Names of
    parts are relative to the block. `projection_layout` says how the two output projections store their weight:
    `out_in` as torch.nn.Linear does, `in_out` as transformers' Conv1D does.
    """

    blocks: str
    attention_output: str
    mlp_norm: str
    mlp: str
    mlp_output: str
    final_norm: str
    head: str
    projection_layout: Literal["out_in", "in_out"] = "out_in"


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


@dataclass(frozen=True)
class Probe:
    """Token sequences held fixed for the run, split by sequence into three disjoint parts.

    Each part is an int64 array [sequences, sequence_length]. References are solved on `fit`, chosen on `select`, and
    every published number is measured on `confirm` (METHOD 1).
    """

    fit: TokenIds
    select: TokenIds
    confirm: TokenIds
    fingerprint: str

    @property
    def sequence_length(self) -> int:
        return int(self.fit.shape[1])


# ---------------------------------------------------------------- capture


@dataclass(frozen=True)
class Projection:
    """An output projection y = x @ weight + bias with weight [in, out] and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Observation:
    """One block seen from inside on B sequences of S tokens.

    attention_features [B, S, heads * head_dim]: input of the attention output projection. mid [B, S, d]: the stream
    between the parts. mlp_features [B, S, d_ff]: input of the MLP's output projection. output [B, S, d].
    """

    attention_features: Tensor
    mid: Tensor
    mlp_features: Tensor
    output: Tensor


class Block(Protocol):
    """One trained block with its weights resident. `attention` and `mlp` stand in for its two output projections."""

    index: int
    name: str
    attention_projection: Projection
    mlp_projection: Projection

    def run(self, h: Tensor, *, attention: Projection | None = None, mlp: Projection | None = None) -> Tensor:
        """The block's output [B, S, d] for its input h [B, S, d]."""

    def observe(self, h: Tensor, *, attention: Projection | None = None) -> Observation:
        """The same with its inner features."""

    def run_mlp_part(self, mid: Tensor) -> Tensor:
        """The block's output mid + mlp(mlp_norm(mid)) from the stream between its parts, both [B, S, d]."""


class Trace(Protocol):
    """A checkpoint ready to be run block by block over the probe: what the peel room sees of a model.

    Streams are float32 tensors [N, S, d] on `device`; block l (0-based) maps h_l to h_{l+1} in transformers'
    numbering of hidden states.
    """

    probe: Probe
    block_names: tuple[str, ...]
    width: int
    chunk: int
    """Sequences to run at once."""
    tied_head: bool
    head: Projection

    def embed(self, ids: TokenIds) -> Tensor:
        """h_0 [N, S, d] for token ids [N, S]."""

    def blocks(self, stop: int | None = None) -> Iterator[Block]:
        """The first `stop` blocks (all, when None) in order. A block's weights may be dropped two steps later."""

    def normalise(self, h: Tensor) -> Tensor:
        """The final norm, [B, S, d] to [B, S, d]: the features that the head multiplies."""


# ---------------------------------------------------------------- peel


@dataclass(frozen=True)
class Plan:
    """What to compute: `references` stand in for whole blocks, `maps` is a suite's name or a tuple of target maps."""

    quantities: frozenset[str]
    references: tuple[str, ...]
    maps: str | tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Estimate:
    """A number in nats per token with its 95 % paired bootstrap interval over sequences."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PartReport:
    status: Status
    margin: Estimate | None


@dataclass(frozen=True)
class LayerReport:
    """One block. `references` holds loss(with that reference spliced in) - loss(trained) on `confirm`."""

    index: int
    name: str
    status: Status
    margin: Estimate | None
    best_reference: str | None
    references: Mapping[str, float]
    parts: Mapping[PartName, PartReport]
    stream_share: float
    headroom: Estimate | None = None
    quantization_share: float | None = None
    optimization_share: float | None = None


@dataclass(frozen=True)
class BoundReport:
    """One target map, 1-based as in the paper: block i of the chain is fitted to h_{map[i]}."""

    label: str
    map: tuple[int, ...]
    solver: str
    value: Estimate
    best: float
    within_class: bool


@dataclass(frozen=True)
class Skipped:
    """A check that did not run, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class CheckpointInfo:
    path: str
    step: int | None
    format: str
    fingerprint: str


@dataclass(frozen=True)
class ModelInfo:
    family: str
    blocks: int
    parameters: int
    precision: str


@dataclass(frozen=True)
class ProbeInfo:
    fingerprint: str
    fit_tokens: int
    select_tokens: int
    confirm_tokens: int
    sequence_length: int


@dataclass(frozen=True)
class Timing:
    """Seconds spent."""

    load: float = 0.0
    capture: float = 0.0
    solve: float = 0.0
    score: float = 0.0


@dataclass(frozen=True)
class Findings:
    """What the peel room computed from a Trace."""

    loss: Estimate
    bound: Estimate | None
    gap: Estimate | None
    zone: Zone
    bounds: tuple[BoundReport, ...]
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    timing: Timing


@dataclass(frozen=True)
class PeelReport:
    """One checkpoint peeled; its JSON form is the contract's `peel-agent/report/1`."""

    checkpoint: CheckpointInfo
    model: ModelInfo
    probe: ProbeInfo
    loss: Estimate
    bound: Estimate | None
    gap: Estimate | None
    zone: Zone
    bounds: tuple[BoundReport, ...]
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    timing: Timing
    redundancy: tuple[tuple[float, ...], ...] | None = None
    alerts: tuple[Notice, ...] = ()
    schema: str = SCHEMA


# ---------------------------------------------------------------- judge

RuleKind = Literal["layer_below"]
Severity = Literal["info", "warning", "critical"]


@dataclass(frozen=True)
class Rule:
    """`[[rule]]`: raise after `for_checkpoints` in a row, clear after `clear_checkpoints` in a row."""

    name: str
    kind: RuleKind
    for_checkpoints: int = 2
    clear_checkpoints: int = 2
    after_step: int = 0
    severity: Severity = "warning"


@dataclass(frozen=True)
class RuleState:
    """Where one (rule, layer) stands. `streak` counts checkpoints in a row that spoke against the phase."""

    rule: str
    layer: str
    phase: Literal["inactive", "pending", "firing"]
    streak: int
    since_step: int | None


@dataclass(frozen=True)
class Notice:
    """An alert that began or ended at a checkpoint. `id` is stable: delivered twice, it is one alert."""

    id: str
    rule: str
    severity: Severity
    state: Literal["firing", "resolved"]
    layer: str
    step: int | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """The judge's answer to one report: the states to keep, and what changed."""

    states: tuple[RuleState, ...]
    notices: tuple[Notice, ...]

    @property
    def firing(self) -> tuple[RuleState, ...]:
        return tuple(state for state in self.states if state.phase == "firing")


# ---------------------------------------------------------------- publish


@dataclass(frozen=True)
class Publication:
    """Everything one checkpoint sends to a tracker. Sending it twice changes nothing.

    `timestamp_ms` comes from the checkpoint, never from the clock. `files` maps artifact paths to text.
    """

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
