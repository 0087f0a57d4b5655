"""The trainings of the gallery: byte-level decoders, each trained healthily and with every fault of its table.

`python -m tests.bench.gallery.trainings --out DIR [--only GLOB] [--shard I/N]` trains what is not there yet; `--list`
shows what there is and what each fault costs. A run lies in DIR/<model>-<seed>/<fault>/: `checkpoints/checkpoint-N` as
transformers' Trainer leaves them, and, when it is finished, `truth.json`. DIR/probe.npy holds the windows to observe.
A fault in the middle of a run continues the healthy twin from its step, with the same batches.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedModel

from peel_agent.demo.text import VOCABULARY, corpus
from peel_agent.demo.train import make_low_bit
from tests.bench.gallery.faults import (
    DENSE_FAULTS,
    GPT2_NAMES,
    LLAMA_NAMES,
    LOW_BIT_FAULTS,
    MIXTURE_FAULTS,
    BlockNames,
    Fault,
    Strikes,
    Training,
)

LENGTH, BATCH = 128, 8
STEPS, SAVE_EVERY, LOG_EVERY, FORK_AT = 700, 100, 10, 400
STRIKES_AFTER = (20, 50, 80)
"""Steps from the fork to the fault, by seed: what is left until step 500 is time to heal."""
LEARNING_RATE, WARM_UP, WEIGHT_DECAY, GRADIENT_NORM = 3e-3, 20, 0.01, 1.0
EVALUATION_WINDOWS, PROBE_WINDOWS = 64, 320
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.06,  # learns sooner than 0.02 at this width
}


def _llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        **_SIZES,
    )


def _gpt2() -> GPT2Config:
    return GPT2Config(
        n_embd=64,
        n_layer=8,
        n_head=4,
        n_positions=LENGTH,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_SIZES,
    )


def _mixture() -> MixtralConfig:
    return MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        **_SIZES,
    )


@dataclass(frozen=True)
class Recipe:
    """One model of the gallery: its configuration, its seeds, its faults, and the weight set its blocks train in."""

    config: Callable[[], Any]
    seeds: tuple[int, ...]
    faults: dict[str, Fault]
    names: BlockNames = LLAMA_NAMES
    weight_set: str | None = None


RECIPES: dict[str, Recipe] = {
    "llama": Recipe(_llama, (0, 1), DENSE_FAULTS),
    "gpt2": Recipe(_gpt2, (2, 3), DENSE_FAULTS, GPT2_NAMES),
    "ternary": Recipe(_llama, (0, 1), LOW_BIT_FAULTS, weight_set="ternary"),
    "sign": Recipe(_llama, (0, 1), LOW_BIT_FAULTS, weight_set="sign"),
    "mixture": Recipe(_mixture, (0, 1), MIXTURE_FAULTS),
}


@dataclass(frozen=True)
class Run:
    """One training of the gallery, by its names."""

    model: str
    seed: int
    fault: str

    def __str__(self) -> str:
        return f"{self.model}-{self.seed}/{self.fault}"

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.model]

    @property
    def twin(self) -> Run:
        return Run(self.model, self.seed, "healthy")


_ORDER = (
    *(("llama", 0), ("gpt2", 2), ("llama", 1), ("gpt2", 3)),
    *(("ternary", 0), ("sign", 0), ("mixture", 0), ("ternary", 1), ("sign", 1), ("mixture", 1)),
)
RUNS = tuple(Run(model, seed, fault) for model, seed in _ORDER for fault in RECIPES[model].faults)
SHORT = tuple(
    Run("llama", 0, fault)
    for fault in ("healthy", "frozen_from_start", "shuffled_rows", "attention_zeroed", "residual_scale", "rounded_3bit")
)
"""What stands for the gallery where minutes count."""


@dataclass(frozen=True)
class Text:
    """The training half as one stretch, int64 [T]; two sets of windows of the other half, [N, LENGTH], disjoint."""

    training: Tensor
    evaluation: Tensor
    probe: Tensor

    @classmethod
    def read(cls) -> Text:
        training, held_out = (torch.from_numpy(half) for half in corpus())
        windows = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        probe_end = EVALUATION_WINDOWS + PROBE_WINDOWS
        return cls(training, windows[drawn[:EVALUATION_WINDOWS]], windows[drawn[EVALUATION_WINDOWS:probe_end]])

    def batch(self, seed: int, data_order: int, step: int) -> Tensor:
        """The batch [BATCH, LENGTH] of one step, which depends on nothing but these numbers."""
        generator = torch.Generator().manual_seed((seed * 10 + data_order) * 100_000 + step)
        starts = torch.randint(len(self.training) - LENGTH, (BATCH,), generator=generator).tolist()
        return torch.stack([self.training[start : start + LENGTH] for start in starts])


@dataclass
class History:
    """What a run has shown so far."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: dict[str, list[float]] = field(default_factory=dict)

    def log(self) -> list[dict[str, float]]:
        """Mean training losses, as the Trainer's `log_history` holds them."""
        ends = range(LOG_EVERY, self.step + 1, LOG_EVERY)
        return [{"step": end, "loss": sum(self.losses[end - LOG_EVERY : end]) / LOG_EVERY} for end in ends]


