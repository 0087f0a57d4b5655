"""A report in words: one line for the log, a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from peel_agent.publish.sheet import Column, Grid, Lines, Sheet, sheet
from peel_agent.records import ACCUSING, LayerReport, PartName, PeelReport

REDUNDANT_FRACTION = 0.01
"""Blocks are called redundant when a stand-in for them costs less than this fraction of the loss."""

_COLUMNS = (
    Column("block", 22),
    Column("status", 12),
    Column("margin [95 % interval]", 26),
    Column("stand-in", 9, rank=3),
    Column("attention", 12, rank=6),
    Column("mlp", 12, rank=7),
    Column("share", 6, rank=1),
    Column("change", 7, rank=4),
    Column("progress", 9, rank=5),
    Column("finding", rank=8),
)

PARTS: tuple[PartName, ...] = ("attention", "mlp")


def headline(report: PeelReport) -> str:
    """The findings in one line: step, loss, gap and zone, what is said of the run, and the layers that are named."""
    pieces = [f"step {report.checkpoint.step}" if report.checkpoint.step is not None else report.checkpoint.path]
    pieces.append(f"loss {report.loss.value:.4f}")
    if report.bound is not None and report.gap is not None:
        pieces.append(f"bound {report.bound.value:.4f}, gap {report.gap.value:+.4f} ({_zone(report)})")
    findings = [layer.finding for layer in report.layers if layer.finding is not None]
    accused = [finding for finding in findings if finding.kind in ACCUSING]
    informed = [finding for finding in findings if finding.kind == "frozen" and finding.since_step is None]
    if report.finding is not None:
        pieces.append(report.finding.words)
    pieces += [finding.words for finding in (*accused, *informed)]
    if _anything_measured(report) and report.finding is None and not accused:
        pieces.append("nothing found in any layer")
    return "; ".join([*pieces, *_open_questions(report)])


def _anything_measured(report: PeelReport) -> bool:
    """Whether anything was measured by which a layer could be found to be at fault: headroom alone is none."""
    return any(layer.status != "not_measured" or layer.change is not None for layer in report.layers)


def _open_questions(report: PeelReport) -> list[str]:
    """How many blocks were measured and left undecided, with the hints, and how many were not measured."""
    undecided = [layer for layer in report.layers if layer.status == "undecided"]
    not_measured = sum(layer.status == "not_measured" for layer in report.layers)
    pieces = [f"{len(undecided)} undecided"] if undecided else []
    pieces += [layer.hint for layer in undecided if layer.hint is not None]
    if not_measured and not_measured == len(report.layers):
        # Against the checkpoint before, change is measured without margins, and progress is not.
        beside = report.since_step is not None and all(layer.progress is None for layer in report.layers)
        pieces.append("margins and progress not measured" if beside else "margins not measured")
    elif not_measured:
        pieces.append(f"{not_measured} not measured")
    return pieces


def _zone(report: PeelReport) -> str:
    """The zone, and whose the gap is when a refitted head alone is the bound."""
    if report.zone == "caution" and report.bound_label == "head":
        return "caution: the head's, not the layers'"
    return report.zone


def report_sheet(report: PeelReport) -> Sheet:
    """The report for people: what was measured, one line a block, one line a map, and what was left out."""
    model, probe = report.model, report.probe
    about = (
        f"{report.checkpoint.path}: {model.family}, {model.blocks} blocks, {model.parameters:,} parameters, "
        f"{model.precision}; probe {probe.fingerprint}: {probe.fit_tokens:,} fit, {probe.select_tokens:,} select, "
        f"{probe.confirm_tokens:,} confirm tokens in sequences of {probe.sequence_length}; {probe.unit}"
    )
    parts: list[Lines | Grid] = [Lines((headline(report),)), Lines((about,), "faint")]
    if report.layers:
        parts += [Lines(("",)), layer_grid(report.layers), Lines(tuple(_findings(report)))]
    if report.bounds:
        bounds = ["", "bounds of the run (suite, solver " + report.bounds[0].solver + ")"]
        bounds += [
            f"  {bound.label:<16} {bound.value}" + ("" if bound.within_class else "  outside the model's own class")
            for bound in report.bounds
        ]
        parts.append(Lines((*bounds, *_winner(report))))
    if any(layer.headroom for layer in report.layers):
        rooms = [_headroom_line(layer) for layer in report.layers if layer.headroom is not None]
        parts.append(Lines(("", "headroom: what a better block of the same kind would win", *rooms)))
    if report.redundancy is not None:
        parts.append(Lines(("", redundancy_sentence(report))))
    if report.skipped:
        left_out = tuple(f"left out: {skipped.what}: {skipped.why}" for skipped in report.skipped)
        parts.append(Lines(("", *left_out), "faint"))
    return sheet(*parts)


def layer_grid(layers: Sequence[LayerReport]) -> Grid:
    """One row a block."""
    return Grid(_COLUMNS, tuple(map(_layer_row, layers)))


def _winner(report: PeelReport) -> list[str]:
    """Which construction the bound is the loss of."""
    if report.bound_label is None:
        return []
    step = f", built at step {report.bound_step}" if report.bound_step is not None else ""
    return [f"  the bound is {report.bound_label}{step}: it has the least loss on the select sequences"]


def _headroom_line(layer: LayerReport) -> str:
    pieces = [f"  {layer.name:<20} {layer.headroom}"]
    pieces += [f"{part} {report.headroom}" for part, report in layer.parts.items() if report.headroom is not None]
    if layer.quantization_share is not None and layer.optimization_share is not None:
        pieces.append(f"shares: optimiser {layer.optimization_share:z.4f}, quantiser {layer.quantization_share:z.4f}")
    return "  ".join(pieces)


def redundancy_sentence(report: PeelReport) -> str:
    """How many neighbouring blocks one refitted block stands in for at hardly any cost (method.md 6)."""
    matrix = report.redundancy or ()
    spans = [
        (matrix[first][last], first, last) for first in range(len(matrix)) for last in range(first + 1, len(matrix))
    ]
    if not spans:
        return "redundancy: one block stands in for nothing but itself"
    names = [layer.name for layer in report.layers] or [f"block {index}" for index in range(len(matrix))]
    small = [span for span in spans if span[0] <= REDUNDANT_FRACTION * report.loss.value]
    cost, first, last = min(small, key=lambda span: (span[1] - span[2], span[0])) if small else min(spans)
    what = f"{names[first]}, refitted, stands in for itself and {names[first + 1]}"
    what += f" to {names[last]}" if last > first + 1 else ""
    hint = "a hint for pruning" if small else f"more than {REDUNDANT_FRACTION:.0%} of the loss, so each block is needed"
    return f"redundancy: {what} at a cost of {cost:.4f} nats per token: {hint}"


def _layer_row(layer: LayerReport) -> tuple[str, ...]:
    margin = str(layer.margin) if layer.margin is not None else "-"
    parts = [layer.parts[name].status if name in layer.parts else "-" for name in PARTS]
    change = f"{layer.change.ratio:.2f}" if layer.change is not None else "-"
    progress = f"{layer.progress.value:+.4f}" if layer.progress is not None else "-"
    best, share = layer.best_reference or "-", f"{layer.stream_share:.3f}"
    return (layer.name, layer.status, margin, best, *parts, share, change, progress, _short(layer))


def _short(layer: LayerReport) -> str:
    """The finding's kind, and the part that it is about."""
    if layer.finding is None:
        return ""
    part = layer.finding.subject.partition("/")[2]
    return layer.finding.kind.replace("_", " ") + (f" ({part})" if part else "")


def _findings(report: PeelReport) -> list[str]:
    """Each finding in a sentence, with its likely causes."""
    findings = [report.finding, *(layer.finding for layer in report.layers)]
    lines = []
    for finding in findings:
        if finding is not None:
            named = finding.words.startswith(finding.subject)  # most findings begin with the block that they name
            lines += ["", finding.words if named else f"{finding.subject}: {finding.words}"]
            lines += [f"  perhaps {cause}" for cause in finding.causes]
    hints = [layer.hint for layer in report.layers if layer.hint is not None]
    return [*lines, "", *hints] if hints else lines
