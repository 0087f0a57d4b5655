"""What devices a fleet of trainings needs: docs/capacity.md and its plot.

`python -m tests.bench.capacity --count` counts the operations of real peels of small models (about ten minutes) into
capacity.json; `python -m tests.bench.capacity` fits the law to them, computes what it says of large models, simulates
a week of 1,000 runs and writes the page.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.load import ProbeSizes
from peel_agent.probing import QUICK_SEQUENCE_LENGTH, quick_sizes
from peel_agent.records import PeelSettings, ProbeSettings
from tests.bench.fleet import HOUR, Record, Training, Week, quantile, simulate
from tests.bench.operations import HELD_OUT, SEEN, Counted, Law, Size, count, laws

COUNTS = Path(__file__).with_name("capacity.json")
DOCS = Path(__file__).parents[2] / "docs"
PAGE, PLOT = DOCS / "capacity.md", DOCS / "capacity.svg"
BEGIN, END = "<!-- made by tests/bench/capacity.py -->", "<!-- end -->"

RATE = 40e12
"""Operations a second that a device sustains in float32: 60 % of the 67e12 that an H100's data sheet says."""
BANDWIDTH = 2e9
"""Bytes a second at which a checkpoint is read."""
START = 15.0
"""Seconds from the start of a child to its first block."""
BYTES = 2
"""Of a weight in the file."""

EFFORTS: Mapping[str, tuple[str, ...]] = {"quick": ("quick",), "standard": ("margins", "bounds")}
"""The plans that an effort consists of."""

LIMITED = ("quick", "margins")
"""Plans that `[peel] budget_passes` limits."""

BUDGET_PASSES = PeelSettings().budget_passes
"""The default."""


