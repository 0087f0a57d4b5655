"""One rank of real trainings with DeepSpeed on the CPU: `python -m tests.contracts.deepspeed_producer RANK PORT ROOT`.

Each writes a checkpoint, and beside it, as safetensors, what the engine holds in that moment, gathered from all ranks.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests import zoo

STEPS = 3
TRAINED: dict[str, tuple[int, str]] = {  # what is trained: the stage and the dtype that the model runs in
    "plain-0": (0, "bfloat16"),
    "plain-1": (1, "bfloat16"),
    "plain-2": (2, "float32"),
    "plain-3": (3, "float32"),
    "odd-2": (2, "bfloat16"),
    "odd-3": (3, "bfloat16"),
    "hpz-3": (3, "bfloat16"),
}
FROZEN = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.bias", "model.norm.weight")


def build(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its optimizer. The odd one has what is cut unevenly, frozen, tied, a buffer and two groups."""
    torch.manual_seed(0)
    config = copy.deepcopy(zoo.CONFIGS["llama"])
    if kind == "odd":
        config.tie_word_embeddings, config.mlp_bias, config.intermediate_size = True, True, 25
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if kind == "odd":
        model.register_buffer("counts", torch.tensor([3, 1, 4]))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)
        for name in FROZEN:
            model.get_parameter(name).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups if kind == "odd" else trained, lr=1e-2)


def train(label: str, rank: int, root: Path) -> None:
    """Trains for a moment and saves, as a script that uses DeepSpeed alone does."""
    kind, (stage, dtype) = label.partition("-")[0], TRAINED[label]
    model, optimizer = build(kind, getattr(torch, dtype))
    zero: dict[str, Any] = {"stage": stage}
    if kind == "odd" and stage == 3:
        zero["sub_group_size"] = 1000  # several flat groups, as large models have
    if kind == "hpz":
        zero["zero_hpz_partition_size"] = 2
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == "bfloat16"},
        },
    )
    ids = torch.from_numpy(zoo.token_ids(2, rank))
    for _ in range(STEPS):
        engine.backward(engine(ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(root / label))
    save_held(engine, root / label, rank)


def train_with_trainer(rank: int, root: Path) -> None:
    """transformers' Trainer with ZeRO 3 whose weights are not gathered when it saves."""
    # Accelerate knows DeepSpeed on accelerators only, and would take each of two ranks on the CPU for the only one.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.NO)
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    arguments = TrainingArguments(
        output_dir=str(root / "trainer"),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(zoo.CONFIGS["llama"]))
    data = [{"input_ids": row, "labels": row} for row in torch.from_numpy(zoo.token_ids(16, 0))]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    save_held(trainer.deepspeed, root / "trainer", rank)


def save_held(engine: Any, folder: Path, rank: int) -> None:
    """What the engine's forward pass uses, whole, under the names of the module's state dict."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        state: dict[str, Tensor] = dict(engine.module.named_buffers())
        state |= dict(engine.module.named_parameters(remove_duplicate=False))
        held = {name: state[name].detach().clone().contiguous() for name in engine.module.state_dict()}
    if rank == 0:
        save_file(held, folder / "held.safetensors")
        engine.module.config.save_pretrained(folder)


def main(rank: int, port: str, root: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    torch.set_num_threads(1)
    # Its collectives over shared memory are compiled where they are first used, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    try:
        for label in TRAINED:
            train(label, rank, root)
        train_with_trainer(rank, root)
    finally:
        torch.distributed.destroy_process_group()
    os._exit(0)  # threads of the libraries may abort a process that ends in the usual way


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
