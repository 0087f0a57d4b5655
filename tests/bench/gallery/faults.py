"""The faults of the gallery: one function each, which strikes a run once, and the table that says what each one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

Kind = Literal["harmful", "harmless", "frozen", "run"]
Part = Literal["attention", "mlp"]
Strikes = Literal["start", "resume", "later"]


@dataclass(frozen=True)
class BlockNames:
    """Where one architecture keeps the modules that faults strike, relative to its block."""

    attention_norm: str
    attention_output: str
    mlp_norm: str
    mlp_up: str
    mlp_output: str
    output_axis: int
    """The axis of a matrix that runs over its output channels."""


LLAMA_NAMES = BlockNames(
    "input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.up_proj", "mlp.down_proj", output_axis=0
)
GPT2_NAMES = BlockNames("ln_1", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj", output_axis=1)


@dataclass
class Training:
    """A run in memory, as far as faults may change it.

    The optimizer has one parameter group a block, in order, and a last one for everything else; `learning_rate_scale`
    of a group multiplies the schedule. `after_step` functions run after every optimizer step.
    """

    seed: int
    model: PreTrainedModel
    blocks: nn.ModuleList
    names: BlockNames
    optimizer: torch.optim.Optimizer
    checkpoints: Path
    data_order: int = 0
    after_step: list[Callable[[], None]] = field(default_factory=list)

    def module(self, block: int, name: str) -> nn.Module:
        return self.blocks[block].get_submodule(name)

    def weight(self, block: int, module: str) -> nn.Parameter:
        return self.blocks[block].get_parameter(f"{module}.weight")


@dataclass(frozen=True)
class Fault:
    """What a fault is, when it strikes, and which blocks it touches.

    `strikes` at the `start`, on the `resume` from checkpoint 400, or some steps `later` than that. `touches` is how
    many blocks it strikes: the guilty one, that one and its partner, or none where the whole run is struck.
    """

    plant: Callable[[Training, list[int]], None]
    kind: Kind
    strikes: Strikes = "later"
    touches: int = 1
    part: Part | None = None
    note: str | None = None

    def blocks(self, seed: int, block_count: int) -> list[int]:
        """The 0-based blocks it strikes in this run; never the first or the last."""
        guilty = (seed * 2 + 2) % (block_count - 2) + 1
        partner = (guilty + 1) % (block_count - 2) + 1
        return sorted([guilty, partner][: self.touches])


def nothing(training: Training, blocks: list[int]) -> None:
    """The healthy twin."""


def restore_old(training: Training, blocks: list[int]) -> None:
    """The block gets its weights of checkpoint 100 back."""
    old = AutoModelForCausalLM.from_pretrained(training.checkpoints / "checkpoint-100")
    (old_blocks,) = [module for module in old.modules() if isinstance(module, nn.ModuleList)]
    for index in blocks:
        training.blocks[index].load_state_dict(old_blocks[index].state_dict())


@torch.no_grad()
def swap(training: Training, blocks: list[int]) -> None:
    """Two blocks exchange their weights; the optimizer does not follow."""
    first, second = (training.blocks[index] for index in blocks)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


@torch.no_grad()
def shuffle_rows(training: Training, blocks: list[int]) -> None:
    """The output channels of the MLP's up matrix are permuted; its bias and its gate are not."""
    generator = torch.Generator().manual_seed(training.seed)
    for index in blocks:
        matrix = training.weight(index, training.names.mlp_up)
        axis = training.names.output_axis
        order = torch.randperm(matrix.shape[axis], generator=generator)
        matrix.copy_(matrix.index_select(axis, order))


def zero_attention(training: Training, blocks: list[int]) -> None:
    """The attention's output projection is set to zero once."""
    for index in blocks:
        _multiply(training.module(index, training.names.attention_output), 0.0)


