"""`python -m tests.bench.depth`: what margins of all blocks and parts cost as a model gets deeper, with change and
progress beside the checkpoint before, on sequences of 1,024 tokens.

In plain forward passes over the whole probe: by counted multiplications, which are the same on any machine, and by
time, against a forward pass of transformers in the same run. The models are narrow, random Llamas read from a file.
Their probe has as many sequences as the usual one, 64 of fit, 8 of select and 16 of confirm: that is what decides the
count, and width hardly does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from peel_agent.records import Findings, PeelSettings, Plan, Probe, Status
from tests.bench.shapes import compared, forward_seconds, step_back

STORED = Path(__file__).with_name("depth.json")
LENGTH = 1024
FIT, SELECT, CONFIRM = 64, 8, 16
DEPTHS = (12, 32, 80)
MARGINS = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")
GROWTH = 0.05
"""By so much the stream grows from block to block, as in trained models: without it the first blocks of a random
model are worth a hundred times the last.
"""


@dataclass(frozen=True)
class Shape:
    """A narrow Llama."""

    blocks: int
    width: int = 64
    vocabulary: int = 512

    def model(self) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
            initializer_range=self.width**-0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        for index, layer in enumerate(model.model.layers):
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.data *= (1.0 + GROWTH) ** index
        return model


def sampled(model: Any, count: int) -> Any:
    """int64 [count, LENGTH] drawn from the model: nothing predicts them better, so that every block earns its place."""
    ids = torch.randint(model.config.vocab_size, (count, 1))
    current, cache = ids, None
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            out = model(current, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            current = torch.multinomial(torch.softmax(out.logits[:, -1], -1), 1)
            ids = torch.cat([ids, current], dim=1)
    return ids.numpy()


def _split(ids: Any) -> Probe:
    return Probe(ids[SELECT + CONFIRM :], ids[:SELECT], ids[SELECT : SELECT + CONFIRM], "depth")


def earning(model: Any) -> Probe:
    """Every block earns its place."""
    scored = sampled(model, SELECT + CONFIRM)
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, size=(FIT, LENGTH))
    return _split(np.concatenate([scored, drawn]))


def untrained(model: Any) -> Probe:
    """The probe has nothing to do with the model: no block earns anything, as before the first steps of a run."""
    return _split(np.random.default_rng(0).integers(0, model.config.vocab_size, size=(FIT + SELECT + CONFIRM, LENGTH)))


def silent(model: Any) -> Probe:
    """Every block adds exactly nothing."""
    _silence(model, range(len(model.model.layers)))
    return untrained(model)


def one_silent(model: Any) -> Probe:
    """Block 5 adds nothing, and the others earn their place."""
    _silence(model, [5])
    return earning(model)


def three_silent(model: Any) -> Probe:
    """Blocks 2, 5 and 8 add nothing."""
    _silence(model, [2, 5, 8])
    return earning(model)


def dead_mlp(model: Any) -> Probe:
    """The MLP of block 4 adds nothing."""
    model.model.layers[4].mlp.down_proj.weight.data.zero_()
    return earning(model)


def _silence(model: Any, blocks: Iterable[int]) -> None:
    for index in blocks:
        layer = model.model.layers[index]
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.zero_()


FAULTS = (one_silent, three_silent, dead_mlp)
CASES: Mapping[str, Callable[[Any], Probe]] = {case.__name__: case for case in (earning, untrained, silent, *FAULTS)}


def measured(shape: Shape, make_probe: Callable[[Any], Probe], plan: Plan, *, timed: bool = True) -> dict[str, Any]:
    """One model peeled: counted passes, those of each stage, seconds of the peel over those of a forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        now, before = Path(folder) / "now", Path(folder) / "before"
        model = shape.model()
        probe = make_probe(model)
        model.save_pretrained(now)
        step_back(now, before)
        forward = forward_seconds(now, probe, "cpu", batch=4) if timed else None
        start = time.perf_counter()
        found = compared(now, before, probe, plan)
        spent = time.perf_counter() - start
    return {
        "passes": round(found.passes, 3),
        "by stage": {stage: round(passes, 3) for stage, passes in found.work.items()},
        **({} if forward is None else {"time over that of a forward pass": round(spent / forward, 2)}),
        "statuses": dict(sorted(Counter(_statuses(found).values()).items())),
        "below": [place for place, status in _statuses(found).items() if status == "below"],
    }


def _statuses(found: Findings) -> dict[str, Status]:
    """By block (`3`) and part (`3/mlp`)."""
    statuses: dict[str, Status] = {}
    for layer in found.layers:
        statuses[f"{layer.index}"] = layer.status
        statuses |= {f"{layer.index}/{name}": part.status for name, part in layer.parts.items()}
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--passes", type=float, default=PeelSettings().budget_passes, help="the budget; 0 is none")
    parser.add_argument(
        "--write", action="store_true", help=f"keep the figures in {STORED.name}, to compare with later"
    )
    options = parser.parse_args()
    for blocks in options.blocks:
        for case in options.cases:
            found = measured(Shape(blocks), CASES[case], replace(MARGINS, passes=options.passes or None))
            name, stored = f"{blocks} blocks, {case}", json.loads(STORED.read_text()) if STORED.exists() else {}
            if name in stored:
                found["passes over those stored"] = round(found["passes"] / stored[name]["passes"], 3)
            print(f"{name}: {json.dumps(found)}", flush=True)
            if options.write:
                kept = {key: value for key, value in found.items() if key != "passes over those stored"}
                STORED.write_text(json.dumps(stored | {name: kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
