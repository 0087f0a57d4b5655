"""What an operator would have been told of each run of the gallery, held against what was planted.

`python -m tests.bench.gallery.verdicts --out DIR` prints the table of every run and the summary; `--again` diagnoses
and judges the stored numbers anew with the code as it is, which is how the limits were chosen on one half of the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peel_agent.config import Settings
from peel_agent.diagnose import diagnose, lineage
from peel_agent.judge import judge
from peel_agent.notify import tell
from peel_agent.publish import report_from_json
from peel_agent.records import Moment, Notice, PeelReport, ReportObservation, RuleState
from tests.bench.gallery.trainings import FORK_AT, RUNS, SAVE_EVERY, STEPS, Run, harm

COSTLY = 0.005
"""Nats per token above the healthy twin from which on a fault must be named."""

TUNED_SEEDS = frozenset({0, 2})
"""The limits were chosen on runs of these seeds; what is claimed is measured on the others."""


@dataclass(frozen=True)
class Told:
    """One run: the truth, what each checkpoint costs beside the twin, and the alerts that fired."""

    run: Run
    truth: dict[str, Any]
    harms: dict[int, tuple[float, float]]
    reports: tuple[PeelReport, ...]

    @property
    def alerts(self) -> list[Notice]:
        return [notice for report in self.reports for notice in report.alerts if notice.state == "firing"]

    @property
    def first_step(self) -> int:
        """The first checkpoint that can show the fault."""
        planted = int(self.truth["planted_at"])
        return (planted // SAVE_EVERY + 1) * SAVE_EVERY

    @property
    def costly_since(self) -> int | None:
        """The first checkpoint at which the fault certainly costs so much."""
        return next((step for step, (mean, half) in self.harms.items() if mean >= COSTLY and mean > half), None)

    def is_guilty(self, notice: Notice) -> bool:
        return _block(notice) in self.truth["blocks"]

    @property
    def false_alerts(self) -> list[Notice]:
        """Alerts that name a block which is not guilty, or any block where no block is."""
        harmless = self.truth["kind"] in ("harmless", "run")
        return [notice for notice in self.alerts if harmless or not self.is_guilty(notice)]

    @property
    def named(self) -> Notice | None:
        """The first alert that names a guilty block."""
        return next((notice for notice in self.alerts if self.is_guilty(notice)), None)

    @property
    def names_part(self) -> bool:
        """Whether some alert names the very part that was struck (the block, where the whole block was)."""
        part = self.truth["part"]
        guilty = [notice.subject for notice in self.alerts if self.is_guilty(notice)]
        return any(part is None or subject.endswith(f"/{part}") for subject in guilty)

    @property
    def delay(self) -> int | None:
        """Checkpoints between the first that can show it and the alert."""
        return None if self.named is None else ((self.named.step or 0) - self.first_step) // SAVE_EVERY


def _block(notice: Notice) -> int:
    return int(notice.subject.partition("/")[0].rpartition(".")[2])


def read(out: Path, runs: Iterable[Run], *, again: bool) -> Iterator[Told]:
    """The runs that were trained and watched."""
    for run in runs:
        folder = out / str(run)
        if not (folder / "reports").exists():
            continue
        truth, twin = (json.loads((out / str(one) / "truth.json").read_text()) for one in (run, run.twin))
        steps = [step for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY) if truth["from_start"] or step > FORK_AT]
        files = sorted((folder / "reports").glob("step-*.json"))
        reports = tuple(report_from_json(json.loads(file.read_text())) for file in files)
        harms = {step: harm(truth, twin, step) for step in steps}
        yield Told(run, truth, harms, judged_again(reports) if again else reports)


def judged_again(reports: Sequence[PeelReport]) -> tuple[PeelReport, ...]:
    """The reports with findings and alerts as the code at hand would give them for the same numbers."""
    done: list[PeelReport] = []
    states: tuple[RuleState, ...] = ()
    rules = Settings().rules
    for report in reports:
        diagnosed = diagnose(report, lineage(done, report.checkpoint.step))
        observed = ReportObservation(diagnosed, tuple(done))
        moment = Moment(0.0, diagnosed.checkpoint.step, is_checkpoint=True)
        verdict = tell(judge(observed, rules, states), rules, (), moment, run="gallery")
        states = verdict.states
        done.append(replace(diagnosed, alerts=verdict.notices))
    return tuple(done)


def line(told: Told) -> str:
    """One run in a row: harm at the first and the last checkpoint, what was named and when, false alarms."""
    harms = [f"{mean:+.4f}" for mean, _ in told.harms.values()]
    shown = [harms[0], harms[-1]] if harms else ["", ""]
    alerts = ", ".join(f"{one.step} {one.rule.removeprefix('layer_')} {_short(one)}" for one in told.alerts)
    mark = " " if not told.false_alerts else "!"
    truth = f"{told.truth['blocks']}{'/' + told.truth['part'] if told.truth['part'] else ''}"
    return f"{mark} {told.run!s:32}{truth:16}{shown[0]:>8} {shown[1]:>8}  {alerts}"


def _short(notice: Notice) -> str:
    return notice.subject.replace("model.layers.", "").replace("transformer.h.", "")


def by_fault(told: Sequence[Told]) -> Iterator[str]:
    """One row of markdown a fault: its cost, in how many runs it was named in time, by what, and false alerts."""
    yield "| fault | runs | costs at the first, and the last checkpoint | named in time | first alert | false alerts |"
    yield "|---|---|---|---|---|---|"
    for fault in dict.fromkeys(one.run.fault for one in told):
        runs = [one for one in told if one.run.fault == fault]
        first, last = ([list(one.harms.values())[place][0] for one in runs] for place in (0, -1))
        timely = sum(in_time(one) for one in runs) if runs[0].truth["kind"] in ("harmful", "frozen") else None
        rules = sorted({one.named.rule.removeprefix("layer_") for one in runs if one.named is not None})
        costs = f"{_range(first)}, {_range(last)}" if fault != "healthy" else "-"
        named = "-" if timely is None else f"{timely} of {len(runs)}"
        false = sum(len(one.false_alerts) for one in runs)
        yield f"| {fault} | {len(runs)} | {costs} | {named} | {', '.join(rules) or '-'} | {false} |"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def in_time(one: Told) -> bool:
    """Whether a guilty block was named at most one checkpoint after the first that shows the fault, or its cost."""
    allowed = 1 if one.costly_since is None else (one.costly_since - one.first_step) // SAVE_EVERY + 1
    return one.delay is not None and one.delay <= allowed


def summary(told: Sequence[Told]) -> list[str]:
    """Named faults, part, delay and false alarms, with the 95 % interval of each fraction."""
    costly = [one for one in told if one.truth["kind"] in ("harmful", "frozen") and one.costly_since is not None]
    prompt = [one for one in costly if in_time(one)]
    first = [one for one in costly if one.alerts and one.is_guilty(one.alerts[0])]
    part = [one for one in prompt if one.names_part]
    quiet = [one for one in told if one.truth["kind"] in ("harmless", "run")]
    healthy = [report for one in quiet for report in one.reports]
    layers = sum(len(report.layers) for one in told for report in one.reports)
    false = sum(len(one.false_alerts) for one in told)
    return [
        f"faults that cost {COSTLY} nats or more: {len(costly)}",
        f"  named within one checkpoint: {fraction(len(prompt), len(costly))}, block and part: "
        f"{fraction(len(part), len(costly))}",
        f"  first alert names the guilty block: {fraction(len(first), len(costly))}",
        f"  not named in time: {', '.join(str(one.run) for one in costly if one not in prompt) or 'none'}",
        f"runs in which no block is at fault: {len(quiet)} ({len(healthy)} checkpoints), "
        f"with an alert: {fraction(sum(bool(one.alerts) for one in quiet), len(quiet))}",
        f"false alerts in all runs: {false} of {layers} layer-checkpoints, in "
        f"{fraction(sum(bool(one.false_alerts) for one in told), len(told))} of runs",
    ]


def fraction(count: int, of: int) -> str:
    """A count of so many with its 95 % Wilson interval in percent."""
    if of == 0:
        return "0 of 0"
    share, z = count / of, 1.96
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    return f"{count} of {of} ({abs(100 * (centre - half)):.0f} to {100 * (centre + half):.0f} %)"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="diagnose and judge the stored numbers anew")
    parser.add_argument("--by-fault", action="store_true", help="a row of markdown for each fault too")
    options = parser.parse_args(arguments)
    everything = list(read(options.out, RUNS, again=options.again))
    halves = {
        "runs on which the limits were chosen": [one for one in everything if one.run.seed in TUNED_SEEDS],
        "held-out runs": [one for one in everything if one.run.seed not in TUNED_SEEDS],
    }
    for title, told in halves.items():
        print(title)
        print("\n".join(line(one) for one in told))
        print("\n".join(summary(told)) + "\n")
        if options.by_fault:
            print("\n".join(by_fault(told)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
