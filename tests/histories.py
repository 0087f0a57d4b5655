"""Histories of made-up runs: a layer that is held back, gaps, alerts, and names that try to be something else."""

from __future__ import annotations

import dataclasses
import math

from peel_agent.records import (
    BoundReport,
    CheckpointInfo,
    Estimate,
    Finding,
    Gap,
    History,
    LayerReport,
    ModelInfo,
    Notice,
    PartReport,
    PeelReport,
    ProbeInfo,
    Request,
    Skipped,
    Timing,
)

HELD_BACK = 3

HOSTILE = (
    "</script><script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "\x1b[31mred\x1b[0m",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe",
    "';alert(1);//",
    "<!--",
    "]]>&lt;b&gt;",
)
"""Names that try to be HTML, script, a template or a terminal's codes."""


def estimate(value: float, half: float = 0.004) -> Estimate:
    return Estimate(value, value - half, value + half)


def layer_report(index: int, step: int, *, name: str, low_bit: bool) -> LayerReport:
    """A layer that earns more with every step, but for the one that is held back; the last is undecided at first."""
    margin = 0.001 if index == HELD_BACK else 0.02 * (1 + index % 4) * math.log1p(step / 100)
    is_undecided = index == HELD_BACK + 1 and step <= 300
    status = "below" if index == HELD_BACK else "undecided" if is_undecided else "above"
    finding = None
    if index == HELD_BACK:
        finding = Finding("below", name, f"{name} earns less than a cheap stand-in", {}, ("it was held back",))
    parts = {
        "attention": PartReport(status, estimate(margin / 2)),
        "mlp": PartReport("not_measured" if index == 0 else status, None if index == 0 else estimate(margin / 3)),
    }
    shares = {"optimization_share": 0.01 + index / 500, "quantization_share": 0.02} if low_bit else {}
    return LayerReport(index, name, status, estimate(margin), "skip", {"skip": margin}, parts, 0.1, None, **shares,
                       finding=finding)  # fmt: skip


def report(
    step: int | None,
    *,
    layers: int = 6,
    name: str = "model.layers.{}",
    path: str = "run/checkpoint-{}",
    full: bool = False,
) -> PeelReport:
    """One checkpoint; a `full` one has redundancy and the shares of low-bit layers too."""
    at = step or 0
    loss = 4.0 * math.exp(-at / 900) + 1.5
    bound = loss + 0.3 - at / 4000
    layer_reports = tuple(layer_report(i, at, name=name.format(i), low_bit=full) for i in range(layers))
    redundancy = tuple(tuple(0.01 * (j - i) ** 2 if j > i else 0.0 for j in range(layers)) for i in range(layers))
    return PeelReport(
        CheckpointInfo(path.format(at), step, "transformers", f"c0ffee{at:06x}"),
        ModelInfo("llama", layers, 1_200_000, "float32"),
        ProbeInfo("beef", 65_536, 8_192, 16_384, 128),
        estimate(loss, 0.05),
        estimate(bound, 0.05),
        estimate(loss - bound, 0.03),
        "effective" if loss < bound else "caution",
        (BoundReport("head", (1, 2), "closed_form", estimate(bound), bound, within_class=True),),
        layer_reports,
        (Skipped("headroom of model.layers.0", "the time budget was spent"),),
        Timing(0.1, 0.2, 0.3, 0.4),
        redundancy=redundancy if full else None,
        bound_label="head",
    )


def notice(state: str, step: int, *, rule: str = "layer_below", subject: str = f"model.layers.{HELD_BACK}") -> Notice:
    text = f"{subject} has earned less than a cheap stand-in for two checkpoints"
    return Notice(
        f"{rule}-{subject}-{state}-{step}", rule, "warning", state, subject, step, text, step - 100, ("it is idle",),
        command="peel-agent scan run/checkpoint-800 --probe heldout.npy",
    )  # fmt: skip


def run_history(*, checkpoints: int = 12, layers: int = 6, full: bool = True) -> History:
    """A run of 100 steps a checkpoint, with one of each kind of gap, and alerts that fire and that are over."""
    missing = {500: "rotated", 600: "refused", 900: "overtaken"}
    steps = [step for step in range(100, 100 * checkpoints + 1, 100) if step not in missing]
    reports = tuple(report(step, layers=layers, full=full and step == steps[-1]) for step in steps)
    gaps = tuple(
        Gap(step, f"run/checkpoint-{step}", cause, f"{cause}, for some reason") for step, cause in missing.items()
    )
    told = (
        notice("firing", 300),
        notice("firing", 300, rule="run_below_bound", subject="run"),
        notice("resolved", 800, rule="run_below_bound", subject="run"),
    )
    return History("run", "/runs/one", reports, told, gaps, 1)


def hostile_history() -> History:
    """Every name, path and text of it is hostile."""
    reports = []
    for step in (100, 200, 300):
        one = report(step, layers=len(HOSTILE), path=HOSTILE[0] + "-{}", full=True)
        layers = tuple(
            LayerReport(
                layer.index, name, layer.status, layer.margin, name, {}, layer.parts, 0.1,
                finding=Finding("below", name, f"{name} is idle", {}, (name,)), hint=name,
            )
            for layer, name in zip(one.layers, HOSTILE, strict=True)
        )  # fmt: skip
        skipped = tuple(Skipped(name, name) for name in HOSTILE)
        fields = {"layers": layers, "skipped": skipped, "bound_label": HOSTILE[1]}
        reports.append(PeelReport(**{**{f: getattr(one, f) for f in one.__dataclass_fields__}, **fields}))
    told = tuple(notice("firing", 200, rule=name, subject=name) for name in HOSTILE)
    gaps = (*(Gap(150, name, "refused", name) for name in HOSTILE), Gap(None, HOSTILE[0], "refused", HOSTILE[1]))
    return History(HOSTILE[0], HOSTILE[1], tuple(reports), told, gaps)


def peeled(request: Request) -> PeelReport:
    """What an engine that answers at once gives for a checkpoint: the report of its step, under its own fingerprint."""
    one = report(request.ref.step, path=request.ref.label, full=(request.ref.step or 0) % 200 == 0)
    info = CheckpointInfo(request.ref.label, request.ref.step, request.ref.format, request.ref.fingerprint)
    return dataclasses.replace(one, checkpoint=info, skipped=())
