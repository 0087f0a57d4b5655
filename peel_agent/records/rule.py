"""Rules: what is watched for, when it is told, and to whom."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from peel_agent.records.report import Severity

RuleKind = Literal[
    "layer_below",
    "layer_changed",
    "layer_regressed",
    "layer_dropped",
    "layer_stalled",
    "layer_flooding",
    "layer_improvable",
    "run_below_bound",
    "false_convergence",
    "quantization_collapse",
    "metric",
    "no_checkpoint",
    "agent_error",
    "lag",
]

Operator: TypeAlias = Literal["<", "<=", ">", ">="]

CHECKPOINTS: Mapping[RuleKind, int] = {
    "layer_below": 2,
    "layer_changed": 1,
    "layer_regressed": 1,
    "layer_dropped": 2,
    "layer_stalled": 1,
    "layer_flooding": 1,
    "layer_improvable": 2,
    "run_below_bound": 2,
    "false_convergence": 5,
    "quantization_collapse": 2,
    "metric": 2,
    "no_checkpoint": 1,
    "agent_error": 1,
    "lag": 1,
}
"""How many checkpoints in a row raise an alert of each kind: an event needs one, a state two.

False convergence looks back over so many checkpoints.
"""

CLEARED_AFTER: Mapping[RuleKind, int] = {**CHECKPOINTS, "false_convergence": 2}
"""And how many in a row clear it."""

NEEDS: Mapping[RuleKind, tuple[str, ...]] = {
    "layer_below": ("margin",),
    "layer_changed": ("margin",),
    "layer_regressed": ("margin",),
    "layer_dropped": ("margin",),
    "layer_stalled": ("margin",),
    "layer_flooding": ("margin",),
    "layer_improvable": ("headroom",),
    "run_below_bound": ("bounds",),
    "false_convergence": ("bounds", "headroom"),
    "quantization_collapse": ("headroom",),
}
"""The quantities of a peel that a kind reads; one of them is enough. What `metric` reads is in METRICS."""

METRICS: Mapping[str, tuple[str, ...]] = {
    "peel/loss": (),
    "peel/seconds": (),
    "peel/bound": ("bounds",),
    "peel/gap": ("bounds",),
    "peel/yes/<label>": ("bounds",),
    "peel/layers_below": ("margin",),
    "peel/layers_undecided": ("margin",),
    "peel/parts_below": ("margin",),
    "peel/worst_margin": ("margin",),
    "peel/margin/L003": ("margin",),
    "peel/margin_attention/L003": ("margin",),
    "peel/margin_mlp/L003": ("margin",),
    "peel/progress/L003": ("margin",),
    "peel/change/L003": (),
    "peel/headroom/L003": ("headroom",),
}
"""Every form of a key in the tracker that rules may read, and the quantity of a peel that it comes of.

L003 stands for any block, `<label>` for any map.
"""


def metric_form(key: str) -> str:
    """The form of METRICS that a key has, or the key when it has none."""
    return re.sub(r"(?<=/)L\d{3,6}(?=/|$)", "L003", re.sub(r"^peel/yes/.+", "peel/yes/<label>", key))


OF_TIME: frozenset[RuleKind] = frozenset({"no_checkpoint", "agent_error", "lag"})
"""Kinds that go by the clock and by what waits, not by what a checkpoint's report says."""


@dataclass(frozen=True)
class Rule:
    """`[[rule]]`: raise after `for_checkpoints` in a row, clear after `clear_checkpoints` in a row.

    None is the kind's own number (CHECKPOINTS, CLEARED_AFTER, THRESHOLDS). `metric` and `op` are those of a
    rule of kind `metric`. `sinks` are the names of those that get its notices, None for all. While it fires it is told
    again every `repeat_checkpoints`, None for never.
    """

    name: str
    kind: RuleKind
    for_checkpoints: int | None = None
    clear_checkpoints: int | None = None
    after_step: int = 0
    severity: Severity = "warning"
    threshold: float | None = None
    metric: str = ""
    op: Operator = ">"
    repeat_checkpoints: int | None = None
    sinks: tuple[str, ...] | None = None

    @property
    def raised_after(self) -> int:
        return CHECKPOINTS[self.kind] if self.for_checkpoints is None else self.for_checkpoints

    @property
    def cleared_after(self) -> int:
        return CLEARED_AFTER[self.kind] if self.clear_checkpoints is None else self.clear_checkpoints


@dataclass(frozen=True)
class Threshold:
    """What `threshold` of a rule kind means, in words, with its default and between what it may be."""

    words: str
    default: float | None = None
    least: float = 0.0
    most: float = float("inf")
    needed: bool = False


THRESHOLDS: Mapping[RuleKind, Threshold] = {
    "layer_below": Threshold("nats per token that the margin is at most", least=-float("inf")),
    "layer_changed": Threshold("times as far as the other blocks that the weights moved, at least", least=1.0),
    "layer_regressed": Threshold("nats per token that the earlier weights would win, at least"),
    "layer_dropped": Threshold("nats per token that the margin is at most", least=-float("inf")),
    "layer_stalled": Threshold("times as far as the other blocks that the weights move, at most"),
    "layer_flooding": Threshold("the fraction of the stream that is the block's own, at least", most=1.0),
    "layer_improvable": Threshold("nats per token of headroom, at least"),
    "run_below_bound": Threshold("the fraction of the loss by which a construction wins, at least", 0.01, most=1.0),
    "false_convergence": Threshold("the fraction of the loss that is left on the table, at least", 0.01, most=1.0),
    "quantization_collapse": Threshold("the fraction of the loss that the quantiser costs, at least", 0.05, most=1.0),
    "metric": Threshold("the number that the metric is compared with", least=-float("inf"), needed=True),
    "no_checkpoint": Threshold("seconds without a checkpoint (by default five times the longest pause so far)"),
    "agent_error": Threshold("seconds that a trouble lasts before it is told", 300.0),
    "lag": Threshold("checkpoints that wait", 5.0, least=1.0),
}


def threshold_of(rule: Rule) -> float:
    """The rule's threshold, or its kind's own; 0 for a kind that has none."""
    return rule.threshold if rule.threshold is not None else THRESHOLDS[rule.kind].default or 0.0
