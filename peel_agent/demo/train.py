"""A real training by transformers' Trainer: a small decoder, byte by byte on the standard library's sources.

Run as `python -m peel_agent.demo.train OUTPUT`; writes OUTPUT/checkpoint-N as any Trainer run does, and goes on from
the last one that is there. With `--hold-back I`, block I never learns: its parameters are frozen at their initial
values; with `--release-at STEP` it learns from that step on. With `--bits SET` the matrices of the blocks are quantised
in every forward pass (straight-through), and the checkpoints hold their latents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peel_agent.demo.text import VOCABULARY, corpus
from peel_agent.precision import straight_through
from peel_agent.records import WeightSet

SEQUENCE_LENGTH = 128
SEED = 1


class _Windows(Dataset[dict[str, torch.Tensor]]):
    """Non-overlapping windows of the corpus."""

    def __init__(self, ids: torch.Tensor) -> None:
        count = len(ids) // SEQUENCE_LENGTH
        self._windows = ids[: count * SEQUENCE_LENGTH].view(count, SEQUENCE_LENGTH)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


def build_model(kind: str, *, width: int, blocks: int) -> nn.Module:
    """A randomly initialised byte-level decoder: `llama` or `gpt2`."""
    if kind == "llama":
        config: Any = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            max_position_embeddings=SEQUENCE_LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        )
    else:
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=width,
            n_layer=blocks,
            n_head=4,
            n_positions=SEQUENCE_LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


class LowBitLinear(nn.Linear):
    """A linear layer whose weight is quantised on the way forward; gradients reach its latents unchanged."""

    weight_set: WeightSet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, straight_through(self.weight, self.weight_set), self.bias)


def make_low_bit(model: nn.Module, name: str) -> None:
    """Makes every linear layer of the blocks low-bit; names and latents in the state dict stay what they are."""
    (blocks,) = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in blocks.modules():
        if type(module) is nn.Linear:
            module.__class__ = LowBitLinear
            module.weight_set = WeightSet.named(name)  # type: ignore[assignment]


def hold_back(model: nn.Module, index: int) -> nn.Module:
    """Freezes one block at its initial values, and returns it."""
    (blocks,) = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return blocks[index].requires_grad_(requires_grad=False)


class _Release(TrainerCallback):  # type: ignore[misc] # as below
    """Lets a block learn from a step on."""

    def __init__(self, block: nn.Module, step: int) -> None:
        self._block = block
        self._step = step

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step >= self._step:
            self._block.requires_grad_(requires_grad=True)


class _TellStep(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Says how far the training is, a line each time that it logs."""

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            print(f"step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.4f}", flush=True)


def _last_whole(output: Path) -> str | None:
    """The newest checkpoint of an earlier training that was ended; its state is what the Trainer writes last."""
    whole = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kind", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--hold-back", type=int, default=None, metavar="I")
    parser.add_argument("--release-at", type=int, default=None, metavar="STEP", help="it learns from then on")
    parser.add_argument("--bits", default=None, metavar="SET", help="sign, ternary, int4-channel, ... (llama)")
    parser.add_argument("--report-to", choices=("none", "mlflow"), default="none")
    options = parser.parse_args(arguments)
    if options.release_at is not None and options.hold_back is None:
        parser.error("--release-at needs --hold-back I, the block to release")

    set_seed(SEED)
    model = build_model(options.kind, width=options.width, blocks=options.blocks)
    if options.bits is not None:
        make_low_bit(model, options.bits)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
            weight_decay=0.0,
            save_steps=options.save_every,
            logging_steps=20,
            report_to=options.report_to,
            use_cpu=True,
            seed=SEED,
            dataloader_num_workers=0,
            disable_tqdm=True,
        ),
        train_dataset=_Windows(torch.from_numpy(corpus()[0])),
    )
    trainer.create_optimizer()  # before anything is frozen: it has the parameters of a block that is released later
    if options.hold_back is not None:
        block = hold_back(model, options.hold_back)
        if options.release_at is not None:
            trainer.add_callback(_Release(block, options.release_at))
    trainer.add_callback(_TellStep())
    trainer.train(resume_from_checkpoint=_last_whole(options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
