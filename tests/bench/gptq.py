"""Rounding in the Gram metric against llm-compressor's GPTQ function, on one Gram matrix and one grid.

llm-compressor pins many packages, so it has an environment of its own; `peel_agent.precision` needs only torch. From
the root of the repository:

    python3.11 -m venv .gptq-env
    .gptq-env/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    PYTHONPATH=. .gptq-env/bin/python tests/bench/gptq.py

torchao's function is the same procedure, but torchao 0.18 refuses all devices but CUDA, and int4 without package mslk.

Both get the same float32 matrix and Gram matrix, are damped alike (0.01 of the mean diagonal) and lay grids over the
matrix before rounding. The grids differ by convention: theirs has scale absmax / 7.5 and codes -8..7, ours absmax / 7
and -7..7. Residuals are trace((W - Q) H (W - Q)'), H undamped; a ratio is ours over theirs. Two are held to the limit:

- `loop`: our column loop alone on their scales and codes: the procedure, with nothing else different;
- `on ours`: `round_in_gram` over their function with our scales (it may still use -8, one code more than ours).

The third, `on own`, is told only: `round_in_gram` over their function on their own grid of 16 codes to our 15.

Seconds are for float32 input: theirs without the making of scales, ours all of `round_in_gram`. Time on idle cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from torch import Tensor

from peel_agent.precision import rounding
from peel_agent.precision.quantise import Grid, in_units
from peel_agent.records import WeightSet

SHAPES, SETS = ((256, 512), (512, 256), (1024, 1024), (512, 2048)), ("int4-g128", "int4-channel")
LIMIT = 1.0 + 1e-3


def case(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] and the Gram matrix of correlated inputs with a few features far larger than the rest."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    heavy = torch.randn(columns, generator=random).exp()
    inputs = torch.randn(2 * columns, columns, generator=random) @ mixing * heavy
    return torch.randn(rows, columns, generator=random), inputs.T @ inputs


def settings(own: WeightSet) -> QuantizationArgs:
    """The same set in their words."""
    return QuantizationArgs(num_bits=own.bits, symmetric=True, strategy=own.unit, group_size=own.group or None)


def their_scale(matrix: Tensor, own: WeightSet) -> Tensor:
    """[out, units], as their observer of smallest and largest values makes it."""
    units = in_units(matrix, own)
    found: tuple[Tensor, Tensor] = calculate_qparams(units.amin(-1), units.amax(-1), settings(own))
    return found[0]


def theirs(matrix: Tensor, gram: Tensor, own: WeightSet, scale: Tensor) -> Tensor:
    """Their function, which works in place: the caller owns what it passes. No fallback to nearest rounding."""
    args = matrix[None], gram[None], scale[None], torch.zeros_like(scale)[None], None, settings(own)
    found: tuple[Tensor, Tensor, Tensor] = quantize_weight(*args)
    assert not found[2].any()
    return found[0][0]


def our_loop(matrix: Tensor, gram: Tensor, own: WeightSet, scale: Tensor) -> Tensor:
    """Our column loop on their grid."""
    wanted, metric = matrix.double(), gram.double().clone()
    metric.diagonal().add_(rounding.DAMPING * metric.diagonal().mean())
    units, most = scale.double()[..., None], 2 ** (own.bits - 1) - 1
    codes = rounding._compensated(wanted, metric, Grid(own, units, torch.zeros_like(units), -most - 1, most))
    return (units * in_units(codes, own)).flatten(1)


def residual(matrix: Tensor, rounded: Tensor, gram: Tensor) -> float:
    missing = matrix.double() - rounded.double()
    return float(((missing @ gram.double()) * missing).sum())


def residual_ratios(rows: int, columns: int, name: str, seed: int = 0) -> dict[str, float]:
    """Ours over theirs, by what is compared."""
    own = WeightSet.named(name)
    matrix, gram = case(rows, columns, seed)
    scales = {"own": their_scale(matrix, own), "ours": Grid.of(matrix, own).scale.squeeze(-1)}
    of_them = {key: residual(matrix, theirs(matrix.clone(), gram.clone(), own, scales[key]), gram) for key in scales}
    of_us = residual(matrix, rounding.round_in_gram(matrix, gram, own), gram)
    loop = residual(matrix, our_loop(matrix, gram, own, scales["own"]), gram)
    return {"loop": loop / of_them["own"], "on ours": of_us / of_them["ours"], "on own": of_us / of_them["own"]}


def seconds(width: int, repeats: int, device: str) -> tuple[float, float]:
    """(ours, theirs) for a square matrix and int4 groups of 128, each the best of some runs that take turns."""
    own = WeightSet.named("int4-g128")
    matrix, gram = (given.to(device) for given in case(width, width, 0))
    scale = their_scale(matrix, own)

    def timed(work: Callable[[Tensor, Tensor], Tensor]) -> float:
        given = matrix.clone(), gram.clone()
        synchronise(device)
        start = time.perf_counter()
        work(*given)
        synchronise(device)
        return time.perf_counter() - start

    ours, others = [], []
    for _ in range(repeats):
        ours.append(timed(lambda matrix, gram: rounding.round_in_gram(matrix, gram, own)))
        others.append(timed(lambda matrix, gram: theirs(matrix, gram, own, scale)))
    return min(ours), min(others)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def main() -> int:
    """0 when the residual ratios on one grid and the time ratio are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="of the timed square matrix; 0 leaves timing out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of the timing")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    worst = 0.0
    for name in SETS:
        for rows, columns in SHAPES:
            found = residual_ratios(rows, columns, name)
            worst = max(worst, found["loop"], found["on ours"])
            print(f"{name:13}{rows:5} x {columns:<5}", *(f"{key} {ratio:.4f} " for key, ratio in found.items()))
    print(f"largest residual ratio on one grid {worst:.4f} (limit {LIMIT})")
    if not chosen.width:
        return int(worst > LIMIT)
    ours, others = seconds(chosen.width, chosen.repeats, chosen.device)
    print(f"int4-g128, {chosen.width} x {chosen.width}: {ours:.2f} s / {others:.2f} s = {ours / others:.2f} (limit 1)")
    return int(worst > LIMIT or ours > others)


if __name__ == "__main__":
    raise SystemExit(main())