@dataclass(frozen=True)
class Model:
    """A decoder as published: its shape, and how many weights a block has."""

    name: str
    width: int
    blocks: int
    inner: int
    keys: int
    """Width of keys and of values."""
    vocabulary: int = 128_256

    @property
    def block(self) -> int:
        return 2 * self.width**2 + 2 * self.width * self.keys + 3 * self.width * self.inner

    @property
    def parameters(self) -> int:
        return self.blocks * self.block + 2 * self.width * self.vocabulary

    def size(self, effort: str) -> Size:
        """With the probe that the effort takes by default."""
        settings = ProbeSettings()
        sizes = ProbeSizes(settings.fit_tokens, settings.select_tokens, settings.confirm_tokens, 1024)
        context = 1024
        if effort == "quick":
            sizes, context = quick_sizes(sizes, self.width), QUICK_SEQUENCE_LENGTH
        counts = (max(1, tokens // context) for tokens in (sizes.fit, sizes.select, sizes.confirm))
        return Size(self.width, self.blocks, self.inner, self.vocabulary, self.block, context, *counts)


MODELS = (
    Model("1 B", 2048, 16, 8192, 512),
    Model("8 B", 4096, 32, 14_336, 1024),
    Model("70 B", 8192, 80, 28_672, 1024),
    Model("405 B", 16_384, 126, 53_248, 1024),
)
"""Llama 3's shapes."""

FLEET = {"1 B": (800, 1 * HOUR), "8 B": (180, 2 * HOUR), "70 B": (18, 8 * HOUR), "405 B": (2, 24 * HOUR)}
"""How many runs of each size, and the time between two of their saves."""

DEVICES = 32
TROUBLED = 20
"""One run in so many has a block that earns next to nothing."""


@dataclass(frozen=True)
class Price:
    """What one checkpoint costs: forward passes of its model over the probe, operations, and seconds on one device."""

    forward: float
    operations: float
    early: float
    """Operations while no block earns anything yet."""
    seconds: float
    early_seconds: float


def read_counts(path: Path = COUNTS) -> tuple[list[Counted], list[Counted]]:
    """What was counted: the models that the law is fitted to, and those that it is held against."""
    kept = json.loads(path.read_text())
    every = [Counted(Size(**one["size"]), one["operations"], one["reads"]) for one in kept]
    return every[: len(SEEN)], every[len(SEEN) :]


def price(model: Model, effort: str, known: Mapping[str, Law], reads: Mapping[str, float]) -> Price:
    """Computed from the law; reading and starting included."""
    size = model.size(effort)
    limit = BUDGET_PASSES * size.forward()

    def cost(plan: str, *, early: bool) -> float:
        by_law = known[plan].operations(size, early=early)
        return min(by_law, limit) if plan in LIMITED else by_law

    operations = sum(cost(plan, early=False) for plan in EFFORTS[effort])
    early = sum(cost(plan, early=True) for plan in EFFORTS[effort])
    waiting = START + sum(reads[plan] for plan in EFFORTS[effort]) * BYTES * model.parameters / BANDWIDTH
    return Price(operations / size.forward(), operations, early, operations / RATE + waiting, early / RATE + waiting)


def most_reads(counts: Iterable[Counted]) -> dict[str, float]:
    """How often a block was read at most, by plan."""
    every = list(counts)
    return {plan: max(one.reads[plan] for one in every) for plan in every[0].reads}


def trainings(prices: Mapping[str, Price], seed: int = 0) -> list[Training]:
    """The runs of FLEET, each with a margin of its own, nats per token."""
    noise = random.Random(seed)
    made: list[Training] = []
    for kind, (number, interval) in FLEET.items():
        for index in range(number):
            troubled = index % TROUBLED == 0
            margin = 0.001 if troubled else noise.uniform(0.02, 0.1)
            made.append(Training(f"{kind}-{index}", kind, interval, prices[kind].seconds, margin))
    return made


def is_troubled(record: Record) -> bool:
    return record.training.margin < 0.01


# ---------------------------------------------------------------- written


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def in_words(seconds: float) -> str:
    for unit, size in (("d", 86_400.0), ("h", HOUR), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def law_table(known: Mapping[str, Law]) -> str:
    rows = [["term (operations)", *known]]
    terms = dict.fromkeys(term for law in known.values() for term in law.factors)
    rows += [[term, *(f"{law.factors[term]:.2f}" if term in law.factors else "" for law in known.values())]
             for term in terms]  # fmt: skip
    rows.append(["largest error on held-out models (measured)", *(f"{law.worst:.0%}" for law in known.values())])
    return table(rows)


def price_table(prices: Mapping[str, Mapping[str, Price]]) -> str:
    rows = [["model", "effort", "forward passes", "operations", "one device", "early in the run"]]
    for name in (model.name for model in MODELS):
        for effort, own in prices.items():
            one = own[name]
            rows.append([name, effort, f"{one.forward:.1f}", f"{one.operations:.1e}", in_words(one.seconds),
                         in_words(one.early_seconds)])  # fmt: skip
    return table(rows)


def week_table(weeks: Mapping[str, Week]) -> str:
    rows = [["effort", "devices busy", "runs", "checkpoints peeled", "of a run at least",
             "from save to answer, median", "95 % within", "longest wait for a device"]]  # fmt: skip
    for effort, week in weeks.items():
        for name, group in groups(week).items():
            waits = [wait for record in group for wait in record.waits]
            saves = sum(record.saves for record in group)
            rows.append([effort, f"{week.busy:.0%}", name, f"{len(waits) / saves:.0%}",
                         f"{min(record.share for record in group):.0%}", in_words(quantile(waits, 0.5)),
                         in_words(quantile(waits, 0.95)),
                         in_words(max(record.longest_queue for record in group))])  # fmt: skip
    return table(rows)


def groups(week: Week) -> dict[str, list[Record]]:
    return {
        "with a bad margin": [record for record in week.records if is_troubled(record)],
        "the others": [record for record in week.records if not is_troubled(record)],
    }


def plot(weeks: Mapping[str, Week]) -> str:
    """The page's plot as SVG: the age of the oldest waiting save over the week, and the part of saves peeled by run."""
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(chart(weeks), vl_version="6.4")
    return svg


def chart(weeks: Mapping[str, Week]) -> dict[str, Any]:
    """Vega-Lite."""
    lag, share = [], []
    for effort, week in weeks.items():
        for hour, ages in enumerate(week.ages):
            for name, part in (("half of the runs", 0.5), ("95 % of the runs", 0.95), ("the longest", 1.0)):
                lag.append({"effort": effort, "day": hour / 24, "hours": quantile(ages, part) / HOUR, "line": name})
        for name, group in groups(week).items():
            ordered = sorted(record.share for record in group)
            share += [{"effort": effort, "runs": name, "rank": (place + 0.5) / len(ordered), "share": own}
                      for place, own in enumerate(ordered)]  # fmt: skip
    axis = {"labelFontSize": 12, "titleFontSize": 12}
    facet = {
        "column": {
            "field": "effort",
            "title": None,
            "header": {"labelFontSize": 13, "labelExpr": "'effort ' + datum.label"},
        }
    }

    def panel(rows: list[dict[str, Any]], title: str, mark: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
        drawn = {"mark": mark, "width": 380, "height": 200, "encoding": {**encoding, **facet}}
        return {"title": title, "data": {"values": rows}, **drawn}

    return {
        "background": "white",
        "config": {"axis": axis, "legend": {"labelFontSize": 12}},
        "resolve": {"scale": {"color": "independent", "strokeDash": "independent"}},
        "vconcat": [
            panel(lag, "Age of the oldest checkpoint in a run's queue", {"type": "line"}, {
                "x": {"field": "day", "type": "quantitative", "title": "day"},
                "y": {"field": "hours", "type": "quantitative", "title": "hours"},
                "strokeDash": {"field": "line", "title": None},
                "color": {"field": "line", "title": None},
            }),
            panel(share, "Checkpoints peeled, run by run from the least to the most", {"type": "line"}, {
                "x": {"field": "rank", "type": "quantitative", "title": "runs", "axis": {"format": "%", **axis}},
                "y": {"field": "share", "type": "quantitative", "title": "of its saves",
                      "axis": {"format": "%", **axis}, "scale": {"domain": [0, 1]}},
                "strokeDash": {"field": "runs", "title": None},
                "color": {"field": "runs", "title": None},
            }),
        ],
    }  # fmt: skip


def tables(weeks: Mapping[str, Week] | None) -> dict[str, str]:
    """The page's tables by name; without `weeks` only those that need no simulation."""
    seen, held_out = read_counts()
    known, reads = laws(seen, held_out), most_reads([*seen, *held_out])
    prices = {effort: {model.name: price(model, effort, known, reads) for model in MODELS} for effort in EFFORTS}
    made = {"law": law_table(known), "price": price_table(prices)}
    return made if weeks is None else {**made, "week": week_table(weeks)}


def simulated() -> dict[str, Week]:
    seen, held_out = read_counts()
    known, reads = laws(seen, held_out), most_reads([*seen, *held_out])
    return {
        effort: simulate(trainings({model.name: price(model, effort, known, reads) for model in MODELS}), DEVICES)
        for effort in EFFORTS
    }


def written(page: str, made: Mapping[str, str]) -> str:
    """The page with these tables in the places of its own."""
    for name, text in made.items():
        begin = BEGIN.replace(" -->", f": {name} -->")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{END}{rest.split(END, 1)[1]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="count the operations of real peels anew, first")
    if parser.parse_args().count:
        kept = []
        for shape in (*SEEN, *HELD_OUT):
            one = count(shape)
            print(shape, {plan: f"{own / one.size.forward():.2f}" for plan, own in one.operations.items()}, flush=True)
            kept.append({"size": vars(one.size), "operations": one.operations, "reads": one.reads})
        COUNTS.write_text(json.dumps(kept, indent=1) + "\n")
    weeks = simulated()
    made = tables(weeks)
    PAGE.write_text(written(PAGE.read_text(), made))
    PLOT.write_text(plot(weeks) + "\n")
    print("\n\n".join(made.values()))


if __name__ == "__main__":
    main()
