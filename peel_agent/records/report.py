"""What the peel room is asked for and answers; all losses, margins, bounds and gaps in nats per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from peel_agent.records.feedforward import YesMemory
from peel_agent.records.past import Sketches
from peel_agent.records.sequences import SequenceLosses

SCHEMA = "peel-agent/report/1"

Status = Literal["above", "below", "undecided", "not_measured"]
Zone = Literal["effective", "caution", "ineffective", "undecided"]
PartName = Literal["attention", "mlp"]
Severity = Literal["info", "warning", "critical"]


Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage in words and how many of how many equal pieces of it are done, 0 when it begins."""


@dataclass(frozen=True)
class Plan:
    """What to compute: `references` stand in for whole blocks, `maps` is a suite's name or a tuple of target maps."""

    quantities: frozenset[str]
    references: tuple[str, ...]
    maps: str | tuple[tuple[int, ...], ...]
    solver: str = "closed_form"
    parts: bool = True
    """Whether the two parts of each block get margins too."""
    few_sequences: bool = False
    """Whether so few sequences are scored that it is unsure which reference is best: intervals then allow for it."""
    seconds: float | None = None
    """The time budget; what it does not suffice for is left out and said."""
    passes: float | None = None
    """The same for margins and progress, in plain forward passes over the whole probe."""


