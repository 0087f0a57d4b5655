"""The small experiment of arXiv 2605.02853 in kind: loss against its layer-wise bounds over a training.

`python -m tests.bench.paper` trains the paper's small decoders (4 blocks, width 64, 2 heads, feed-forward 128, context
32, batch 8) on bytes of the standard library, peels checkpoints along the paper's maps with its solver, prints a table,
and draws tests/bench/paper.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from peel_agent import registry
from peel_agent.capture import open_trace
from peel_agent.demo.text import VOCABULARY, corpus
from peel_agent.load import ProbeSizes, load_probe, open_snapshot
from peel_agent.peel import peel
from peel_agent.peel.bounds.maps import PAPER_FOUR_BLOCKS
from peel_agent.pipeline import locate
from peel_agent.records import BoundMemory, Plan

CONTEXT, BATCH = 32, 8
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
_SHARED |= {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0}
_PROBE = ProbeSizes(16_384, 4_096, 8_192, CONTEXT)


@dataclass(frozen=True)
class Experiment:
    """One of the paper's two settings."""

    name: str
    config: Any
    learning_rate: float
    maps: tuple[tuple[int, ...], ...]


EXPERIMENTS = (
    Experiment("LLaMA-style, 2e-4, L'=2", LlamaConfig(**_SHARED, intermediate_size=128), 2e-4, PAPER_FOUR_BLOCKS[:8]),
    Experiment(
        "GPT-2-style, 1e-5, L'=4",
        GPT2Config(**_SHARED, n_inner=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        1e-5,
        PAPER_FOUR_BLOCKS[8:],
    ),
)


def run(experiment: Experiment, *, steps: int, every: int, solver: str) -> list[dict[str, Any]]:
    """Trains, and peels every so many steps; one row a checkpoint: step, loss, bound, zone, the value of each map."""
    torch.manual_seed(0)
    training, held_out = (torch.from_numpy(ids) for ids in corpus())
    model = AutoModelForCausalLM.from_config(experiment.config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=experiment.learning_rate)
    windows = training[: len(training) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    rows: list[dict[str, Any]] = []
    memory: BoundMemory | None = None
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "probe.npy", held_out.numpy())
        for step in range(1, steps + 1):
            batch = windows[torch.randint(len(windows), (BATCH,))]
            optimiser.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimiser.step()
            if step % every == 0:
                findings = _peeled(
                    model, Path(folder), Plan(frozenset({"bounds"}), (), experiment.maps, solver), memory
                )
                memory = findings.memory
                rows.append(
                    {
                        "step": step,
                        "loss": findings.loss.value,
                        "bound": findings.bound.value,
                        "zone": findings.zone,
                        "maps": {bound.label: bound.value.value for bound in findings.bounds},
                    }
                )
    return rows


def _peeled(model: Any, folder: Path, plan: Plan, earlier: BoundMemory | None) -> Any:
    model.save_pretrained(folder / "model")
    ref = locate(folder / "model")
    (form,) = registry.formats(ref.format)
    snapshot = open_snapshot(ref, form, registry.family)
    probe = load_probe(folder / "probe.npy", _PROBE, vocabulary=VOCABULARY, context=CONTEXT, tokenizer=None)
    return peel(open_trace(snapshot, probe), plan, time.perf_counter, earlier=earlier)


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss, the bound, and every map's value over the training, one panel an experiment."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 3.6), layout="constrained")
    for panel, (name, rows) in zip(panels, results.items(), strict=True):
        steps = [row["step"] for row in rows]
        for label in rows[0]["maps"]:
            style = "--" if label == "head" else "-"
            panel.plot(steps, [row["maps"][label] for row in rows], style, color="tab:orange", lw=0.8, alpha=0.7)
        panel.plot(steps, [row["bound"] for row in rows], color="tab:green", lw=2, label="bound (running minimum)")
        panel.plot(steps, [row["loss"] for row in rows], color="tab:blue", lw=2, label="loss")
        panel.plot([], [], color="tab:orange", lw=0.8, label="each map (head alone: dashed)")
        panel.set(title=name, xlabel="training step", ylabel="nats per token")
        panel.legend(fontsize="small")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "peel"
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=300)
    parser.add_argument("--solver", default="descent")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for experiment in EXPERIMENTS:
        rows = run(experiment, steps=options.steps, every=options.every, solver=options.solver)
        results[experiment.name] = rows
        print(
            f"\n{experiment.name}, solver {options.solver}\n{'step':>6} {'loss':>8} {'bound':>8}  zone       best map"
        )
        for row in rows:
            best = min((value, label) for label, value in row["maps"].items() if label != "head")
            values = f"{row['step']:>6} {row['loss']:>8.4f} {row['bound']:>8.4f}  {row['zone']:<10}"
            print(f"{values} {best[1]} {best[0]:.4f}; head {row['maps']['head']:.4f}", flush=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
