"""`python -m tests.bench.depth`: what margins of all blocks and parts cost as a model gets deeper, with change and
progress beside the checkpoint before, on sequences of 1,024 tokens. `--contexts` and `--tokens` say what they cost with
longer and shorter sequences and with larger and smaller probes at 12 blocks; `--picture FILE` draws what is stored.

In plain forward passes over the whole probe: by counted multiplications, which are the same on any machine, and by
time, against a forward pass of transformers in the same run. The models are narrow, random Llamas read from a file.
Their probe has as many tokens as the usual one, 64 sequences of 1,024 of fit, 8 of select and 16 of confirm: that is
what decides the count, and width hardly does.
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
from tests.bench.stored import over_stored

STORED = Path(__file__).with_name("depth.json")
LENGTH = 1024
FIT, SELECT, CONFIRM = 64, 8, 16
"""Sequences of LENGTH tokens."""
DEPTHS = (12, 32, 80)
CONTEXTS = (128, 256, 512, 1024, 2048)
TOKENS = (22_528, 45_056, 90_112, 180_224)
MARGINS = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")
GROWTH = 0.05
"""By so much the stream grows from block to block, as in trained models: without it the first blocks of a random
model are worth a hundred times the last.
"""


@dataclass(frozen=True)
class Shape:
    """A narrow Llama, and a probe of sequences of a `length`, `size` times as many tokens as the usual one."""

    blocks: int
    length: int = LENGTH
    size: float = 1.0
    width: int = 64
    vocabulary: int = 512

    @classmethod
    def of_tokens(cls, tokens: int) -> Shape:
        """The shallowest model with a probe of so many tokens."""
        return cls(DEPTHS[0], size=tokens / cls(DEPTHS[0]).tokens)

    @property
    def tokens(self) -> int:
        return sum(self.sequences) * self.length

    @property
    def sequences(self) -> tuple[int, int, int]:
        """Of fit, of select and of confirm."""
        fit, select, confirm = (
            max(1, round(self.size * count * LENGTH / self.length)) for count in (FIT, SELECT, CONFIRM)
        )
        return fit, select, confirm

    def model(self) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=self.length,
            initializer_range=self.width**-0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        for index, layer in enumerate(model.model.layers):
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.data *= (1.0 + GROWTH) ** index
        return model


def sampled(model: Any, count: int, length: int) -> Any:
    """int64 [count, length] drawn from the model: nothing predicts them better, so that every block earns its place."""
    ids = torch.randint(model.config.vocab_size, (count, 1))
    current, cache = ids, None
    with torch.no_grad():
        for _ in range(length - 1):
            out = model(current, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            current = torch.multinomial(torch.softmax(out.logits[:, -1], -1), 1)
            ids = torch.cat([ids, current], dim=1)
    return ids.numpy()


def _split(ids: Any, shape: Shape) -> Probe:
    _, select, confirm = shape.sequences
    return Probe(ids[select + confirm :], ids[:select], ids[select : select + confirm], "depth")


def earning(model: Any, shape: Shape) -> Probe:
    """Every block earns its place."""
    fit, select, confirm = shape.sequences
    scored = sampled(model, select + confirm, shape.length)
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, size=(fit, shape.length))
    return _split(np.concatenate([scored, drawn]), shape)


def untrained(model: Any, shape: Shape) -> Probe:
    """The probe has nothing to do with the model: no block earns anything, as before the first steps of a run."""
    size = (sum(shape.sequences), shape.length)
    return _split(np.random.default_rng(0).integers(0, model.config.vocab_size, size=size), shape)


def silent(model: Any, shape: Shape) -> Probe:
    """Every block adds exactly nothing."""
    _silence(model, range(len(model.model.layers)))
    return untrained(model, shape)


def one_silent(model: Any, shape: Shape) -> Probe:
    """Block 5 adds nothing, and the others earn their place."""
    _silence(model, [5])
    return earning(model, shape)


def three_silent(model: Any, shape: Shape) -> Probe:
    """Blocks 2, 5 and 8 add nothing."""
    _silence(model, [2, 5, 8])
    return earning(model, shape)


def dead_mlp(model: Any, shape: Shape) -> Probe:
    """The MLP of block 4 adds nothing."""
    model.model.layers[4].mlp.down_proj.weight.data.zero_()
    return earning(model, shape)


def _silence(model: Any, blocks: Iterable[int]) -> None:
    for index in blocks:
        layer = model.model.layers[index]
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.zero_()


FAULTS = (one_silent, three_silent, dead_mlp)
MakeProbe = Callable[[Any, Shape], Probe]
CASES: Mapping[str, MakeProbe] = {case.__name__: case for case in (earning, untrained, silent, *FAULTS)}


def measured(shape: Shape, make_probe: MakeProbe, plan: Plan, *, timed: bool = True) -> dict[str, Any]:
    """One model peeled: counted passes, those of each stage, seconds of the peel over those of a forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        now, before = Path(folder) / "now", Path(folder) / "before"
        model = shape.model()
        probe = make_probe(model, shape)
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