def begin(run: Run, checkpoints: Path) -> Training:
    """The run at step 0."""
    torch.manual_seed(run.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(run.recipe.config())
    if run.recipe.weight_set is not None:
        make_low_bit(model, run.recipe.weight_set)
    if run.model == "gpt2":
        _set_waves(model.get_parameter("transformer.wpe.weight"))
    (blocks,) = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    in_blocks = set(blocks.parameters())
    groups = [list(block.parameters()) for block in blocks]
    groups.append([parameter for parameter in model.parameters() if parameter not in in_blocks])
    optimizer = torch.optim.AdamW(
        [{"params": group, "learning_rate_scale": 1.0} for group in groups],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    return Training(run.seed, model, blocks, run.recipe.names, optimizer, checkpoints)


@torch.no_grad()
def _set_waves(positions: Tensor) -> None:
    """Sines and cosines to begin with: attention finds the previous byte hundreds of steps sooner than from noise."""
    length, width = positions.shape
    frequencies = length ** -(torch.arange(width // 2) / (width // 2))
    angles = torch.arange(length)[:, None] * frequencies
    positions.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], dim=1))


def advance(training: Training, history: History, text: Text, *, to: int) -> None:
    """Trains to this step, with a checkpoint and an evaluation wherever they are due."""
    while history.step < to:
        batch = text.batch(training.seed, training.data_order, history.step)
        history.step += 1
        history.losses.append(_one_step(training, batch, warmth=min(1.0, history.step / WARM_UP)))
        if history.step % SAVE_EVERY == 0:
            history.evaluations[str(history.step)] = evaluate(training.model, text.evaluation)
            save(training, history)


def _one_step(training: Training, batch: Tensor, *, warmth: float) -> float:
    for group in training.optimizer.param_groups:
        group["lr"] = LEARNING_RATE * warmth * group["learning_rate_scale"]
    loss: Tensor = training.model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), GRADIENT_NORM)
    training.optimizer.step()
    training.optimizer.zero_grad()
    for held in training.after_step:
        held()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> list[float]:
    """The loss of each window [N, LENGTH], nats a token."""
    losses: list[float] = []
    for batch in windows.split(BATCH):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        by_token = functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses += by_token.mean(dim=1).tolist()
    return losses


def save(training: Training, history: History) -> None:
    """The checkpoint appears whole, under its name, or not at all."""
    name = f"checkpoint-{history.step}"
    temporary = training.checkpoints / f"tmp-{name}"
    training.model.save_pretrained(temporary)
    state = {"global_step": history.step, "log_history": history.log()}
    _write(temporary / "trainer_state.json", state)
    temporary.rename(training.checkpoints / name)


