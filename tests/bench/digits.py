"""The fully connected experiment of arXiv 2605.02853's appendix in kind: loss against YES-0..YES-(K-1) over a training.

`python -m tests.bench.digits` trains a small ReLU network on scikit-learn's digits (64 inputs, one-hot targets), once
at full precision and once with one-bit weights (sign, straight-through), measures the bounds after some epochs, and
prints a table: loss and bounds in squared error a sample on `confirm`, no sample of which was trained on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from peel_agent.peel.fully_connected.feedforward import Net, Precision, one_bit
from peel_agent.peel.fully_connected.yes_bounds import YesBounds, measure_feedforward
from peel_agent.records import Part, Samples, YesMemory

FIT, SELECT = 1000, 297
BATCH = 100
EPOCHS = [0, 2, 5, 10, 15, 20, 30, 50, 100, 150, 200, 300]  # the zones are crossed early


@dataclass(frozen=True)
class Experiment:
    """One training, and the precisions of the references that its checkpoints are measured against."""

    name: str
    bits: bool
    learning_rate: float
    references: tuple[Precision, ...]


EXPERIMENTS = (
    Experiment("full precision", False, 1e-3, ("full",)),
    Experiment("one bit (sign, STE)", True, 1e-3, ("one_bit", "one_bit_refined")),
)


@dataclass
class Perceptron:
    """Latent weights and biases; with `bits`, the forward pass sees lambda * sign(W), the gradient passes to W."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    bits: bool

    @classmethod
    def initial(cls, widths: tuple[int, ...], *, bits: bool, biased: bool) -> Perceptron:
        layers = [nn.Linear(columns, rows) for columns, rows in itertools.pairwise(widths)]
        biases = [nn.Parameter(torch.zeros(layer.out_features)) for layer in layers] if biased else []
        return cls([layer.weight for layer in layers], biases, bits)

    def seen(self, weight: Tensor) -> Tensor:
        return weight + (one_bit(weight) - weight).detach() if self.bits else weight

    def forward(self, X: Tensor) -> Tensor:
        """X [n, N] to [m, N]."""
        for number, weight in enumerate(self.weights):
            X = self.seen(weight) @ X
            X = X + self.biases[number][:, None] if self.biases else X
            X = X.relu() if number + 1 < len(self.weights) else X
        return X

    def net(self) -> Net:
        """The network as it computes."""
        return Net.of([one_bit(own) if self.bits else own for own in self.weights], self.biases or None)


@dataclass
class Row:
    step: int
    training_loss: float
    found: dict[Precision, YesBounds] = field(default_factory=dict)


def digits() -> Samples:
    """1000 samples to train on and to fit references to, 297 to select by, 500 to confirm with."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    X = torch.from_numpy(data.data).T[:, order] / 16.0
    Y = nn.functional.one_hot(torch.from_numpy(data.target), 10).T[:, order].double()
    bounds = (0, FIT, FIT + SELECT, len(order))
    fit, select, confirm = (Part(X[:, start:stop], Y[:, start:stop]) for start, stop in itertools.pairwise(bounds))
    return Samples(fit, select, confirm, fingerprint="digits")


def run(experiment: Experiment, samples: Samples, widths: tuple[int, ...], *, at: list[int], biased: bool) -> list[Row]:
    """Trains by Adam on squared error, and measures when so many epochs are done, as `at` lists."""
    torch.manual_seed(0)
    model = Perceptron.initial(widths, bits=experiment.bits, biased=biased)
    optimiser = torch.optim.Adam([*model.weights, *model.biases], lr=experiment.learning_rate)
    X, Y = samples.fit.X.float(), samples.fit.Y.float()
    memories: dict[Precision, YesMemory | None] = {}
    rows = []
    for epoch in range(max(at) + 1):
        if epoch in at:
            own = ((model.forward(X) - Y) ** 2).sum(dim=0).mean()
            rows.append(Row(epoch * FIT // BATCH, float(own.detach())))
            for precision in experiment.references:
                found = measure_feedforward(model.net(), samples, precision=precision, earlier=memories.get(precision))
                memories[precision] = found.memory
                rows[-1].found[precision] = found
        for batch in torch.randperm(FIT).split(BATCH):
            optimiser.zero_grad()
            ((model.forward(X[:, batch]) - Y[:, batch]) ** 2).sum(dim=0).mean().backward()
            optimiser.step()
    return rows


def show(title: str, rows: list[Row], precision: Precision) -> None:
    labels = [value.label for value in rows[0].found[precision].values]
    print(f"\n{title}\n{'step':>6} {'trained':>9} {'loss':>9} " + " ".join(f"{label:>9}" for label in labels), end="")
    print("  zone         way-points of the last (* of an earlier checkpoint)")
    for row in rows:
        found = row.found[precision]
        values = " ".join(f"{value.value.value:>9.4f}" for value in found.values)
        last = found.values[-1]
        kind = "" if last.within_class else ", outside the network's class"
        print(
            f"{row.step:>6} {row.training_loss:>9.4f} {found.loss.value:>9.4f} {values}  {found.zone:<12}"
            f" {last.waypoints}{'*' if last.earlier else ''}{kind}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 32, 32], help="widths of the hidden layers")
    parser.add_argument("--at", type=int, nargs="+", default=EPOCHS, help="epochs after which the bounds are measured")
    parser.add_argument("--no-bias", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples, widths = digits(), (64, *options.hidden, 10)
    biased = not options.no_bias
    for experiment in EXPERIMENTS:
        start = time.perf_counter()
        rows = run(experiment, samples, widths, at=options.at, biased=biased)
        for precision in experiment.references:
            title = f"{'-'.join(map(str, widths))}{'' if biased else ' without biases'}, {experiment.name}"
            show(f"{title}; references: {precision}", rows, precision)
        print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
