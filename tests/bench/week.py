"""A week in minutes: 400 checkpoints of a simulated run with two faults, through a real agent, Alertmanager and mail.

`python -m tests.bench.week` prints every notice that a person would have got; exit 1 when one is missing, wrong or too
many. Only the numbers of the peels are invented, with the noise and the drift that real ones have; the diagnosis, the
rules, the ledger, the courier and both servers are real.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from pathlib import Path
from statistics import median

from peel_agent.records import (
    BoundReport,
    Change,
    CheckpointInfo,
    Estimate,
    LayerReport,
    ModelInfo,
    PartName,
    PartReport,
    PeelReport,
    ProbeInfo,
    Request,
    Status,
    Timing,
    WorstMatrix,
)
from tests import receivers
from tests.contracts.test_alertmanager import alertmanager, passed_on
from tests.receivers import Receiver, http_receiver, mail_server
from tests.runs.sidecar import Sidecar
from tests.waiting import wait_for

CHECKPOINTS = 400
STEPS = 500
"""Training steps between two checkpoints: 25 minutes of a week."""

BLOCKS = 12
EARLY = 4
"""Checkpoints at which most blocks earn nothing yet."""

RESTORED, RESTORED_AT, HEALED = 5, 120, 8
"""A block whose weights come from an old checkpoint at one save; so many saves later it earns what it did."""

STARVED, FROM, UNTIL, DECAY = 8, 260, 330, 10
"""A block whose MLP loses its output over so many saves, and gets it back."""

PARTS: tuple[PartName, ...] = ("attention", "mlp")


def report_of(request: Request) -> PeelReport:
    """What peeling the checkpoint of this step gives; the same whenever it is asked."""
    ref = request.ref
    number = (ref.step or 0) // STEPS
    noise = random.Random(number)
    loss = 1.8 + 1.7 / math.sqrt(number) + noise.gauss(0, 0.004)
    margins = {
        (block, part): _around(_margin(block, part, number) * (1 + noise.gauss(0, 0.04)), noise)
        for block in range(BLOCKS)
        for part in ("block", *PARTS)
    }
    gap = noise.gauss(0.004, 0.0015)
    head = BoundReport("head", tuple(range(1, BLOCKS + 1)), "closed_form", _around(loss - gap, noise), loss - gap, True)
    return PeelReport(
        checkpoint=CheckpointInfo(ref.label, ref.step, ref.format, ref.fingerprint),
        model=ModelInfo("llama", BLOCKS, 124_000_000, "bfloat16"),
        probe=ProbeInfo("week", 65_536, 8_192, 16_384, 1024),
        loss=_around(loss, noise, 0.02),
        bound=head.value,
        gap=Estimate(gap, gap - 0.003, gap + 0.003),
        zone="caution" if gap > 0.003 else "undecided",
        bounds=(head,),
        layers=tuple(_layer(block, number, margins, loss, noise) for block in range(BLOCKS)),
        redundancy=None,
        skipped=(),
        timing=Timing(2.0, 3.0, 5.0, 40.0),
        since_step=None if number == 1 else (ref.step or 0) - STEPS,
        bound_label="head",
        bound_step=ref.step,
    )


def _margin(block: int, part: str, number: int) -> float:
    """What a place really earns, in nats per token."""
    usual = (0.03 + 0.01 * (7 * block % BLOCKS)) * (1 - math.exp(-(number - EARLY) / 6)) if number > EARLY else 0.0
    share = {"block": 1.0, "attention": 0.45, "mlp": 0.6}[part]
    if block == RESTORED and RESTORED_AT <= number < RESTORED_AT + HEALED:
        share *= 0.5 + 0.5 * (number - RESTORED_AT) / HEALED
    if block == STARVED and part != "attention" and number >= FROM:
        lost = min(1.0, (number - FROM + 1) / DECAY) if number < UNTIL else max(0.0, 1 - (number - UNTIL + 1) / DECAY)
        share *= 1 - lost if part == "mlp" else 1 - 0.55 * lost
    return usual * share


def _around(value: float, noise: random.Random, half: float = 0.003) -> Estimate:
    """A measurement of it, with its 95 % interval."""
    measured = value + noise.gauss(0, half / 2)
    return Estimate(measured, measured - half, measured + half)


def _layer(
    block: int, number: int, margins: dict[tuple[int, str], Estimate], loss: float, noise: random.Random
) -> LayerReport:
    is_restored = block == RESTORED and number == RESTORED_AT
    ratio = math.exp(noise.gauss(0, 0.08)) * (3.4 if is_restored else 1.0)
    change = Change(ratio, WorstMatrix("mlp.up_proj.weight", ratio * (1.3 + abs(noise.gauss(0, 0.1)))))
    worth = 0.02 / math.sqrt(number) + noise.gauss(0, 0.0015) - (0.05 * loss if is_restored else 0.0)
    progress = Estimate(worth, worth - 0.003, worth + 0.003)
    first = number == 1
    return LayerReport(
        index=block,
        name=f"model.layers.{block}",
        status=_status(block, "block", margins),
        margin=margins[block, "block"],
        best_reference="affine",
        references={"affine": margins[block, "block"].value},
        parts={
            part: PartReport(
                _status(block, part, margins),
                margins[block, part],
                change=None if first else change,
                progress=None if first else progress,
            )
            for part in PARTS
        },
        stream_share=0.15 + 0.02 * block,
        change=None if first else change,
        progress=None if first else progress,
    )


def _status(block: int, part: str, margins: dict[tuple[int, str], Estimate]) -> Status:
    others = [margins[other, part].value for other in range(BLOCKS) if other != block]
    threshold, own = max(0.0, 0.1 * median(others)), margins[block, part]
    return "below" if own.high < threshold else "above" if own.low > threshold else "undecided"


EXPECTED = (
    ("firing", "layer_changed", f"model.layers.{RESTORED}", RESTORED_AT, 0),
    ("resolved", "layer_changed", f"model.layers.{RESTORED}", RESTORED_AT + 1, 0),
    ("firing", "layer_below", f"model.layers.{STARVED}/mlp", FROM + DECAY, 3),
    ("resolved", "layer_below", f"model.layers.{STARVED}/mlp", UNTIL + 1, DECAY),
)
"""State, rule and subject of what must be told, at which save, and how many saves later at most."""


def faults_of(notices: list[dict[str, object]]) -> list[str]:
    """What is wrong with what was told: an expected notice that is missing or late, and one that nobody asked for."""
    wrong = []
    left = list(notices)
    for state, rule, subject, save, late in EXPECTED:
        found = [
            one
            for one in left
            if (one["state"], one["rule"], one["subject"]) == (state, rule, subject)
            and save <= int(str(one["step"])) // STEPS <= save + late
        ]
        if len(found) != 1:
            wrong.append(f"{state} {rule} {subject} was told {len(found)} times between saves {save} and {save + late}")
        left = [one for one in left if one not in found]
    return wrong + [f"nobody asked for: {one['state']} {one['rule']} {one['subject']}: {one['text']}" for one in left]


CONFIGURATION = """\
[tracker]
use = ["jsonl"]

