"""One sign a function: what a place of a report shows, as a finding, or None. The words say numbers and steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log
from statistics import median

from peel_agent.diagnose import causes, limits
from peel_agent.diagnose.places import Case, Place, places, usual
from peel_agent.records import Change, Estimate, Finding

STAND_INS = {
    "skip": "nothing",
    "affine": "a fitted linear map",
    "previous": "the block before it, refitted,",
}


def changed(case: Case, place: Place) -> Finding | None:
    """The weights moved much farther since the checkpoint before than those of the other blocks, or than usually."""
    change = place.change
    if change is None:
        return None
    times, elsewhere = _unusual(case, place), [_unusual(case, peer) for peer in _elsewhere(case, place)]
    share = limits.OUTSHONE if stands_out(case, place) else limits.ISOLATED
    if times < max([1.0, *(share * other for other in elsewhere)]):
        return None
    since = case.report.since_step
    words = f"{place.words} changed: since step {since} its weights moved {change.ratio:.1f} times as far as those of "
    words += f"the other blocks{_usually(case, place)}"
    evidence = {"change": change.ratio}
    if change.worst is not None:
        words += f", and {change.worst.name} moved {change.worst.ratio:.1f} times as far"
        evidence["worst_matrix"] = change.worst.ratio
    if place.progress is not None and place.progress.high < 0.0:
        words += f"; with its weights of step {since} put back the loss is {-place.progress.value:.4f} nats/token lower"
        evidence["progress"] = place.progress.value
    if place.dead is not None:
        words += f"; it is dead now: {place.dead}"
    return Finding("changed", place.subject, words, evidence, causes.CHANGED, since)


def _usually(case: Case, place: Place) -> str:
    ratios = [earlier.change.ratio for earlier in case.before(place) if earlier.change is not None]
    return f" (usual for it: {median(ratios):.1f} times)" if ratios else ""


def _unusual(case: Case, place: Place) -> float:
    """How far a place or its worst matrix moved, as a multiple of the limit: from 1 on it is unusual.

    What is usual is its own median before, or what the other blocks did where that is unknown.
    """
    change = place.change
    if change is None:
        return 0.0
    before = [earlier.change for earlier in case.before(place) if earlier.change is not None]
    worst = _worst_ratio(change)
    if not before:
        return max(change.ratio / limits.FIRST_CHANGED_BLOCK, worst / limits.FIRST_CHANGED_MATRIX)
    usual_ratio = max(limits.STILL, median(change.ratio for change in before))
    usual_worst = max(1.0, median(_worst_ratio(change) for change in before))
    return max(change.ratio / usual_ratio / limits.CHANGED_BLOCK, worst / usual_worst / limits.CHANGED_MATRIX)


def stands_out(case: Case, place: Place) -> bool:
    """Whether a place moved so far that nothing else need be asked."""
    return _unusual(case, place) >= limits.STANDS_OUT


def _elsewhere(case: Case, place: Place) -> Iterator[Place]:
    """Every block and part of the other layers."""
    return (other for layer in case.report.layers if layer.name != place.layer.name for other in places(layer))


def _worst_ratio(change: Change) -> float:
    return change.ratio if change.worst is None else change.worst.ratio


def regressed(case: Case, place: Place) -> Finding | None:
    """The weights of the checkpoint before would do better."""
    progress = place.progress
    if progress is None or progress.high >= 0.0:
        return None
    usual_loss = max(limits.REGRESSED * case.report.loss.value, limits.OUTSTANDING * _lost_elsewhere(case, place))
    if -progress.value < usual_loss:
        return None
    since = case.report.since_step
    words = (
        f"{place.words} got worse since step {since}: with its weights of step {since} put back the loss is "
        f"{-progress.value:.4f} [{-progress.high:.4f}, {-progress.low:.4f}] nats/token lower"
    )
    return Finding("regressed", place.subject, words, {"progress": progress.value}, causes.REGRESSED, since)


def _lost_elsewhere(case: Case, place: Place) -> float:
    """The most that earlier weights would win in any other layer, or in any layer at earlier checkpoints."""
    before = (other for report in case.history for layer in report.layers for other in places(layer))
    won = [-other.progress.value for other in (*_elsewhere(case, place), *before) if other.progress is not None]
    return max([0.0, *won])


def dead(case: Case, place: Place) -> Finding | None:
    """A part adds the same to every token."""
    if place.dead is None:
        return None
    words = f"{place.words} is dead: {place.dead}"
    evidence = {} if place.margin is None else {"margin": place.margin.value}
    return Finding("dead", place.subject, words, evidence, causes.DEAD, _last_step(case, place, "dead"))


def _last_step(case: Case, place: Place, kind: str) -> int | None:
    """The last step at which the layer did not have a finding of this kind."""
    for report in reversed(case.history):
        layer = next((earlier for earlier in report.layers if earlier.name == place.layer.name), None)
        if layer is None or layer.finding is None or layer.finding.kind != kind:
            return report.checkpoint.step
    return None


def _first_told(case: Case, place: Place, kind: str) -> int | None:
    """The step at which the layer had a finding of this kind first, None when it never had."""
    for report in case.history:
        for layer in report.layers:
            if layer.name == place.layer.name and layer.finding is not None and layer.finding.kind == kind:
                return report.checkpoint.step
    return None


def dropped(case: Case, place: Place) -> Finding | None:
    """The margin is far under its own last values, while the other blocks' are not."""
    still = _still_dropped(case, place)
    if still is not None:
        return still
    now = place.compared
    before = list(case.comparable(place)[-limits.DROP_CHECKPOINTS :])
    fall = None if now is None else drop(now[1], before)
    if now is None or fall is None or fall < limits.DROPPED or _peers_kept(case, place) < limits.KEPT:
        return None
    was, since = median(margin.value for margin in before), case.step_before()
    words = f"{place.words} does far less than up to step {since}: {_loss_without(place)}, and did by {was:.4f}"
    return Finding(
        "dropped", place.subject, words, {"margin": now[1].value, "margin_before": was}, causes.DROPPED, since
    )