@torch.no_grad()
def kill_heads(training: Training, blocks: list[int]) -> None:
    """What the output projection reads from the first half of the heads is set to zero once."""
    for index in blocks:
        matrix = training.weight(index, training.names.attention_output)
        input_axis = 1 - training.names.output_axis
        matrix.narrow(input_axis, 0, matrix.shape[input_axis] // 2).zero_()


def zero_norm_gain(training: Training, blocks: list[int]) -> None:
    """The gain of the MLP's norm, and its bias, are zero from now on."""
    for index in blocks:
        _hold_at_zero(training, list(training.module(index, training.names.mlp_norm).parameters()))


@torch.no_grad()
def raise_norm_gain(training: Training, blocks: list[int]) -> None:
    """The gain of the attention's norm is multiplied by 20 once."""
    for index in blocks:
        training.weight(index, training.names.attention_norm).mul_(20)


def scale_residual(factor: float) -> Callable[[Training, list[int]], None]:
    """Both output projections of the block are multiplied by the factor once, and stay what they became."""

    def plant(training: Training, blocks: list[int]) -> None:
        for index in blocks:
            _multiply(training.module(index, training.names.attention_output), factor)
            _multiply(training.module(index, training.names.mlp_output), factor)

    return plant


def scale_weight_decay(factor: float) -> Callable[[Training, list[int]], None]:
    """The block's weight decay is multiplied by the factor from now on."""

    def plant(training: Training, blocks: list[int]) -> None:
        for index in blocks:
            training.optimizer.param_groups[index]["weight_decay"] *= factor

    return plant


def scale_learning_rate(factor: float) -> Callable[[Training, list[int]], None]:
    """The block's learning rate is multiplied by the factor from now on."""

    def plant(training: Training, blocks: list[int]) -> None:
        for index in blocks:
            training.optimizer.param_groups[index]["learning_rate_scale"] *= factor

    return plant


def scale_every_learning_rate(factor: float) -> Callable[[Training, list[int]], None]:
    """The learning rate of the whole run is multiplied by the factor from now on."""

    def plant(training: Training, blocks: list[int]) -> None:
        for group in training.optimizer.param_groups:
            group["learning_rate_scale"] *= factor

    return plant


def freeze(training: Training, blocks: list[int]) -> None:
    """The block learns nothing from now on."""
    for index in blocks:
        training.blocks[index].requires_grad_(requires_grad=False)


@torch.no_grad()
def reinitialise(training: Training, blocks: list[int]) -> None:
    """The block is drawn anew, as at the start of a training: another draw, the same distribution."""
    torch.manual_seed(training.seed + 1000)
    fresh = AutoModelForCausalLM.from_config(training.model.config)
    (fresh_blocks,) = [module for module in fresh.modules() if isinstance(module, nn.ModuleList)]
    for index in blocks:
        training.blocks[index].load_state_dict(fresh_blocks[index].state_dict())


def kill_mlp(training: Training, blocks: list[int]) -> None:
    """The MLP's up matrix, and its bias, are zero from now on."""
    for index in blocks:
        _hold_at_zero(training, list(training.module(index, training.names.mlp_up).parameters()))


def kill_expert(training: Training, blocks: list[int]) -> None:
    """The down projection of one expert is zero from now on."""
    for index in blocks:
        of_experts = training.blocks[index].get_parameter("mlp.experts.down_proj").detach()
        _hold_at_zero(training, [of_experts[training.seed % len(of_experts)]])


def reset_block_optimizer(training: Training, blocks: list[int]) -> None:
    """The optimizer forgets what it knew of the block."""
    for index in blocks:
        for parameter in training.blocks[index].parameters():
            del training.optimizer.state[parameter]


def reset_optimizer(training: Training, blocks: list[int]) -> None:
    """The optimizer forgets everything."""
    training.optimizer.state.clear()


def change_order(training: Training, blocks: list[int]) -> None:
    """Other batches are drawn from now on."""
    training.data_order = 1


@torch.no_grad()
def round_to_3_bits(training: Training, blocks: list[int]) -> None:
    """The block's matrices are rounded once to 3 bits, -3 to 3 times a scale for each output channel."""
    for index in blocks:
        for parameter in training.blocks[index].parameters():
            if parameter.dim() == 2:
                scale = parameter.abs().amax(dim=1 - training.names.output_axis, keepdim=True).clamp_min(1e-12) / 3
                parameter.copy_((parameter / scale).round() * scale)


def scale_latents(factor: float) -> Callable[[Training, list[int]], None]:
    """The matrices of the block are multiplied by the factor once; their quantised values have the scale of these."""

    def plant(training: Training, blocks: list[int]) -> None:
        for index in blocks:
            for module in training.blocks[index].modules():
                if isinstance(module, nn.Linear):
                    _multiply(module, factor)

    return plant


@torch.no_grad()
def _multiply(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.mul_(factor)


def _hold_at_zero(training: Training, tensors: list[Tensor]) -> None:
    @torch.no_grad()
    def zero() -> None:
        for tensor in tensors:
            tensor.zero_()

    zero()
    training.after_step.append(zero)


HEALTHY = Fault(nothing, "harmless", "resume", touches=0)
_FROZEN_FROM_START = Fault(freeze, "frozen", "start")
_RESTORED_OLD = Fault(restore_old, "harmful")
_ATTENTION_ZEROED = Fault(zero_attention, "harmful", part="attention")

DENSE_FAULTS: dict[str, Fault] = {
    "healthy": HEALTHY,
    "frozen_from_start": _FROZEN_FROM_START,
    "slow_002": Fault(scale_learning_rate(0.02), "harmful", "start"),
    "lr_low": Fault(scale_every_learning_rate(0.03), "run", "start", touches=0),
    "restored_old": _RESTORED_OLD,
    "swapped": Fault(swap, "harmful", touches=2),
    "shuffled_rows": Fault(shuffle_rows, "harmful", part="mlp"),
    "attention_zeroed": _ATTENTION_ZEROED,
    "dead_heads": Fault(kill_heads, "harmful", part="attention"),
    "norm_gain_zero": Fault(zero_norm_gain, "harmful", part="mlp"),
    "norm_gain_20": Fault(raise_norm_gain, "harmful", part="attention"),
    "residual_scale": Fault(scale_residual(4.0), "harmful"),
    "residual_small": Fault(scale_residual(0.1), "harmful"),
    "weight_decay_x1000": Fault(scale_weight_decay(1000.0), "harmful"),
    "flood_50": Fault(scale_learning_rate(50.0), "harmful", note="floods the residual stream"),
    "fast_30": Fault(scale_learning_rate(30.0), "harmful"),
    "frozen_mid": Fault(freeze, "frozen"),
    "reinitialised": Fault(reinitialise, "harmful"),
    "dead_mlp": Fault(kill_mlp, "harmful", part="mlp"),
    "optimizer_reset_block": Fault(reset_block_optimizer, "harmless"),
    "optimizer_lost": Fault(reset_optimizer, "harmless", "resume", touches=0),
    "other_order": Fault(change_order, "harmless", "resume", touches=0),
    "rounded_3bit": Fault(round_to_3_bits, "harmless"),
    "lr_high": Fault(scale_every_learning_rate(10.0), "run", "resume", touches=0),
}

LOW_BIT_FAULTS: dict[str, Fault] = {
    "healthy": HEALTHY,
    "frozen_from_start": _FROZEN_FROM_START,
    "restored_old": _RESTORED_OLD,
    "wrong_scale": Fault(scale_latents(3.0), "harmful"),
}

MIXTURE_FAULTS: dict[str, Fault] = {
    "healthy": HEALTHY,
    "frozen_from_start": _FROZEN_FROM_START,
    "attention_zeroed": _ATTENTION_ZEROED,
    "dead_expert": Fault(kill_expert, "harmful", part="mlp"),
}
