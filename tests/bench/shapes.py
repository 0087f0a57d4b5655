"""Models and probes of given shapes."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from peel_agent import registry
from peel_agent.before import open_before
from peel_agent.capture import open_trace
from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.load import open_snapshot
from peel_agent.peel import peel
from peel_agent.pipeline import locate
from peel_agent.records import Before, Findings, ModelSettings, Plan, Probe

SEQUENCE = 64
BATCH = 4096 // SEQUENCE


@dataclass(frozen=True)
class Shape:
    """A Llama: `tokens` is what its probe holds, in sequences of `sequence`; its MLPs are `inner` times as wide as the
    stream; `gain` is the spread of its initial weights times sqrt(width).
    """

    width: int = 512
    blocks: int = 12
    tokens: int = 90_112
    vocabulary: int = 1024
    gain: float = 1.0
    sequence: int = SEQUENCE
    inner: int = 4

    def model(self) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=max(1, self.width // 64),
            max_position_embeddings=self.sequence,
            initializer_range=self.gain / self.width**0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
        return AutoModelForCausalLM.from_config(config).eval()

    @property
    def counts(self) -> tuple[int, int]:
        """Sequences in select and in confirm, in the contract's proportions."""
        count = self.tokens // self.sequence
        return count // 11, 2 * count // 11


def earning(folder: Path, shape: Shape, device: str) -> Probe:
    """Saves a random model; the probe is sampled from it.

    No model predicts its own samples better than itself, so every block earns its place, as in a run that goes well:
    the race clears it at once.
    """
    model = shape.model().to(device)
    ids = torch.randint(shape.vocabulary, (shape.tokens // shape.sequence, 1), device=device)
    current, cache = ids, None
    with torch.no_grad():
        for _ in range(shape.sequence - 1):
            out = model(current, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            current = torch.multinomial(torch.softmax(out.logits[:, -1], -1), 1)
            ids = torch.cat([ids, current], dim=1)
    model.save_pretrained(folder)
    return _split(ids.cpu().numpy(), shape)


def idle(folder: Path, shape: Shape) -> Probe:
    """Saves a random model; the probe has nothing to do with it.

    No block earns anything, as before the first steps of a run: every margin stays open, the race's worst case.
    """
    shape.model().save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, size=(shape.tokens // shape.sequence, shape.sequence))
    return _split(ids, shape)


def _split(ids: Any, shape: Shape) -> Probe:
    select, confirm = shape.counts
    return Probe(ids[select + confirm :], ids[:select], ids[select : select + confirm], "bench")


def step_back(now: Path, before: Path) -> None:
    """The checkpoint before: the same weights, each moved a little."""
    shutil.copytree(now, before)
    noise = torch.Generator().manual_seed(1)
    weights = load_file(now / "model.safetensors")
    moved = {key: own + 0.02 * own.std() * torch.randn(own.shape, generator=noise) for key, own in weights.items()}
    save_file(moved, before / "model.safetensors", metadata={"format": "pt"})


def compared(now: Path, before: Path, probe: Probe, plan: Plan, device: str = "cpu") -> Findings:
    """What a plan finds beside the checkpoint before, change and progress too, as `watch` asks for them."""
    trace = trace_at(now, probe, device)
    earlier = Before(None, locate(before))
    opened = open_before(earlier, trace, model=ModelSettings(), keep_sketches=True, required=True)
    return peel(trace, plan, time.perf_counter, comparison=opened.comparison)


def trace_at(path: Path, probe: Probe, device: str) -> BlockwiseTrace:
    ref = locate(path)
    (form,) = registry.formats(ref.format)
    return open_trace(open_snapshot(ref, form, registry.family), probe, device=device)


def forward_seconds(path: Path, probe: Probe, device: str, batch: int = BATCH) -> float:
    """One plain forward pass of transformers over the whole probe, loss included, with every weight resident."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    ids = torch.from_numpy(np.concatenate([probe.fit, probe.select, probe.confirm])).to(device)
    with torch.no_grad():
        model(ids[:batch], labels=ids[:batch])
        synchronise(device)
        start = time.perf_counter()
        for rows in ids.split(batch):
            model(rows, labels=rows)
        synchronise(device)
        return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak() -> float:
    """The high-water mark of resident memory in MiB."""
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) / 1024