@dataclass(frozen=True)
class Estimate:
    """A number in nats per token with its 95 % paired bootstrap interval over sequences."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:z.4f} [{self.low:z.4f}, {self.high:z.4f}]"


@dataclass(frozen=True)
class WorstMatrix:
    """The weight matrix of a block or part that changed most beside the same matrix of the other blocks."""

    name: str
    ratio: float


@dataclass(frozen=True)
class Change:
    """How far weights moved since the checkpoint before, as a ratio to the other blocks' median (method.md 4b).

    About 1 is usual, exactly 0 is frozen.
    """

    ratio: float
    worst: WorstMatrix | None = None


FindingKind = Literal[
    "early",
    "collapsed",
    "diverged",
    "flooding",
    "victim",
    "changed",
    "regressed",
    "dead",
    "dropped",
    "never_trained",
    "frozen",
    "stalled",
    "below",
    "improvable",
]


ACCUSING: tuple[FindingKind, ...] = (
    "flooding",
    "changed",
    "regressed",
    "dead",
    "dropped",
    "stalled",
    "never_trained",
    "below",
    "improvable",
)
"""The findings that say that something is wrong with a layer."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with one layer, a part of it, or the run, in words that need no paper.

    `subject` is a block (`model.layers.3`), a part (`model.layers.3/mlp`) or `run`; `evidence` are the numbers that it
    stands on, by name; `causes` are likely ones, each with how to tell it; `since_step` is the last step at which
    nothing of this was seen.
    """

    kind: FindingKind
    subject: str
    words: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    causes: tuple[str, ...] = ()
    since_step: int | None = None


@dataclass(frozen=True)
class FirstMargin:
    """A margin on the first so many tokens of sequences, on which every block is measured at first.

    It is compared over time: what is published may be of more tokens at one checkpoint than at another.
    """

    tokens: int
    margin: Estimate


@dataclass(frozen=True)
class PartReport:
    """One part of a block; `headroom`, `change` and `progress` as for the whole block.

    `dead` says why the part adds nothing to the stream on any token, None when it adds something.
    """

    status: Status
    margin: Estimate | None
    headroom: Estimate | None = None
    change: Change | None = None
    progress: Estimate | None = None
    dead: str | None = None
    cut: int | None = None
    first: FirstMargin | None = None


@dataclass(frozen=True)
class LayerReport:
    """One block. `references` holds loss(with that reference spliced in) - loss(trained) on `confirm`.

    `headroom` is loss(trained) - loss(a better block of the same kind), `progress` is loss(with the block's weights of
    the checkpoint before put back) - loss(trained): below 0 the block got worse. A low-bit block's two shares are what
    a better optimiser could still win within the weight set, and what the set itself costs beside free weights
    (method.md 5).
    """

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
    change: Change | None = None
    progress: Estimate | None = None
    finding: Finding | None = None
    hint: str | None = None
    """Why an `undecided` block was left so, and what would tell more."""
    cut: int | None = None
    """The margin is of the first so many tokens of each sequence, None of whole sequences."""
    first: FirstMargin | None = None
    """The margin on cuts that are the same for every block and checkpoint; None where whole sequences came first."""


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
    vocabulary: int | None = None
    """None for a fully connected network, and in reports of older versions."""


@dataclass(frozen=True)
class ProbeInfo:
    fingerprint: str
    fit_tokens: int
    select_tokens: int
    confirm_tokens: int
    sequence_length: int

    @property
    def unit(self) -> str:
        """Of losses, bounds, margins and their differences; the samples of a fully connected network have length 1."""
        return "nats per token" if self.sequence_length > 1 else "squared error a sample"


@dataclass(frozen=True)
class Timing:
    """Seconds spent."""

    load: float = 0.0
    capture: float = 0.0
    solve: float = 0.0
    score: float = 0.0


@dataclass(frozen=True)
class BoundMemory:
    """The best construction so far (method.md 3, step 4): what a checkpoint hands to the next one.

    `select` is its mean loss on select, `confirm` its loss on each confirm sequence, `best` the least value on confirm
    of each map by label. `label` is its map's, `step` that of the checkpoint it was built from; memories of older
    versions do not know them. It counts only for the probe of this fingerprint.
    """

    probe: str
    select: float
    confirm: tuple[float, ...]
    best: Mapping[str, float]
    label: str | None = None
    step: int | None = None


Memory: TypeAlias = BoundMemory | YesMemory
"""What a checkpoint hands to the next one: of a transformer, or of a fully connected network."""


@dataclass(frozen=True)
class Findings:
    """What the peel room computed from a Trace, or from a network and its samples (then in squared error a sample)."""

    loss: Estimate
    bound: Estimate | None
    gap: Estimate | None
    zone: Zone
    bounds: tuple[BoundReport, ...]
    layers: tuple[LayerReport, ...]
    redundancy: tuple[tuple[float, ...], ...] | None
    memory: Memory | None
    skipped: tuple[Skipped, ...]
    timing: Timing
    sketches: Sketches | None = None
    work: Mapping[str, float] = field(default_factory=dict)
    """What each stage of margins and progress cost, in plain forward passes over the whole probe, by counted work."""
    bound_label: str | None = None
    bound_step: int | None = None
    losses: SequenceLosses | None = None

    @property
    def passes(self) -> float:
        """What margins and progress cost altogether, in the same unit."""
        return sum(self.work.values())


@dataclass(frozen=True)
class PeelReport:
    """One checkpoint peeled; its JSON form is the contract's `peel-agent/report/1`.

    `bound_label` names the construction that the bound is the loss of, `bound_step` the checkpoint it was built from.
    """

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
    bound_label: str | None = None
    bound_step: int | None = None
    since_step: int | None = None
    """The step of the checkpoint that `change` and `progress` are held against."""
    finding: Finding | None = None
    """What is said of the run as a whole."""
    alerts: tuple[Notice, ...] = ()
    schema: str = SCHEMA


@dataclass(frozen=True)
class Notice:
    """An alert that began, goes on or ended. `id` is stable: delivered twice, it is one notice.

    `subject` is a block, a part of one (`model.layers.3/mlp`), `run` or `agent`. `unchecked` are checks that were not
    made, in words; `command` shows more.
    """

    id: str
    rule: str
    severity: Severity
    state: Literal["firing", "resolved"]
    subject: str
    step: int | None
    text: str
    since_step: int | None = None
    causes: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    command: str | None = None


@dataclass(frozen=True)
class Peeled:
    """What measuring one checkpoint gives: the report, and what the next checkpoint is to know.

    `losses` are there for those who asked for them, to pair this checkpoint with another.
    """

    report: PeelReport
    memory: Memory | None
    sketches: Sketches | None = None
    losses: SequenceLosses | None = None