[[sink]]
use = "jsonl"

[[sink]]
use = "alertmanager"
url = "{alertmanager}"

[[sink]]
use = "email"
host = "127.0.0.1"
port = {port}
security = "starttls"
ca_file = "{ca_file}"
sender = "peel-agent@example.org"
to = ["on-call@example.org"]
"""


def live(folder: Path, checkpoints: int) -> tuple[list[dict[str, object]], list[str], Receiver]:
    """The notices in order, the subjects of the mails, and what Alertmanager handed on."""
    tls = receivers.certificates(folder)
    (folder / "manager").mkdir()
    with http_receiver() as hook, mail_server("starttls", tls.right) as mail:
        with alertmanager(folder / "manager", f"http://127.0.0.1:{hook.port}/", "5m") as url:
            more = CONFIGURATION.format(alertmanager=url, port=mail.port, ca_file=tls.ca_file)
            sidecar = Sidecar(folder / "run", more, REPORTS="tests.bench.week:report_of")
            with sidecar.running():
                for number in range(1, checkpoints + 1):
                    sidecar.write(number * STEPS)
                wait_for(lambda: sidecar.has_ended or len(sidecar.steps()) == checkpoints, 1200)
                assert not sidecar.has_ended, sidecar.said()
                wait_for(lambda: not sidecar.read("SELECT 1 FROM deliveries WHERE lane = 'notices'"), 300)
            wait_for(lambda: len(passed_on(hook)) >= len(EXPECTED), 60)
        lines = (sidecar.state / "notices.jsonl").read_text().splitlines()
        notices = [one for line in lines for one in json.loads(line)["notices"]]
        return notices, [f"{one['Subject']}" for one in mail.messages], hook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="week-") as name:
        notices, mails, hook = live(Path(name), options.checkpoints)
    for one in notices:
        print(f"step {one['step']}: {one['state']} {one['rule']}: {one['text']}")
    print(f"{len(mails)} mails: {'; '.join(mails)}")
    print(f"handed on by Alertmanager: {passed_on(hook)}")
    wrong = faults_of(notices)
    if len(mails) != len({one["step"] for one in notices}):
        wrong.append(f"{len(mails)} mails for {len({one['step'] for one in notices})} moments")
    handed_on = [(state, subject) for state, _, subject, _, _ in EXPECTED]
    if sorted(passed_on(hook)) != sorted(handed_on):
        wrong.append(f"Alertmanager handed on {passed_on(hook)}, and not {handed_on}")
    for words in wrong:
        print(f"WRONG: {words}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
