"""Real trainings that save their checkpoints as their libraries do, each beside the same weights in safetensors.

A program too, for processes of their own: `python -m tests.runs.producers ROOT NAME...`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests import servers, zoo

PLAIN = "plain"
"""The folder of a producer in which the same weights are in safetensors."""


class Sequences(Dataset[dict[str, Tensor]]):
    """Token ids with themselves as labels, as transformers' Trainer takes them."""

    def __init__(self, count: int = 16) -> None:
        self._ids = torch.from_numpy(zoo.token_ids(count, 0))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Sequences(), batch_size=8)


def trained(model: Any, batches: int = 3) -> torch.optim.Optimizer:
    """A few steps of AdamW in a plain loop."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in itertools.islice(itertools.cycle(loader()), batches):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    return optimiser


# ---------------------------------------------------------------- one process


def trainer(folder: Path) -> None:
    _train(folder, zoo.build("llama", steps=20))


def trainer_bfloat16(folder: Path) -> None:
    _train(folder, zoo.build("llama", steps=20).to(torch.bfloat16))


def _train(folder: Path, model: Any, callbacks: Iterable[Any] = (), **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    run = Trainer(model=model, args=arguments, train_dataset=Sequences(), callbacks=list(callbacks))
    run.train()
    if not options:
        run.model.save_pretrained(folder / PLAIN)
    return run


def save_pretrained_sharded(folder: Path) -> None:
    model = zoo.build("gpt2", steps=3)
    model.save_pretrained(folder / "export", max_shard_size="10KB")
    assert len(list((folder / "export").glob("model-*.safetensors"))) > 1
    model.save_pretrained(folder / PLAIN)


def save_state(folder: Path) -> None:
    """Accelerate on one process, with its own numbering of savings."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=str(folder / "project"), automatic_checkpoint_naming=True)
    accelerator = Accelerator(project_config=project, cpu=True)
    model = zoo.build("llama", steps=20)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimiser, batches = accelerator.prepare(model, optimiser, loader())
    for batch in batches:
        optimiser.zero_grad()
        accelerator.backward(model(**batch).loss)
        optimiser.step()
    accelerator.save_state()
    whole = accelerator.unwrap_model(model)
    whole.config.save_pretrained(folder / "project" / "checkpoints" / "checkpoint_0")
    whole.save_pretrained(folder / PLAIN)


def lightning(folder: Path) -> None:
    _fit(folder, "auto", epochs=2, save_last="link")


def _fit(
    folder: Path, strategy: Any, *, epochs: int, save_last: Any, devices: int = 1, callbacks: Iterable[Any] = ()
) -> Any:
    """Lightning's Trainer on a module that wraps a transformers model."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 16, "folder": Path("x")})
            self.model = zoo.build("llama", steps=20).train()

        def configure_model(self) -> None:
            if devices > 1:
                _shard(self.model, self.device_mesh["data_parallel"])

        def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            optimiser = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
            return [optimiser], [torch.optim.lr_scheduler.StepLR(optimiser, 1)]

    saving = ModelCheckpoint(dirpath=folder, save_last=save_last)
    module = Module()
    run = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=[*callbacks, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    run.fit(module, loader())
    _save_whole(module.model, folder)
    return run


def compiled(folder: Path) -> None:
    """nanoGPT's ckpt.pt from a model that torch.compile wrapped and trained."""
    model = zoo.build("gpt2", steps=3).train()
    wrapped: Any = torch.compile(model, backend="eager")
    optimiser = trained(wrapped)
    assert all(name.startswith("_orig_mod.") for name in wrapped.state_dict())
    _save_nano(folder, wrapped, optimiser, model)