def name_of(shape: Shape, case: str) -> str:
    """Such as `12 blocks, earning` and `12 blocks, sequences of 256, earning`."""
    length = "" if shape.length == LENGTH else f", sequences of {shape.length:,}"
    tokens = "" if shape.size == 1.0 else f", {shape.tokens:,} tokens"
    return f"{shape.blocks} blocks{length}{tokens}, {case}"


def tell(shape: Shape, case: str, budget: float, *, write: bool) -> None:
    """Measures one case, prints it beside what is stored of it, and stores it if that is wished."""
    found = measured(shape, CASES[case], replace(MARGINS, passes=budget or None))
    name, stored = name_of(shape, case), json.loads(STORED.read_text()) if STORED.exists() else {}
    if name in stored:
        found["passes over those stored"] = over_stored(found["passes"], stored[name]["passes"])
    print(f"{name}: {json.dumps(found)}", flush=True)
    if write:
        kept = {key: value for key, value in found.items() if key != "passes over those stored"}
        STORED.write_text(json.dumps(stored | {name: kept}, indent=2) + "\n")


def draw(picture: Path) -> None:
    """Passes by stage, as stored, against depth, length of sequences and tokens of the probe."""
    from matplotlib.figure import Figure

    stored = json.loads(STORED.read_text())
    axes_of = {
        "blocks": {blocks: Shape(blocks) for blocks in DEPTHS},
        "tokens a sequence, 12 blocks": {length: Shape(DEPTHS[0], length) for length in CONTEXTS},
        "tokens of the probe, 12 blocks": {tokens: Shape.of_tokens(tokens) for tokens in TOKENS},
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (label, shapes) in zip(figure.subplots(1, 3, sharey=True), axes_of.items(), strict=True):
        known = {at: stored[name] for at, shape in shapes.items() if (name := name_of(shape, "earning")) in stored}
        stages = dict.fromkeys(stage for found in known.values() for stage in found["by stage"])
        bottom = np.zeros(len(known))
        for stage in stages:
            passes = np.array([found["by stage"].get(stage, 0.0) for found in known.values()])
            axes.bar([f"{at:,}" for at in known], passes, bottom=bottom, label=stage)
            bottom += passes
        axes.axhline(4.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("forward passes")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, nargs="*", default=DEPTHS)
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help=f"such as {CONTEXTS}")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help=f"such as {TOKENS}")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--passes", type=float, default=PeelSettings().budget_passes, help="the budget; 0 is none")
    parser.add_argument(
        "--write", action="store_true", help=f"keep the figures in {STORED.name}, to compare with later"
    )
    parser.add_argument("--picture", type=Path, help="draw what is stored, and measure nothing")
    options = parser.parse_args()
    if options.picture is not None:
        draw(options.picture)
        return
    shapes = [
        *(Shape(blocks) for blocks in options.blocks),
        *(Shape(DEPTHS[0], length) for length in options.contexts),
        *(Shape.of_tokens(tokens) for tokens in options.tokens),
    ]
    for shape in shapes:
        for case in options.cases:
            tell(shape, case, options.passes, write=options.write)


if __name__ == "__main__":
    main()