def _still_dropped(case: Case, place: Place) -> Finding | None:
    """The finding of the report before, while the margin has not come half of the way back."""
    layers = case.history[-1].layers if case.history else ()
    told = next((layer.finding for layer in layers if layer.name == place.layer.name), None)
    now = place.compared
    if told is None or told.kind != "dropped" or told.subject != place.subject or now is None:
        return None
    if now[1].value > limits.DROPPED * told.evidence["margin_before"]:
        return None
    words = f"{place.words} still does far less than up to step {told.since_step}: {_loss_without(place)}, and "
    words += f"did by {told.evidence['margin_before']:.4f}"
    return replace(told, words=words, evidence={**told.evidence, "margin": now[1].value})


def drop(now: Estimate, before: list[Estimate]) -> float | None:
    """What a margin certainly fell by, (least lower limit before - upper limit now), over the median before."""
    if not before:
        return None
    typical = median(margin.value for margin in before)
    return (min(margin.low for margin in before) - now.high) / typical if typical > 0.0 else None


def _peers_kept(case: Case, place: Place) -> float:
    """The median, over the other blocks, of the margin as a fraction of what it was at the report before."""
    kept = []
    for peer in case.peers(place):
        now, before = peer.compared, case.comparable(peer)
        if now is not None and before and before[-1].value > 0.0:
            kept.append(now[1].value / before[-1].value)
    return usual(kept, 1.0)