def _save_nano(folder: Path, wrapped: nn.Module, optimiser: torch.optim.Optimizer, model: Any) -> None:
    checkpoint = {
        "model": wrapped.state_dict(),
        "optimizer": optimiser.state_dict(),
        "model_args": {"n_layer": zoo.BLOCKS, "bias": True},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out"},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    model.config.save_pretrained(folder)
    model.save_pretrained(folder / PLAIN)


# ---------------------------------------------------------------- two ranks


def _rank() -> int:
    return torch.distributed.get_rank()


def _shard(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _save_whole(model: Any, folder: Path) -> None:
    """The weights put together from all ranks, by rank 0 in safetensors."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if torch.distributed.is_initialized():
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        state = model.state_dict()
    if not torch.distributed.is_initialized() or _rank() == 0:
        whole = zoo.build("llama", steps=0)
        whole.load_state_dict(state)
        whole.save_pretrained(folder / PLAIN)
        whole.config.save_pretrained(folder)


def distributed_data_parallel(folder: Path) -> None:
    model = zoo.build("gpt2", steps=3).train()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimiser = trained(wrapped)
    if _rank() == 0:
        _save_nano(folder, wrapped, optimiser, model)


def distributed_checkpoint(folder: Path) -> None:
    _save_distributed(folder, asynchronous=False)


def asynchronous_distributed_checkpoint(folder: Path) -> None:
    _save_distributed(folder, asynchronous=True)


def _save_distributed(folder: Path, *, asynchronous: bool) -> None:
    """FSDP2 and torch.distributed.checkpoint, with the optimizer, as torchtitan uses them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = zoo.build("llama", steps=20).train()
    _shard(model, torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    optimiser = trained(model)
    weights, moments = get_state_dict(model, optimiser)
    state = {"model": weights, "optim": moments, "train_state": {"step": torch.tensor(3)}}
    if asynchronous:
        dcp.async_save(state, checkpoint_id=folder / "step-3").result()
    else:
        dcp.save(state, checkpoint_id=folder / "step-3")
    _save_whole(model, folder)


@contextlib.contextmanager
def fsdp_on_the_cpu() -> Iterator[None]:
    """Lets Accelerate cut models over processes without accelerators, which it knows how to do and does not offer.

    Everything that is then done, the saving above all, is its own.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__
    known: list[Any] = []

    def initialise(state: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        known.extend([fsdp_plugin] if fsdp_plugin is not None else [])
        original(state, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if known:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, known[0]

    AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState.__init__ = initialise
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state(reset_partial_state=True)


def accelerate_fsdp2(folder: Path, states: str = "SHARDED_STATE_DICT") -> None:
    """Accelerate's own FSDP2 and its sharded state, or the whole one in one file."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, ProjectConfiguration

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type=states,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    project = ProjectConfiguration(project_dir=str(folder / "project"), automatic_checkpoint_naming=True)
    with fsdp_on_the_cpu():
        accelerator = Accelerator(fsdp_plugin=plugin, project_config=project, cpu=True)
        model = zoo.build("llama", steps=20).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
        model, optimiser = accelerator.prepare(model, optimiser)
        for batch in loader():
            optimiser.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimiser.step()
        accelerator.save_state()
    _save_whole(model, folder)
    if _rank() == 0:
        (folder / "config.json").rename(folder / "project" / "checkpoints" / "config.json")


def accelerate_fsdp2_whole(folder: Path) -> None:
    accelerate_fsdp2(folder, "FULL_STATE_DICT")


def trainer_fsdp2(folder: Path) -> None:
    """transformers' Trainer with FSDP2 and sharded states."""
    sharding = {
        "version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    }
    with fsdp_on_the_cpu():
        run = _train(folder, zoo.build("llama", steps=20), fsdp=True, fsdp_config=sharding)
    _save_whole(run.model_wrapped, folder)


def lightning_sharded(folder: Path, callbacks: Iterable[Any] = ()) -> None:
    """Lightning's strategy for models cut over processes, and its checkpoint as a folder."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True)
    _fit(folder, strategy, epochs=1, save_last=False, devices=2, callbacks=callbacks)


LATE = "late.json"
"""What rank 1 writes into a checkpoint a second after it was told of the save: whether the marker was there."""


def trainer_marked(folder: Path) -> None:
    """transformers' Trainer with the callback that marks, and a rank that is late with its part of each save."""
    from transformers import TrainerCallback

    from peel_agent.callbacks.transformers import PeelAgentCallback

    class LateRank(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if _rank() == 1:
                time.sleep(1)
                saved = folder / f"checkpoint-{state.global_step}"
                (saved / LATE).write_text(json.dumps((saved / "STABLE").exists()))

    _train(folder, zoo.build("llama", steps=0), callbacks=[LateRank(), PeelAgentCallback()])


def lightning_marked(folder: Path) -> None:
    from peel_agent.callbacks.lightning import PeelAgentCallback

    lightning_sharded(folder, callbacks=[PeelAgentCallback()])


# ---------------------------------------------------------------- the program


@dataclass(frozen=True)
class Producer:
    """What `write` leaves in its folder: `checkpoint` of this format and step, which is None where nothing says it."""

    write: Callable[[Path], None]
    checkpoint: str
    format: str
    step: int | None


SINGLE: Mapping[str, Producer] = {
    "Trainer": Producer(trainer, "checkpoint-2", "transformers", 2),
    "Trainer, bfloat16": Producer(trainer_bfloat16, "checkpoint-2", "transformers", 2),
    "save_pretrained, sharded": Producer(save_pretrained_sharded, "export", "safetensors", None),
    "Accelerate": Producer(save_state, "project/checkpoints/checkpoint_0", "safetensors", None),
    "Lightning": Producer(lightning, "epoch=1-step=4.ckpt", "torch", 4),
    "torch.compile": Producer(compiled, "ckpt.pt", "torch", 3),
}
PAIR: Mapping[str, Producer] = {
    "DistributedDataParallel": Producer(distributed_data_parallel, "ckpt.pt", "torch", 3),
    "torch.distributed.checkpoint": Producer(distributed_checkpoint, "step-3", "dcp", 3),
    "the same, asynchronous": Producer(asynchronous_distributed_checkpoint, "step-3", "dcp", 3),
    "Accelerate, FSDP2": Producer(accelerate_fsdp2, "project/checkpoints/checkpoint_0", "dcp", None),
    "Accelerate, FSDP2, whole": Producer(accelerate_fsdp2_whole, "project/checkpoints/checkpoint_0", "torch", None),
    "Trainer, FSDP2": Producer(trainer_fsdp2, "checkpoint-2", "dcp", 2),
    "Lightning, ModelParallelStrategy": Producer(lightning_sharded, "epoch=0-step=2.ckpt", "dcp", 2),
}
MARKED: Mapping[str, Producer] = {
    "Trainer, marked": Producer(trainer_marked, "checkpoint-2", "transformers", 2),
    "Lightning, marked": Producer(lightning_marked, "epoch=0-step=2.ckpt", "dcp", 2),
}


def run(root: Path, names: Iterable[str], *, ranks: int) -> None:
    """Runs these producers in as many processes of their own, one after another."""
    port = str(servers.free_port())
    command = [sys.executable, "-m", "tests.runs.producers", str(root), *names]
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    shared |= {
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }  # as torchrun says them
    processes = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **(shared | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in map(str, range(ranks))
    ]
    try:
        said = [process.communicate(timeout=150)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)


def main(root: Path, *names: str) -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        ({**SINGLE, **PAIR, **MARKED})[name].write(root / name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        os._exit(0)  # threads of the libraries may abort a process that ends in the usual way


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
