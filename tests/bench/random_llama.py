"""A Llama of random weights, written on the spot, with a probe that it says itself: every block of it earns its place.

`python -m tests.bench.random_llama CHECKPOINT SHAPE DEVICE` writes both in a process of its own, so that memory and the
device are given back, and prints what it wrote as JSON. The probe is probe.npy, two folders above the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.bench.capacity import MODELS, Model

STEP = 1000
SHAPES: Mapping[str, Model] = {
    "tiny": Model("tiny", 64, 2, 128, 64, vocabulary=256),
    "124m": Model("124 M", 768, 12, 2048, 768, vocabulary=25_344),
    "1b": MODELS[0],
    "8b": MODELS[1],
}


def config_of(model: Model) -> LlamaConfig:
    head = 128 if model.width >= 4096 else min(64, model.width // 2)
    return LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        intermediate_size=model.inner,
        num_hidden_layers=model.blocks,
        num_attention_heads=model.width // head,
        num_key_value_heads=model.keys // head,
        max_position_embeddings=2048,
        initializer_range=model.width**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )


def make(checkpoint: Path, model: Model, device: str, sequences: int, length: int) -> dict[str, Any]:
    """Both, the numbers drawn on the device: what they hold, and the seconds that they took."""
    start = time.perf_counter()
    size = write_checkpoint(checkpoint, model, device)
    written = time.perf_counter()
    sample(checkpoint, device, sequences=sequences, length=length)
    return {
        "GB": size / 1e9,
        "parameters": size // 2,
        "seconds to write": written - start,
        "tokens of the probe": sequences * length,
        "seconds to sample": time.perf_counter() - written,
    }


def write_checkpoint(folder: Path, model: Model, device: str = "cpu") -> int:
    """Writes random weights in bf16, one shard in memory at a time, as a Trainer's checkpoint. Returns their bytes."""
    config = config_of(model)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": STEP}))
    blocks = [f"model.layers.{block}." for block in range(model.blocks)]
    prefixes = [next((block for block in blocks if name.startswith(block)), "") for name in shapes]
    noise = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}
    written = 0
    for number, prefix in enumerate(["", *blocks], start=1):
        file = f"model-{number:05}-of-{model.blocks + 1:05}.safetensors"
        names = [name for name, its_prefix in zip(shapes, prefixes, strict=True) if its_prefix == prefix]
        weights = {name: _weight(shapes[name], config.initializer_range, noise) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
        written += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": written}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def _weight(shape: Sequence[int], spread: float, noise: torch.Generator) -> Tensor:
    """A matrix of normal numbers; a norm's weights are ones."""
    drawn = torch.randn(shape, generator=noise, device=noise.device) * spread if len(shape) > 1 else torch.ones(shape)
    return drawn.to("cpu", torch.bfloat16)


@torch.no_grad()
def sample(checkpoint: Path, device: str, *, sequences: int, length: int) -> None:
    """Writes token ids [sequences, length] that the model itself says."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    vocabulary = model.config.vocab_size
    current = torch.randint(vocabulary, (sequences, 1), device=device)
    ids, cache = [current], None
    for _ in range(length - 1):
        out = model(current, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        current = torch.multinomial(torch.softmax(out.logits[:, -1].float(), -1), 1)
        ids.append(current)
    np.save(probe_of(checkpoint), torch.cat(ids, dim=1).cpu().numpy())


def probe_of(checkpoint: Path) -> Path:
    return checkpoint.parents[1] / "probe.npy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shape", choices=[*SHAPES])
    parser.add_argument("device")
    parser.add_argument("--sequences", type=int, default=88)
    parser.add_argument("--sequence", type=int, default=1024)
    options = parser.parse_args()
    made = make(options.checkpoint, SHAPES[options.shape], options.device, options.sequences, options.sequence)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