def still(case: Case, place: Place) -> Finding | None:
    """The weights hardly move while those of the other blocks do: never trained, frozen, or stalled since a step."""
    change = place.change
    if change is None or change.ratio >= limits.STILL or _worst_ratio(change) >= limits.MOVING:
        return None
    ratios = [earlier.change.ratio for earlier in case.before(place) if earlier.change is not None]
    evidence = {"change": change.ratio}
    if any(ratio >= limits.MOVING for ratio in ratios):
        since = _last_moving(case, place)
        words = f"{place.words} has learned nothing since step {since}: {_moves(change)}"
        return Finding("stalled", place.subject, words, evidence, causes.STALLED, since)
    if place.status == "below":
        words = f"{place.words} was never trained: {_moves(change)}, and {_loss_without(place)}"
        return Finding("never_trained", place.subject, words, evidence, causes.NEVER_TRAINED, None)
    words = f"{place.words} does not learn: {_moves(change)}, as at every checkpoint so far"
    return Finding("frozen", place.subject, words, evidence, causes.FROZEN, _first_told(case, place, "frozen"))


def _moves(change: Change) -> str:
    if change.ratio == 0.0:
        return "its weights are exactly those of the checkpoint before"
    return f"its weights move {change.ratio:.2g} times as far as the other blocks'"


def _last_moving(case: Case, place: Place) -> int | None:
    """The last step at which the place still moved."""
    for report in reversed(case.history):
        for layer in report.layers:
            change = Place(layer, place.part).change if layer.name == place.layer.name else None
            if change is not None and change.ratio >= limits.STILL:
                return report.checkpoint.step
    return None


def below(case: Case, place: Place) -> Finding | None:
    """A cheap stand-in is as good, or nearly."""
    if place.status != "below" or place.margin is None or (place.part is not None and _is_idle_part(case, place)):
        return None
    others = [peer.margin.value for peer in case.peers(place) if peer.margin is not None]
    words = f"{place.words} does hardly anything: {_loss_without(place)}"
    evidence = {"margin": place.margin.value}
    if others:
        evidence["others_margin"] = median(others)
        words += f", for the other blocks by {median(others):.4f}"
    return Finding("below", place.subject, words, evidence, causes.BELOW, _last_step(case, place, "below"))


def _loss_without(place: Place) -> str:
    """The margin in words: what stands in for a block is named, for a part it is not known."""
    instead = STAND_INS.get((place.layer.best_reference or "") if place.part is None else "", "a cheap stand-in")
    return f"with {instead} in its place the loss changes by {place.margin} nats/token"


def improvable(case: Case, place: Place) -> Finding | None:
    """A better layer of the same kind is proven, and it is not only that the run is young."""
    room = place.headroom
    if room is None or room.low <= 0.0 or not case.history:
        return None
    rooms = [earlier.headroom.high for earlier in case.before(place) if earlier.headroom is not None]
    grown = bool(rooms) and room.low > limits.IMPROVABLE * max(0.0, *rooms)
    flat = _is_flat(case)
    if not (grown or flat):
        return None
    why = "the loss is flat" if flat else f"at earlier checkpoints it was at most {max(rooms):.4f}"
    words = f"{place.words} could be better by {room} nats/token with other output weights, while {why}"
    return Finding("improvable", place.subject, words, {"headroom": room.value}, causes.IMPROVABLE, None)


def _is_flat(case: Case) -> bool:
    """Whether the loss fell by next to nothing over the last three checkpoints."""
    losses = [report.loss.value for report in case.history[-2:]]
    return len(losses) == 2 and losses[0] - case.report.loss.value < limits.FLAT * losses[0]


def flooding(case: Case) -> Finding | None:
    """A block after the first whose output drowns the stream, so that every later block looks idle."""
    layers = case.report.layers
    for layer in layers[1:-1]:
        later = layers[layer.index + 1 :]
        if layer.stream_share >= limits.FLOODING and all(block.status == "below" for block in later):
            words = (
                f"{layer.name} floods the residual stream: {layer.stream_share:.0%} of what leaves it is its own, and "
                f"all {len(later)} blocks after it look idle because of that"
            )
            evidence = {"stream_share": layer.stream_share}
            return Finding("flooding", layer.name, words, evidence, causes.FLOODING, case.step_before())
    return None


