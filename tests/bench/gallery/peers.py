"""What other tools would have told of the runs of the gallery, by the measure of `verdicts`.

`python -m tests.bench.gallery.peers --out DIR --weightwatcher PYTHON --ormas FOLDER` scores the finished runs of DIR,
keeps the scores in DIR/<model>-<seed>/<fault>/peers.json, and prints one table. PYTHON has WeightWatcher installed,
FOLDER was filled by `pip install --no-deps --target FOLDER ormas-monitor`; what was not given scores nothing new.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from peel_agent.demo.train import make_low_bit
from tests.bench.gallery.trainings import BATCH, FORK_AT, GRADIENT_NORM, RUNS, SAVE_EVERY, STEPS, Run, harm
from tests.bench.gallery.verdicts import TUNED_SEEDS, Told

NO_BLOCK = -1  # stands for a warning that names none
_STEPS = range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
_TO_BE_SEEN = ("warning", "critical", "proof")

Scores = dict[str, dict[Any, Any]]  # by tool, then by step: `influence` and `alpha` hold an entry a block
Signals = dict[int, float]  # of one checkpoint, by block: the larger, the more suspicious

_ASK_WEIGHTWATCHER = """
import contextlib, json, os, sys
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
import weightwatcher
for checkpoint in sys.argv[1:]:
    with contextlib.redirect_stdout(sys.stderr):
        details = weightwatcher.WeightWatcher(model=checkpoint).analyze()
    print(json.dumps(dict(zip(details.longname, details.alpha.astype(float)))), flush=True)
"""


def load(out: Path, run: Run, step: int) -> nn.Module:
    """The model of a checkpoint as it was trained."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(_checkpoint(out, run, step), dtype=torch.float32)
    if run.recipe.weight_set is not None:
        make_low_bit(model, run.recipe.weight_set)
    return model


@torch.no_grad()
def influences(model: nn.Module, windows: Tensor) -> list[float]:
    """ShortGPT's block influence: 1 - mean cosine similarity of what goes into a block and what comes out."""
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    found: list[float] = []

    def compare(_block: nn.Module, entering: tuple[Tensor, ...], left: Tensor | tuple[Tensor, ...]) -> None:
        after = left if isinstance(left, Tensor) else left[0]
        found.append(1 - float(functional.cosine_similarity(entering[0].double(), after.double(), dim=-1).mean()))

    for block in blocks:
        block.register_forward_hook(compare)
    model(input_ids=windows, use_cache=False)
    return found