def train(run: Run, out: Path, text: Text) -> None:
    """Trains a run, unless it is finished; what an unfinished one left is removed. The twin is trained where needed."""
    fault = run.recipe.faults[run.fault]
    if run != run.twin and fault.strikes != "start":
        train(run.twin, out, text)
    folder = out / str(run)
    with _alone(folder):
        if (folder / "truth.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        history = _train(run, folder, out / str(run.twin), text)
        seconds = time.perf_counter() - began
    print(f"{run}: {seconds:.0f} s, loss {np.mean(history.evaluations[str(STEPS)]):.4f}", flush=True)


def _train(run: Run, folder: Path, twin_folder: Path, text: Text) -> History:
    fault = run.recipe.faults[run.fault]
    training, history = begin(run, folder / "checkpoints"), History()
    blocks = fault.blocks(run.seed, len(training.blocks))
    planted_at = _planting_steps(run.seed)[fault.strikes]
    if run == run.twin:
        _train_to_forks(training, history, text, folder)
    elif fault.strikes != "start":
        history = _fork(training, twin_folder, planted_at)
    fault.plant(training, blocks)
    advance(training, history, text, to=STEPS)
    _write(folder / "truth.json", _truth(run, fault, blocks, planted_at, history))
    return history


def _planting_steps(seed: int) -> dict[Strikes, int]:
    return {"start": 0, "resume": FORK_AT, "later": FORK_AT + STRIKES_AFTER[seed % len(STRIKES_AFTER)]}


def _train_to_forks(training: Training, history: History, text: Text, folder: Path) -> None:
    """Leaves the whole state of the run, state-N.pt, at both steps from which faults continue it."""
    for step in (_planting_steps(training.seed)[strikes] for strikes in ("resume", "later")):
        advance(training, history, text, to=step)
        state = {
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "history": {"step": history.step, "losses": history.losses, "evaluations": history.evaluations},
        }
        torch.save(state, folder / f"state-{step}.pt")


def _fork(training: Training, twin_folder: Path, step: int) -> History:
    """Puts a new training where its twin was at this step; the checkpoints until then are hard links to the twin's."""
    state = torch.load(twin_folder / f"state-{step}.pt", weights_only=True)
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    for saved in range(SAVE_EVERY, step + 1, SAVE_EVERY):
        name = f"checkpoint-{saved}"
        shutil.copytree(twin_folder / "checkpoints" / name, training.checkpoints / name, copy_function=os.link)
    return History(**state["history"])


def _truth(run: Run, fault: Fault, blocks: list[int], planted_at: int, history: History) -> dict[str, Any]:
    return {
        "model": run.model,
        "seed": run.seed,
        "fault": run.fault,
        "kind": fault.kind,
        "blocks": blocks,
        "part": fault.part,
        "note": fault.note,
        "planted_at": planted_at,
        "from_start": fault.strikes == "start",
        "finished": True,
        "eval": {step: sum(losses) / len(losses) for step, losses in history.evaluations.items()},
        "eval_sequences": history.evaluations,
    }


def harm(truth: dict[str, Any], twin: dict[str, Any], step: int) -> tuple[float, float]:
    """Mean loss above the twin's at this step, and half its 95 % interval over the same windows, nats a token."""
    own, healthy = (np.array(each["eval_sequences"][str(step)]) for each in (truth, twin))
    above = own - healthy
    return float(above.mean()), float(1.96 * above.std(ddof=1) / np.sqrt(len(above)))


def _table(runs: Sequence[Run], out: Path) -> Iterator[str]:
    """One line a run: what it is, and its harm where it and its twin are finished."""
    for run in runs:
        truth, twin = _read(out / str(run) / "truth.json"), _read(out / str(run.twin) / "truth.json")
        line = f"{run!s:34}"
        if truth is not None:
            line += f"{truth['kind']:9} {truth['blocks']!s:7} at {truth['planted_at']:3} "
        if truth is not None and twin is not None:
            harms = (harm(truth, twin, step) for step in range(FORK_AT + SAVE_EVERY, STEPS + 1, SAVE_EVERY))
            line += "".join(f"  {mean:+8.4f} ±{half:.4f}" for mean, half in harms)
        yield line if truth is not None else f"{line}not finished"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_text(json.dumps(content))
    temporary.rename(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process trains the run of this folder meanwhile; the kernel lets go when the process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_probe(path: Path, text: Text) -> None:
    """The windows to observe, int64 [PROBE_WINDOWS, LENGTH]."""
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    np.save(temporary, text.probe.numpy())
    temporary.rename(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="*", metavar="GLOB", help="runs by name, as in llama-0/*")
    parser.add_argument("--short", action="store_true", help="only the runs of SHORT")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every Nth run, from the Ith")
    parser.add_argument("--list", action="store_true", help="show the runs and their harm, train nothing")
    options = parser.parse_args(arguments)
    runs = [run for run in (SHORT if options.short else RUNS) if fnmatch(str(run), options.only)]
    if options.list:
        print("\n".join(_table(runs, options.out)))
        return 0

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    text = Text.read()
    write_probe(options.out / "probe.npy", text)
    first, of = (int(number) for number in options.shard.split("/"))
    for run in runs[first::of]:
        train(run, options.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