def victim(culprit: Finding, place: Place) -> Finding:
    """A layer whose sign another layer explains, which is named."""
    what = "looks idle because {} floods the stream" if culprit.kind == "flooding" else "adapts to {}, which changed"
    name = culprit.subject.partition("/")[0]
    return Finding("victim", place.subject, f"{place.words} {what.format(name)}", {}, (), culprit.since_step)


def guessing(case: Case) -> Finding | None:
    """The model predicts the probe worse than one that guesses every token alike, and never did better in this run."""
    vocabulary, loss = case.report.model.vocabulary, case.report.loss
    if vocabulary is None or loss.low <= log(vocabulary):
        return None
    if any(earlier.loss.value <= log(vocabulary) for earlier in case.history):
        return None
    words = (
        f"the loss is {loss.value:.4f} nats/token, and guessing every token alike has ln {vocabulary:,} = "
        f"{log(vocabulary):.4f}: the model is untrained, or the probe is not in its tokens, and nothing is said of "
        "single layers"
    )
    return Finding("early", "run", words, {"loss": loss.value, "loss_of_guessing": log(vocabulary)}, causes.GUESSING)


def early(case: Case) -> Finding | None:
    """Most blocks earn no more than a stand-in: that is one statement about the run, not one about each layer."""
    judged = [layer for layer in case.report.layers if layer.status != "not_measured"]
    earning = sum(layer.status == "above" for layer in judged)
    if not judged or len(judged) - earning <= limits.EARLY * len(judged):
        return None
    count = f"only {earning} of {len(judged)} blocks certainly do more than a cheap stand-in would"
    evidence = {"blocks_above": float(earning)}
    since = _last_earning(case)
    idle = sum(layer.status == "below" for layer in judged)
    if since is not None and idle > limits.EARLY * len(judged):
        words = f"{count}, which was not so up to step {since}: look at the run, not at one layer"
        return Finding("collapsed", "run", words, evidence, causes.COLLAPSED, since)
    words = f"{count}: the run is early, or the probe too small, and nothing is said of single layers yet"
    return Finding("early", "run", words, evidence, causes.EARLY, None)


def diverged(case: Case) -> Finding | None:
    """The loss is well above what it was, and no layer's change stands out: that is the run's affair."""
    losses = [(earlier.loss, earlier.checkpoint.step) for earlier in case.history]
    if not losses:
        return None
    loss, (best, step) = case.report.loss, min(losses, key=lambda entry: entry[0].value)
    if loss.value < (1.0 + limits.DIVERGED) * best.value or loss.low <= best.low:
        return None
    if any(stands_out(case, place) for layer in case.report.layers for place in places(layer)):
        return None
    words = f"the loss is {loss.value:.4f}, where it was {best.value:.4f} at step {step}, and no layer stands out: "
    words += "look at the run, not at one layer"
    return Finding("diverged", "run", words, {"loss": loss.value, "loss_before": best.value}, causes.DIVERGED, step)


def _last_earning(case: Case) -> int | None:
    """The last step at which most blocks certainly earned more than a stand-in."""
    for report in reversed(case.history):
        judged = [layer.status for layer in report.layers if layer.status != "not_measured"]
        if judged and judged.count("above") >= (1.0 - limits.EARLY) * len(judged):
            return report.checkpoint.step
    return None


def _is_idle_part(case: Case, place: Place) -> bool:
    """Whether a part that is below says nothing of its block: most other blocks' are too, or it never earned yet."""
    judged = [peer.status == "below" for peer in case.peers(place) if peer.status != "not_measured"]
    before = [earlier.status for earlier in case.before(place)]
    return sum(judged) > limits.EARLY * max(1, len(judged)) or (bool(before) and "above" not in before)