def alphas(python: str, checkpoints: Sequence[Path]) -> Iterator[list[list[float | None]]]:
    """WeightWatcher's alpha of each matrix of each block, one checkpoint after the other; None where its fit failed."""
    command = [python, "-c", _ASK_WEIGHTWATCHER, *map(str, checkpoints)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as answering:
        assert answering.stdout is not None
        for answer in answering.stdout:
            by_block: dict[int, list[float | None]] = {}
            for name, alpha in json.loads(answer).items():
                by_block.setdefault(_block(name), []).append(alpha if 0 < alpha < math.inf else None)
            yield [by_block.get(block, []) for block in range(max(by_block) + 1)]


def ormas_warnings(out: Path, run: Run, probe: Tensor) -> dict[str, list[list[Any]]]:
    """By step, what ormas-monitor tells at its defaults: [command, kind, block], NO_BLOCK where it names none."""
    from ormas_monitor.checkpoint import run as check

    warned: dict[str, list[list[Any]]] = {str(step): [] for step in _STEPS}
    for step in _STEPS[1:]:
        now, before = (str(_checkpoint(out, run, one)) for one in (step, step - SAVE_EVERY))
        try:
            findings = check(now, against=before)["findings"]
        except RuntimeError as failure:  # 0.2.3 takes no transposed matrix with a bias, as GPT-2 has them
            findings = [{"kind": f"failed: {failure}", "severity": "info"}]
        for finding in findings:
            command = "check" if finding["severity"] in _TO_BE_SEEN else "check, information"
            named = {_block(name) for name in re.findall(r"\b(?:layers|h)\.\d+\b", json.dumps(finding))}
            warned[str(step)] += [[command, finding["kind"], block] for block in sorted(named or {NO_BLOCK})]
    for step, event in _monitored(out, run, probe):
        if event.get("severity", "info") in _TO_BE_SEEN:
            warned[str(step)].append(["monitor", event["event"], _block(event.get("layer", ""))])
    return warned


def _monitored(out: Path, run: Run, probe: Tensor) -> list[tuple[int, dict[str, Any]]]:
    """What its Monitor tells, which looks every 50 steps: at the logged loss of that step and at gradients of the
    checkpoint that is there or comes next, on other windows each time."""
    from ormas_monitor import Monitor

    model, losses = load(out, run, SAVE_EVERY).train(), _losses(out, run)
    told: list[tuple[int, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint = SAVE_EVERY
        sinks = [lambda _kind, payload: told.append((checkpoint, payload))]
        monitor = Monitor(model, optimizer, out=Path(folder) / "run", sinks=sinks, verbose=False)
        for step, windows in zip(range(50, STEPS + 1, monitor.check_every), probe.split(BATCH), strict=False):
            checkpoint = -(-step // SAVE_EVERY) * SAVE_EVERY
            model.load_state_dict(load(out, run, checkpoint).state_dict())
            optimizer.zero_grad()
            model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            for _ in range(monitor.check_every):
                monitor.step(losses[step])
        monitor.close(report=False)
    return told


def _block(name: str) -> int:
    return int((re.findall(r"\b(?:layers|h)\.(\d+)\b", name) or [NO_BLOCK])[0])


def score(out: Path, runs: Sequence[Run], *, weightwatcher: str | None, ormas: Path | None) -> None:
    """Adds what is missing to peers.json of these runs; checkpoints before a fault are scored with the twin."""

    def missing(tool: str) -> list[tuple[Run, int]]:
        early = {run for run in runs if run == run.twin or _truth(out, run)["from_start"]}
        own = [(run, step) for run in runs for step in _STEPS if step > FORK_AT or run in early]
        return [(run, step) for run, step in own if str(step) not in _read(out, run)[tool]]

    if weightwatcher is not None and (asked := missing("alpha")):
        found = alphas(weightwatcher, [_checkpoint(out, run, step) for run, step in asked])
        for (run, step), by_block in zip(asked, found, strict=True):
            _add(out, run, "alpha", {str(step): by_block})
    probe = torch.from_numpy(np.load(out / "probe.npy"))
    for run, step in missing("influence"):
        _add(out, run, "influence", {str(step): influences(load(out, run, step), probe[:64])})
    if ormas is not None:
        sys.path.insert(0, str(ormas))
        for run in runs:
            if not _read(out, run)["ormas"]:
                _add(out, run, "ormas", ormas_warnings(out, run, probe))


def _checkpoint(out: Path, run: Run, step: int) -> Path:
    return out / str(run) / "checkpoints" / f"checkpoint-{step}"


def _truth(out: Path, run: Run) -> dict[str, Any]:
    return dict(json.loads((out / str(run) / "truth.json").read_text()))


def _losses(out: Path, run: Run) -> dict[int, float]:
    state = json.loads((_checkpoint(out, run, STEPS) / "trainer_state.json").read_text())
    return {int(entry["step"]): float(entry["loss"]) for entry in state["log_history"]}


def _read(out: Path, run: Run) -> Scores:
    path = out / str(run) / "peers.json"
    return {"influence": {}, "alpha": {}, "ormas": {}, **(json.loads(path.read_text()) if path.exists() else {})}


def _add(out: Path, run: Run, tool: str, found: dict[str, Any]) -> None:
    scores = _read(out, run)
    scores[tool].update(found)
    temporary = out / str(run) / "tmp-peers.json"
    temporary.write_text(json.dumps(scores))
    temporary.rename(temporary.with_name("peers.json"))


@dataclass(frozen=True)
class Watched(Told):
    """One run with the scores of its checkpoints."""

    scores: Scores

    @property
    def steps(self) -> range:
        """The checkpoints that can show a fault: from 200 on where it was planted at the start or there is none."""
        return _STEPS[1:] if self.run == self.run.twin or self.truth["from_start"] else _STEPS[FORK_AT // SAVE_EVERY :]

    def is_false(self, block: int) -> bool:
        """Whether a warning of this block is a false alarm; one that names no block is true of a struck run, too."""
        kind, guilty = self.truth["kind"], self.truth["blocks"]
        return kind == "harmless" or (block != NO_BLOCK and (kind == "run" or block not in guilty))

    def of(self, tool: str, step: int) -> list[Any]:
        return list(self.scores[tool].get(str(step), []))


def read(out: Path, runs: Iterable[Run]) -> Iterator[Watched]:
    """The runs with their scores, and those of the twin before the fault."""
    for run in runs:
        truth, twin, own, before = _truth(out, run), _truth(out, run.twin), _read(out, run), _read(out, run.twin)
        scores: Scores = {tool: {**before[tool], **own[tool]} if own[tool] else {} for tool in own}
        scores["loss"] = dict(_losses(out, run))
        harms = {step: harm(truth, twin, step) for step in _STEPS if truth["from_start"] or step > FORK_AT}
        yield Watched(run, truth, harms, (), scores)


def alpha(over: Callable[[list[float | None]], float]) -> Callable[[Watched, int], Signals]:
    """Something over the matrices of each block of which one has an alpha."""
    return lambda watched, step: {at: over(each) for at, each in enumerate(watched.of("alpha", step)) if any(each)}


LARGEST_ALPHA = alpha(lambda each: max(filter(None, each)))
MEAN_ALPHA = alpha(lambda each: fmean(filter(None, each)))


def relative_influence(watched: Watched, step: int) -> Signals:
    """Each block's influence over the median of the others."""
    found = watched.of("influence", step)
    return {at: max(one, 1e-9) / median(found[:at] + found[at + 1 :]) for at, one in enumerate(found)}


def least_influence(watched: Watched, step: int) -> Signals:
    """Of the block with the least influence alone: how many times more the median of the others has."""
    relative = relative_influence(watched, step)
    return {block: 1 / least for block, least in relative.items() if least == min(relative.values())}


def change(of: Callable[[Watched, int], Signals]) -> Callable[[Watched, int], Signals]:
    """How far a score is from that of the checkpoint before, either way: the absolute logarithm of their ratio."""

    def signals(watched: Watched, step: int) -> Signals:
        now, before = of(watched, step), of(watched, step - SAVE_EVERY)
        return {block: abs(math.log(now[block] / before[block])) for block in now if block in before}

    return signals


def loss_deviation(watched: Watched, step: int) -> Signals:
    """The farthest a logged loss since the checkpoint before is from the last ten, in their standard deviations."""
    logged = sorted(watched.scores["loss"].items())
    held = [(at, loss, [one for _, one in logged[index - 10 : index]]) for index, (at, loss) in enumerate(logged)]
    recent = [(loss, last) for at, loss, last in held if step - SAVE_EVERY < at <= step and last]
    return {NO_BLOCK: max((abs(loss - fmean(last)) / stdev(last) for loss, last in recent), default=0.0)}


def ormas_by(*commands: str) -> Callable[[Watched, int], Signals]:
    """Which blocks one command of ormas-monitor names."""
    return lambda watched, step: {at: 1.0 for by, _, at in watched.of("ormas", step) if by in commands and at >= 0}


@dataclass(frozen=True)
class Detector:
    """A signal, and the threshold above which it names a block, if there is one by default."""

    tool: str
    name: str
    signals: Callable[[Watched, int], Signals]
    default: float | None = None
    is_tuned: bool = True

    def thresholds(self, tuned: Sequence[Watched]) -> dict[str, float]:
        """The default; what just raises no false alarm on the tuned seeds; what raises none on their healthy twins."""
        found = {} if self.default is None else {"default": self.default}
        for title, runs in {"tuned": tuned, "healthy": [one for one in tuned if one.run == one.run.twin]}.items():
            if self.is_tuned:
                found[title] = max((signal for one in runs for signal in self.false(one)), default=math.inf)
        return found

    def false(self, watched: Watched) -> list[float]:
        """The signals of a run that would be false alarms."""
        found = (self.signals(watched, step) for step in watched.steps)
        return [signal for signals in found for block, signal in signals.items() if watched.is_false(block)]

    def is_named(self, watched: Watched, threshold: float) -> bool:
        """Whether a guilty block (or none) is named at most one checkpoint after the fault began to cost."""
        last = (watched.costly_since or STEPS) + SAVE_EVERY
        found = [self.signals(watched, step) for step in watched.steps if step <= last]
        guilty = [*watched.truth["blocks"], NO_BLOCK]
        return any(signals.get(block, -math.inf) > threshold for signals in found for block in guilty)

    def cells(self, watched: Sequence[Watched], threshold: float) -> list[str]:
        """Costly faults named in time, false alarms by block and checkpoint, and runs with any."""
        costly = [one for one in watched if one.truth["kind"] in ("harmful", "frozen") and one.costly_since is not None]
        named = sum(self.is_named(one, threshold) for one in costly)
        alarms = [sum(signal > threshold for signal in self.false(one)) for one in watched]
        return [f"{named} of {len(costly)}", f"{sum(alarms)}", f"{sum(map(bool, alarms))} of {len(alarms)}"]


DETECTORS = (
    Detector("alpha", "WeightWatcher: a matrix has alpha >", LARGEST_ALPHA, 6.0),
    Detector("alpha", "WeightWatcher: mean alpha of the block >", MEAN_ALPHA, 6.0),
    Detector("alpha", "WeightWatcher: fits that failed >", alpha(lambda each: each.count(None)), 0.0, is_tuned=False),
    Detector("alpha", "WeightWatcher: change of the largest alpha >", change(LARGEST_ALPHA)),
    Detector("alpha", "WeightWatcher: change of the mean alpha >", change(MEAN_ALPHA)),
    Detector("influence", "influence: median of the others over the least >", least_influence, 10.0),
    Detector("influence", "influence: the least is named, whatever it is", least_influence, -math.inf, is_tuned=False),
    Detector("influence", "influence: change >", change(relative_influence)),
    Detector("ormas", "ormas-monitor check: warnings >", ormas_by("check"), 0.0, is_tuned=False),
    Detector("ormas", "  with its information >", ormas_by("check", "check, information"), 0.0, is_tuned=False),
    Detector("ormas", "ormas-monitor Monitor: warnings >", ormas_by("monitor"), 0.0, is_tuned=False),
    Detector("loss", "training loss (no block): deviations >", loss_deviation, 4.0),
)


def table(watched: Sequence[Watched]) -> Iterator[str]:
    """For each detector and threshold what it names and its false alarms: on the tuned seeds, the others, and all."""
    tuned = [one for one in watched if one.run.seed in TUNED_SEEDS]
    groups = {"tuned": tuned, "held out": [one for one in watched if one.run.seed not in TUNED_SEEDS], "all": watched}
    for group, runs in groups.items():
        blocks = [(one, block) for one in runs for block in range(one.run.recipe.config().num_hidden_layers)]
        innocent = sum(len(one.steps) for one, block in blocks if one.is_false(block))
        yield f"{group}: {len(runs)} runs, {innocent} layer-checkpoints at which an alarm is false"
    titles = [f"{group}: {what}" for group in groups for what in ("named", "false", "runs")]
    yield f"| detector | threshold | {' | '.join(titles)} |"
    yield f"|---|---{'|---:' * len(titles)}|"
    for detector in DETECTORS:
        scored = [[one for one in runs if one.scores[detector.tool]] for runs in groups.values()]
        for title, threshold in detector.thresholds(scored[0]).items():
            cells = [cell for runs in scored for cell in detector.cells(runs, threshold)]
            yield f"| {detector.name} | {threshold:.3g} ({title}) | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weightwatcher", metavar="PYTHON", help="an interpreter that has WeightWatcher")
    parser.add_argument("--ormas", type=Path, metavar="FOLDER", help="where ormas-monitor was installed")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    runs = [run for run in RUNS if (options.out / str(run) / "truth.json").exists()]
    score(options.out, runs, weightwatcher=options.weightwatcher, ormas=options.ormas)
    watched = list(read(options.out, runs))
    for tool in ("alpha", "influence", "ormas"):
        print(f"{tool}: {sum(not one.scores[tool] for one in watched)} runs are not scored and left out of its lines")
    print("\n".join(table(watched)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
