"""Opens a fully connected network, and the samples it is measured on."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peel_agent.errors import CheckpointError, ProbeError
from peel_agent.load.probe import ProbeSizes
from peel_agent.records import Network, Part, Samples, Stack, Weights

SPLIT_SEED = 0
MIN_CONFIRM_SAMPLES = 32
"""Fewer give no usable bootstrap interval."""


def open_network(weights: Weights, family: str, stack: Stack) -> Network:
    """The layers in the order of the numbers in their names; CheckpointError for anything else in the checkpoint."""
    shapes = weights.shapes()
    names = sorted((name for name, shape in shapes.items() if _is_weight(name, shape, stack)), key=_natural)
    biases = [name.removesuffix(stack.weight) + stack.bias for name in names]
    with_bias = [name for name in biases if name in shapes]
    others = sorted(set(shapes) - set(names) - set(with_bias))
    if not names or others or len(with_bias) not in (0, len(names)):
        raise CheckpointError(
            f"no fully connected network: {len(names)} matrices, {len(with_bias)} biases, others: {others[:3]}",
            remedy="save each layer as `<number>.weight` [rows, columns] and, for all layers or none, `<number>.bias`",
        )
    dtype = str(weights.read(names[0]).dtype).removeprefix("torch.")
    return Network(
        family=family,
        weights=tuple(weights.read(name).double() for name in names),
        biases=tuple(weights.read(name).double() for name in with_bias) or None,
        precision=dtype,
    )


def _is_weight(name: str, shape: tuple[int, ...], stack: Stack) -> bool:
    return name.endswith(stack.weight) and len(shape) == 2


def _natural(name: str) -> list[int | str]:
    """Sorts `layer10` after `layer9`."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def load_samples(path: Path, sizes: ProbeSizes) -> Samples:
    """Samples from a safetensors file with `inputs` [N, n] and `targets` [N, m], split into fit, select and confirm.

    In the proportions of the sizes, at most so many; ProbeError names what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "give --probe a .safetensors file with `inputs` [samples, n] and `targets` [samples, m]"
    if path.suffix != ".safetensors" or not path.is_file():
        raise ProbeError(f"{path} holds no samples for a fully connected network", remedy=remedy)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {"inputs", "targets"} <= names:
                raise ProbeError(f"{path} has {', '.join(sorted(names)) or 'nothing'}", remedy=remedy)
            inputs, targets = (_floating(file.get_tensor(name)) for name in ("inputs", "targets"))
    except (SafetensorError, OSError) as error:
        raise ProbeError(f"{path} is not a whole safetensors file: {error}", remedy=remedy) from error
    if inputs.ndim != 2 or targets.ndim != 2 or len(inputs) != len(targets):
        raise ProbeError(f"`inputs` is {inputs.shape} and `targets` {targets.shape}", remedy=remedy)
    count = min(len(inputs), sizes.total)
    select, confirm = count * sizes.select // sizes.total, count * sizes.confirm // sizes.total
    if confirm < MIN_CONFIRM_SAMPLES:
        least = -(-MIN_CONFIRM_SAMPLES * sizes.total // sizes.confirm)
        raise ProbeError(
            f"{path} has {len(inputs)} samples, too few for an interval", remedy=f"at least {least} are needed"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(inputs))[:count]
    parts = np.split(order, [confirm, confirm + select])
    digest = hashlib.sha256(inputs[order].tobytes() + targets[order].tobytes()).hexdigest()[:16]
    of_confirm, of_select, of_fit = (Part(_columns(inputs[rows]), _columns(targets[rows])) for rows in parts)
    return Samples(of_fit, of_select, of_confirm, digest)


def _floating(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.floating]]:
    """The values in numpy, in float32 where it has not their dtype."""
    rows: np.ndarray[tuple[int, ...], np.dtype[np.floating]]
    rows = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return rows


def _columns(rows: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> Tensor:
    """[N, n] as float64 [n, N]."""
    return torch.from_numpy(np.ascontiguousarray(rows.T)).double()
