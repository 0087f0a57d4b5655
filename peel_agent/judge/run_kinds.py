"""The rule kinds that are about the run as a whole, or about a number of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from peel_agent.judge.convergence import fall_of
from peel_agent.judge.testimony import SILENCE, Kind, Testimony
from peel_agent.records import BoundReport, Estimate, PeelReport, ReportObservation, Rule, RuleKind, threshold_of

RUN = "run"

FLAT = 0.005
"""A training loss that falls by less than this fraction over the window, for certain, is flat."""

_BELOW_BOUND = (
    "the optimiser left something on the table: `scan --quantities headroom` says which blocks could be better",
    "the run is young: the gap shrinks from checkpoint to checkpoint",
    "the probe is not from the distribution of the training data: the probe's loss is far above the training loss",
)
_CONVERGED = (
    "the learning rate is too low, or its schedule has ended: the loss falls again after a restart with a higher one",
    "some layers are stuck while the others compensate: `scan --quantities headroom` names them",
    "the data are exhausted: then a probe of fresh text has a far higher loss than the training has",
)
_COLLAPSE = (
    "the scale of the quantiser collapsed, or its codes saturate: most codes of the matrix are equal",
    "the weight set is too coarse for this layer: give it more bits, or leave it in full precision",
)

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def run_below_bound(observed: ReportObservation, rule: Rule) -> dict[str, Testimony]:
    """A cheap construction from the run's layers beats the trained model by more than a fraction of the loss.

    What a refitted head alone wins is not the layers': it raises nothing. In a young run it is 2 % of the loss.
    """
    report = observed.report
    winner = _winner(report)
    if report.gap is None or winner is None:
        return {}
    if report.finding is not None:  # an early run, or one in trouble: that is told, and explains the gap
        return {RUN: SILENCE}
    floor = threshold_of(rule) * report.loss.value
    of_head = next((bound.value.value for bound in report.bounds if bound.label == "head"), report.loss.value)
    of_layers = of_head - winner.value.value
    if report.gap.high <= floor or winner.label == "head":
        words = f"no cheap model made of the run's own layers is better by {floor:.4f} nats/token"
        return {RUN: Testimony("against", words)}
    if report.gap.low <= floor or of_layers <= floor or not winner.within_class:
        return {RUN: SILENCE}
    step = report.bound_step if report.bound_step is not None else report.checkpoint.step
    words = (
        f"a cheap model made of the run's own layers (map {winner.label}, of step {step}) has a lower loss, by "
        f"{report.gap} nats/token, {of_layers:.4f} of it by its layers: training left that much on the table"
    )
    return {RUN: Testimony("for", words, causes=_BELOW_BOUND)}


def _winner(report: PeelReport) -> BoundReport | None:
    """The construction that the bound is of, as this report has it; None when there is none."""
    return next((bound for bound in report.bounds if bound.label == report.bound_label), None)


def false_convergence(observed: ReportObservation, rule: Rule) -> dict[str, Testimony]:
    """The training loss is flat over the last checkpoints while a better model is proven to be near."""
    report, window = observed.report, rule.raised_after
    earlier = [report for report in observed.history if report.checkpoint.step is not None][-window:]
    step = report.checkpoint.step
    if len(earlier) < window or step is None:
        return {RUN: SILENCE}
    since = earlier[0].checkpoint.step or 0
    fall = fall_of([point for point in observed.training_loss if since < point[0] <= step])
    if fall is None:
        return {RUN: SILENCE}
    if fall.low > FLAT * fall.level:
        return {RUN: Testimony("against", f"the training loss falls again, by {fall.value:.4f} since step {since}")}
    room = _standing_room([*earlier, report], threshold_of(rule))
    if room == "":
        return {
            RUN: Testimony("against", "no cheap model made of its own layers and no refitted block is better any more")
        }
    if fall.low > 0.0 or fall.high >= 2 * FLAT * fall.level or room is None:
        return {RUN: SILENCE}
    words = (
        f"the training loss has been flat since step {since} (it fell by {fall.value:.4f} [{fall.low:.4f}, "
        f"{fall.high:.4f}]), and that is not the best this model can do: {room}"
    )
    return {RUN: Testimony("for", words, causes=_CONVERGED, counted=True)}


def _standing_room(reports: list[PeelReport], fraction: float) -> str | None:
    """What has been left on the table in each of these reports, in words; "" when nothing is, None when it is open."""
    floors = [fraction * report.loss.value for report in reports]
    gaps = [report.gap for report in reports]
    if all(gap is not None and gap.low > floor for gap, floor in zip(gaps, floors, strict=True)):
        winner = _winner(reports[-1])
        if winner is None or winner.within_class:
            return f"a cheap model made of its own layers has a loss lower by {gaps[-1]} nats/token"
    best = {
        layer.name: layer.headroom
        for layer in reports[-1].layers
        if layer.headroom is not None and all(_has_room(report, layer.name, fraction) for report in reports)
    }
    if best:
        name, room = max(best.items(), key=lambda entry: entry[1].value)
        return f"{name} could be better by {room} nats/token, and could at each of the last {len(reports)} checkpoints"
    known: list[Estimate | None] = [gaps[-1], *(layer.headroom for layer in reports[-1].layers)]
    measured = [estimate for estimate in known if estimate is not None]
    return "" if measured and all(estimate.high <= floors[-1] for estimate in measured) else None


def _has_room(report: PeelReport, name: str, fraction: float) -> bool:
    rooms = (layer.headroom for layer in report.layers if layer.name == name)
    return any(room is not None and room.low > fraction * report.loss.value for room in rooms)


def quantization_collapse(observed: ReportObservation, rule: Rule) -> dict[str, Testimony]:
    """What the weight set itself costs a low-bit layer exceeds a fraction of the loss."""
    floor = threshold_of(rule) * observed.report.loss.value
    testimonies = {}
    for layer in observed.report.layers:
        share = layer.quantization_share
        if share is None:
            continue
        words = f"the quantiser costs {layer.name} {share:.4f} nats/token"
        if share > floor:
            told = f"{words}, more than {floor:.4f}: free weights in its place would do that much better"
            testimonies[layer.name] = Testimony("for", told, causes=_COLLAPSE)
        else:
            testimonies[layer.name] = Testimony("against", words)
    return testimonies


def metric(observed: ReportObservation, rule: Rule) -> dict[str, Testimony]:
    """A number that trackers get, held against the rule's threshold."""
    value, threshold = observed.metrics.get(rule.metric), rule.threshold
    if value is None or threshold is None:
        return {RUN: SILENCE}
    words = f"{rule.metric} is {value:.6g} at step {observed.report.checkpoint.step}"
    if _OPERATORS[rule.op](value, threshold):
        return {RUN: Testimony("for", f"{words}, which is {rule.op} {threshold:g}")}
    return {RUN: Testimony("against", f"{words}, which is not {rule.op} {threshold:g}")}


RUN_KINDS: Mapping[RuleKind, Kind] = {
    "run_below_bound": run_below_bound,
    "false_convergence": false_convergence,
    "quantization_collapse": quantization_collapse,
    "metric": metric,
}
