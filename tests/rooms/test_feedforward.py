"""Fully connected networks: the YES bounds beside their oracle, what may be claimed of them, and the refusals."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peel_agent.errors import CheckpointError, ConfigurationError
from peel_agent.peel.fully_connected.feedforward import MOST_SUBSETS, Net, Projection, construct, constructions, one_bit
from peel_agent.peel.fully_connected.yes_bounds import measure_feedforward, sample_losses, zone_of
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.records import Estimate, Part, Samples, YesMemory, codec
from tests.oracles import feedforward as oracle

PRECISIONS = ("full", "one_bit", "one_bit_refined")
WIDTHS = (5, 7, 6, 4, 3)


def a_net(seed: int, widths: tuple[int, ...] = WIDTHS, *, biased: bool = False, bits: bool = False) -> Net:
    """A random network; with `bits`, of one-bit weights."""
    torch.manual_seed(seed)
    shapes = list(itertools.pairwise(widths))
    weights = [torch.randn(rows, columns, dtype=torch.float64) / columns**0.5 for columns, rows in shapes]
    if bits:
        weights = [one_bit(weight) for weight in weights]
    biases = [0.3 * torch.randn(rows, dtype=torch.float64) for _, rows in shapes] if biased else None
    return Net.of(weights, biases)


def trained(seed: int, amount: float = 0.1, *, biased: bool = False) -> Net:
    """The teacher of `the_samples(seed)` off by `amount`: its hidden states are way-points worth having."""
    teacher = a_net(seed)
    weights = [layer + amount * torch.randn_like(layer) for layer in teacher.layers]
    return Net.of(weights, [0.1 * torch.randn(len(layer)).double() for layer in weights] if biased else None)


def the_samples(seed: int, widths: tuple[int, ...] = WIDTHS, counts: tuple[int, int, int] = (60, 15, 20)) -> Samples:
    """Signed inputs, and what the teacher `a_net(seed, widths)` makes of them, with a little noise."""
    teacher = a_net(seed, widths)
    inputs = [torch.randn(widths[0], count, dtype=torch.float64) for count in counts]
    outputs = [teacher.outputs(X)[-1] for X in inputs]
    parts = [Part(X, Y + 0.02 * torch.randn_like(Y)) for X, Y in zip(inputs, outputs, strict=True)]
    return Samples(parts[0], parts[1], parts[2], fingerprint=f"samples {seed}")


def plain(net: Net) -> oracle.Layers:
    """The network as the oracle takes it."""
    if not net.biased:
        return [(layer.numpy(), None) for layer in net.layers]
    return [(layer[:, :-1].numpy(), layer[:, -1].numpy()) for layer in net.layers]


def arrays(part: Part) -> tuple[Any, Any]:
    return part.X.numpy(), part.Y.numpy()


# ---------------------------------------------------------------- beside the oracle


@pytest.mark.parametrize("biased", [False, True])
def test_forward_pass_gives_every_hidden_state(biased: bool) -> None:
    """Hidden states carry the ReLU, the answer does not, and a bias is the last column."""
    net, X = a_net(1, biased=biased), the_samples(1).fit.X
    ours = net.outputs(X)
    for hidden, expected in zip(ours, oracle.forward(plain(net), X.numpy()), strict=True):
        np.testing.assert_allclose(hidden.numpy(), expected, atol=1e-12)
    assert [len(state) for state in ours] == list(net.widths[1:]) == list(WIDTHS[1:])
    assert min(float(state.min()) for state in ours[:-1]) == 0.0
    assert float(ours[-1].min()) < 0.0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_construction_agrees_with_the_oracle(precision: Any, biased: bool) -> None:
    """All 2^(K-1) subsets, solved as a tree, are the constructions that one solve after another gives, weights too."""
    net, samples = trained(2, biased=biased), the_samples(2)
    made = dict(constructions(net, samples.fit.X, samples.fit.Y, precision))
    assert set(made) == {waypoints for k in range(4) for waypoints in itertools.combinations((1, 2, 3), k)}
    for waypoints, construction in made.items():
        expected = oracle.construction(plain(net), *arrays(samples.fit), waypoints, precision)
        for (W, b), (W_o, b_o) in zip(plain(construction), expected, strict=True):
            np.testing.assert_allclose(W, W_o, atol=1e-9)
            assert (b is None) == (b_o is None) == (not biased)
            if b is not None and b_o is not None:
                np.testing.assert_allclose(b, b_o, atol=1e-9)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_agree_with_the_oracle(precision: Any, biased: bool) -> None:
    """Each YES-k has the oracle's winner on select, its loss on each confirm sample, and the interval of those."""
    winners = set()
    for seed in range(8):
        net, samples = trained(seed, biased=biased), the_samples(seed)
        bounds = measure_feedforward(net, samples, precision=precision)
        fit, select, confirm_part = map(arrays, (samples.fit, samples.select, samples.confirm))
        table = oracle.yes(plain(net), fit, select, confirm_part, precision)
        assert bounds.memory is not None
        assert [value.label for value in bounds.values] == ["yes-0", "yes-1", "yes-2", "yes-3"]
        for value, best, (waypoints, select, confirm) in zip(bounds.values, bounds.memory.best, table, strict=True):
            assert value.waypoints == waypoints
            assert best.select == pytest.approx(select)
            np.testing.assert_allclose(best.confirm, confirm, rtol=1e-7)
            ours = [value.value.value, value.value.low, value.value.high]
            expected = estimate(confirm)
            np.testing.assert_allclose(ours, [expected.value, expected.low, expected.high], rtol=1e-7)
            winners.add(value.waypoints)
    assert {len(waypoints) for waypoints in winners} == {
        0,
        1,
        2,
        3,
    }  # the cases are such that every size wins somewhere


def test_gap_is_paired_by_sample() -> None:
    """The gap is the mean of per-sample differences to YES-(K-1), and its interval is theirs, not the losses'."""
    net, samples = trained(6), the_samples(6)
    bounds = measure_feedforward(net, samples)
    losses = oracle.losses(plain(net), *arrays(samples.confirm))
    assert bounds.memory is not None
    assert bounds.gap is not None
    expected = estimate(losses - np.array(bounds.memory.best[-1].confirm))
    assert bounds.gap.value == pytest.approx(bounds.loss.value - bounds.values[-1].value.value)
    assert [bounds.gap.low, bounds.gap.high] == pytest.approx([expected.low, expected.high])


def test_a_published_value_can_be_replayed() -> None:
    """The winner's way-points, fitted again one layer after the other, give the published losses."""
    net, samples = trained(7, biased=True), the_samples(7)
    bounds = measure_feedforward(net, samples)
    for value in bounds.values:
        again, _ = construct(net, samples.fit.X, samples.fit.Y, value.waypoints)
        losses = sample_losses(again, samples.confirm.X, samples.confirm.Y)
        assert losses.mean() == pytest.approx(value.value.value)


# ---------------------------------------------------------------- projections


@pytest.mark.parametrize("case", ["tall", "wide", "dead unit", "constant input", "duplicate", "nothing"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_projection_survives_any_input(case: str, precision: Any) -> None:
    """Dead, constant and equal inputs, more rows than samples, all zeros: finite, and at full precision least-squares.

    The residual of a least-squares fit is orthogonal to the input; one bit stays one bit.
    """
    torch.manual_seed(0)
    Z = torch.rand(6, 4 if case == "wide" else 40, dtype=torch.float64)
    if case == "dead unit":
        Z[2] = 0.0
    elif case == "constant input":
        Z[2] = 1.0
    elif case == "duplicate":
        Z[2] = Z[1]
    elif case == "nothing":
        Z.zero_()
    target = torch.randn(3, Z.shape[1], dtype=torch.float64)
    for biased in (False, True):
        layer, output = Projection(Z, biased=biased, precision=precision).onto(target, hidden=False)
        assert bool(layer.isfinite().all())
        if precision == "full":
            assert float(((target - output) @ Z.T).abs().max()) < 1e-8
        else:
            assert Net((layer,), biased).one_bit


def test_a_direction_of_float32_rounding_is_not_divided_by() -> None:
    """Two inputs that differ by less than float32 resolves get the same weight, not two huge ones of opposite sign."""
    torch.manual_seed(0)
    Z = torch.rand(4, 50, dtype=torch.float64)
    Z[1] = Z[0] + 1e-9 * torch.randn(50, dtype=torch.float64)
    target = torch.randn(2, 50, dtype=torch.float64)
    layer, _ = Projection(Z, biased=False, precision="full").onto(target, hidden=False)
    assert float(layer.abs().max()) < 10.0
    assert float((layer[:, 0] - layer[:, 1]).abs().max()) < 1e-6


def test_one_bit_has_no_zero() -> None:
    """lambda is the mean magnitude; what has no sign of its own becomes +lambda."""
    quantised = one_bit(torch.tensor([[0.0, -3.0], [-1e-12, 5.0]], dtype=torch.float64))
    torch.testing.assert_close(quantised, torch.tensor([[2.0, -2.0], [2.0, 2.0]], dtype=torch.float64))


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_bias_beside_one_bit_weights_leaves_no_mean_error(seed: int) -> None:
    """The bias is solved anew beside the quantised weights: the mean of the linear residual is 0 for every output."""
    torch.manual_seed(seed)
    Z, target = torch.rand(4, 30, dtype=torch.float64), torch.randn(3, 30, dtype=torch.float64)
    _, output = Projection(Z, biased=True, precision="one_bit").onto(target, hidden=False)
    assert float((target - output).mean(dim=1).abs().max()) < 1e-10


# ---------------------------------------------------------------- what may be claimed


@given(st.integers(0, 10**6), st.sampled_from(PRECISIONS), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_value_never_rises_with_k_on_select(seed: int, precision: Any, biased: bool) -> None:
    """YES-k is the least over at most k way-points, so where it is picked it cannot rise with k."""
    memory = measure_feedforward(trained(seed, biased=biased), the_samples(seed), precision=precision).memory
    assert memory is not None
    selects = [best.select for best in memory.best]
    assert selects == sorted(selects, reverse=True)
    assert all(len(best.waypoints) <= k for k, best in enumerate(memory.best))


@given(st.integers(0, 10**6), st.lists(st.floats(0.01, 0.5), min_size=2, max_size=4), st.sampled_from(PRECISIONS))
@settings(max_examples=25, deadline=None)
def test_the_running_minimum_never_rises(seed: int, amounts: list[float], precision: Any) -> None:
    """Over checkpoints no YES-k rises on select, and each is the least of the checkpoints so far."""
    samples, memory, alone = the_samples(seed), None, []
    for amount in amounts:
        before = memory
        memory = measure_feedforward(trained(seed, amount), samples, precision=precision, earlier=before).memory
        alone_memory = measure_feedforward(trained(seed, amount), samples, precision=precision).memory
        assert memory is not None
        assert alone_memory is not None
        alone.append([best.select for best in alone_memory.best])
        if before is not None:
            assert all(now.select <= then.select for now, then in zip(memory.best, before.best, strict=True))
    assert memory is not None
    np.testing.assert_array_equal([best.select for best in memory.best], np.min(alone, axis=0))


def test_yes_0_is_constant_over_training() -> None:
    """YES-0 asks nothing of the trained weights: other weights, the same value; YES-1 moves."""
    samples = the_samples(3)
    one, other = (measure_feedforward(trained(3, amount), samples).values for amount in (0.03, 0.1))
    assert one[0] == other[0]
    assert one[1].value != other[1].value


def layer_errors(X: torch.Tensor, Y: torch.Tensor, depth: int, precision: Any = "full", biased: bool = False) -> Any:
    """||Y_(k+1) - Y||^2 on fit for each layer of YES-0; the last one is linear."""
    any_net = a_net(0, (len(X), *(len(Y),) * depth), biased=biased)
    _, states = construct(any_net, X, Y, (), precision)
    return np.array([float(((state - Y) ** 2).sum()) for state in states])


@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(2, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_error_of_yes_0_falls_from_layer_to_layer(seed: int, inputs: int, depth: int, biased: bool) -> None:
    """For Y >= 0, unquantised: identity is open to each layer of YES-0's equal widths, and the ReLU only helps.

    With an input as wide as Y, the first layer is no worse than the input itself.
    """
    torch.manual_seed(seed)
    X = torch.randn(inputs, 25, dtype=torch.float64)
    Y = torch.randn(4, 25, dtype=torch.float64).relu()
    errors = layer_errors(X, Y, depth, biased=biased)
    assert (np.diff(errors) <= 1e-9 * errors[0]).all()
    assert inputs != len(Y) or errors[0] <= float(((X - Y) ** 2).sum())


def test_the_error_of_yes_0_may_rise_for_signed_targets() -> None:
    """Needed: Y >= 0. A linear layer is exact for Y = X; one ReLU loses the negative half, and nothing mends it."""
    X = torch.tensor([[1.0, -1.0, 2.0, -2.0]], dtype=torch.float64)
    errors = layer_errors(X, X, depth=3)
    assert layer_errors(X, X, depth=1)[0] == pytest.approx(0.0)
    assert errors[0] == pytest.approx(5.0)
    assert errors[-1] > 2.0


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_the_error_of_yes_0_may_rise_at_one_bit(precision: Any) -> None:
    """Needed: unquantised. Identity is no one-bit matrix: with Y >= 0 and equal widths, layers often add error."""
    rises = 0
    for seed in range(200):
        torch.manual_seed(seed)
        X, Y = (torch.randn(4, 25, dtype=torch.float64).relu() for _ in range(2))
        rises += bool((np.diff(layer_errors(X, Y, 4, precision)) > 1e-6).any())
    assert rises > 20


def test_the_error_of_yes_0_may_rise_at_a_bottleneck() -> None:
    """Needed: equal widths. With a hidden layer narrower than Y, identity is not open to the next one.

    YES-0's own hidden layers are all as wide as Y; way-points are where narrower layers come from.
    """
    torch.manual_seed(0)
    X = torch.rand(4, 25, dtype=torch.float64)
    net = a_net(0, (4, 4, 1, 4))
    _, states = construct(net, X, X, (1, 2))
    before = X - construct(net, X, X, ())[1][0]
    assert float((before**2).sum()) == pytest.approx(0.0)
    assert float(((states[-1] - X) ** 2).sum()) > 1.0


def test_the_published_value_may_rise_with_k() -> None:
    """Picked on select and published on confirm: falling with k is claimed on select only."""
    rises = 0
    for seed in range(40):
        values = [value.value.value for value in measure_feedforward(trained(seed), the_samples(seed)).values]
        rises += values != sorted(values, reverse=True)
    assert rises > 0


# ---------------------------------------------------------------- zones


def limits(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("beyond_first", "beyond_last", "zone"),
    [
        ((0.1, 0.3), (0.4, 0.6), "ineffective"),
        ((0.1, 0.3), (-0.3, -0.1), "ineffective"),
        ((-0.1, 0.3), (0.2, 0.6), "undecided"),
        ((-0.1, 0.3), (-0.1, 0.3), "undecided"),
        ((-0.1, 0.1), (-0.3, -0.1), "undecided"),
        ((-0.3, -0.1), (0.1, 0.3), "caution"),
        ((-0.3, -0.1), (-0.1, 0.1), "undecided"),
        ((-0.3, -0.1), (-0.2, -0.1), "effective"),
        ((0.0, 0.0), (0.0, 0.0), "undecided"),
        ((-0.1, 0.0), (0.1, 0.2), "undecided"),
        ((-0.3, -0.1), (-0.1, 0.0), "undecided"),
    ],
)
def test_zone(beyond_first: tuple[float, float], beyond_last: tuple[float, float], zone: str) -> None:
    """Red above YES-0, green below YES-(K-1), yellow between; an interval that holds 0 decides nothing."""
    assert zone_of(limits(*beyond_first), limits(*beyond_last)) == zone


def test_zones_of_three_networks() -> None:
    """A network of noise is red, the one that made the data green, one with its loss between YES-3 and YES-0 yellow.

    Scaling the last layer moves the loss and no way-point.
    """
    samples = the_samples(4, counts=(200, 100, 400))
    assert measure_feedforward(a_net(5), samples).zone == "ineffective"

    teacher = a_net(4)
    bounds = measure_feedforward(teacher, samples)
    assert bounds.zone == "effective"
    between = (bounds.values[0].value.value + bounds.values[-1].value.value) / 2
    scale = 1.0 + (between / float((samples.confirm.Y**2).sum(dim=0).mean())) ** 0.5
    blurred = measure_feedforward(Net((*teacher.layers[:-1], scale * teacher.layers[-1]), biased=False), samples)
    assert blurred.values == bounds.values
    assert blurred.loss.value == pytest.approx(between, rel=0.1)
    assert blurred.zone == "caution"


# ---------------------------------------------------------------- the memory, and the class


def test_memory_survives_json() -> None:
    """What the ledger writes comes back equal."""
    memory = measure_feedforward(trained(1), the_samples(1)).memory
    assert memory is not None
    assert any(best.waypoints for best in memory.best)
    assert codec.restored(YesMemory, json.loads(json.dumps(codec.plain(memory)))) == memory


@pytest.mark.parametrize("other", ["samples", "widths", "bias", "precision"])
def test_a_memory_of_something_else_does_not_count(other: str) -> None:
    """Other samples, another network, biases or precision: the minimum begins anew."""
    samples = the_samples(1)
    earlier = measure_feedforward(
        a_net(1, (5, 7, 6, 3) if other == "widths" else WIDTHS, biased=other == "bias"),
        replace(samples, fingerprint="others") if other == "samples" else samples,
        precision="one_bit" if other == "precision" else "full",
    ).memory
    assert earlier is not None
    unbeatable = replace(earlier, best=tuple(replace(best, select=-1.0) for best in earlier.best))
    net = a_net(2)
    assert measure_feedforward(net, samples, earlier=unbeatable) == measure_feedforward(net, samples)


def test_an_earlier_better_construction_stands() -> None:
    """It is published with its own losses and said to be earlier; the gap is measured against it."""
    samples = the_samples(1)
    alone = measure_feedforward(trained(1), samples)
    assert alone.memory is not None
    better = tuple(
        replace(best, select=best.select / 2, confirm=tuple(loss / 2 for loss in best.confirm))
        for best in alone.memory.best
    )
    after = measure_feedforward(trained(1), samples, earlier=replace(alone.memory, best=better))
    assert [value.earlier for value in alone.values] == [False] * 4
    assert [value.earlier for value in after.values] == [True] * 4
    assert after.values[3].value.value == pytest.approx(alone.values[3].value.value / 2)
    assert after.gap is not None
    assert after.gap.value == pytest.approx(after.loss.value - alone.values[3].value.value / 2)


@pytest.mark.parametrize(
    ("bits", "precision", "widths", "within"),
    [
        (False, "full", (3, 4, 4, 3), True),
        (False, "full", (3, 2, 4, 3), False),
        (False, "one_bit", (3, 4, 4, 3), True),
        (True, "full", (3, 3, 3, 3), False),
        (True, "one_bit", (3, 3, 3, 3), True),
        (True, "one_bit", (3, 5, 7, 3), True),
        (True, "one_bit", (3, 5, 4, 3), False),
        (True, "one_bit", (3, 1, 3, 3), False),
    ],
)
def test_whether_yes_0_is_a_point_of_the_network_s_class(
    bits: bool, precision: Any, widths: tuple[int, ...], within: bool
) -> None:
    """Narrower layers can be padded, at one bit by pairs of units only; wider or full-precision ones are outside."""
    bounds = measure_feedforward(a_net(1, widths, bits=bits), the_samples(1, widths), precision=precision)
    assert bounds.values[0].within_class is within


def test_pairs_of_units_pad_a_one_bit_network() -> None:
    """Why an even difference is within the class: two copies of a unit, +lambda and -lambda after them, do nothing."""
    narrow = a_net(1, (3, 2, 3), bits=True)
    first, last = narrow.layers
    scale = float(last.abs().max())
    after = torch.tensor([[scale, -scale]], dtype=torch.float64).expand(3, 2)
    wide = Net((torch.cat([first, first[:1], first[:1]]), torch.cat([last, after], dim=1)), biased=False)
    assert wide.one_bit
    assert wide.widths == (3, 4, 3)
    X = the_samples(1, (3, 3)).fit.X
    torch.testing.assert_close(wide.outputs(X)[-1], narrow.outputs(X)[-1])


# ---------------------------------------------------------------- refusals


def test_too_many_way_points_are_refused_with_the_count() -> None:
    """The subsets double with every layer: 13 layers are measured, 14 are refused, before anything is solved."""
    X, Y = torch.rand(2, 8), torch.rand(2, 8)
    assert next(constructions(a_net(1, (2,) * 14), X, Y))[0] == ()
    with pytest.raises(ConfigurationError, match=r"14 layers has 8,192(.|\n)*its last 13 layers"):
        next(constructions(a_net(1, (2,) * 15), X, Y))
    assert MOST_SUBSETS == 2**12


def test_too_few_fit_samples_decide_nothing() -> None:
    """The loss is measured, the bounds are skipped with the number that would be enough, the memory goes on."""
    samples = the_samples(1, counts=(15, 15, 20))
    memory = YesMemory("p", "n", ())
    bounds = measure_feedforward(a_net(1, biased=True), samples, earlier=memory)
    assert (bounds.values, bounds.gap, bounds.zone, bounds.memory) == ((), None, "undecided", memory)
    assert bounds.skipped[0].why == "15 fit samples; a fit of 8 columns needs 16"
    assert measure_feedforward(a_net(1), samples).skipped == ()


def test_a_diverged_network_is_refused() -> None:
    """As for a transformer whose loss is NaN."""
    net = a_net(1)
    net.layers[1][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not a finite number"):
        measure_feedforward(net, the_samples(1))


@pytest.mark.parametrize("part", ["fit", "select", "confirm"])
@pytest.mark.parametrize("fault", ["rows", "transposed", "empty", "nan", "unequal"])
def test_samples_that_do_not_fit_are_refused(part: str, fault: str) -> None:
    """The message names the part."""
    samples = the_samples(1)
    X, Y = getattr(samples, part).X.clone(), getattr(samples, part).Y
    if fault == "nan":
        X[0, 0] = torch.nan
    bad = {
        "rows": Part(X[1:], Y),
        "transposed": Part(X.T, Y.T),
        "empty": Part(X[:, :0], Y[:, :0]),
        "nan": Part(X, Y),
        "unequal": Part(X, Y[:, 1:]),
    }[fault]
    with pytest.raises(ConfigurationError, match=f"`{part}` h"):
        measure_feedforward(a_net(1), replace(samples, **{part: bad}))


@pytest.mark.parametrize(
    ("weights", "biases", "what"),
    [
        ([], None, "without layers"),
        ([torch.zeros(4, 3), torch.zeros(2, 5)], None, "4x3 -> 2x5 do not fit"),
        ([torch.zeros(4)], None, "shapes 4 do not fit"),
        ([torch.zeros(4, 3)], [], "biases of shapes"),
        ([torch.zeros(4, 3)], [torch.zeros(3)], "biases of shapes"),
    ],
)
def test_layers_that_do_not_fit_are_refused(weights: Any, biases: Any, what: str) -> None:
    """The message gives the shapes."""
    with pytest.raises(ConfigurationError, match=what):
        Net.of(weights, biases)


@pytest.mark.parametrize("waypoints", [(0,), (4,), (2, 1), (1, 1)])
def test_way_points_that_are_none_are_refused(waypoints: tuple[int, ...]) -> None:
    """Only hidden layers, in order, once."""
    samples = the_samples(1)
    with pytest.raises(ConfigurationError, match="way-points"):
        construct(a_net(1), samples.fit.X, samples.fit.Y, waypoints)


def test_one_linear_layer_has_yes_0_only() -> None:
    """Without hidden layers there is nothing between red and green: YES-0 is the least-squares solution."""
    bounds = measure_feedforward(a_net(1, (5, 3)), the_samples(1, (5, 3)))
    assert [value.label for value in bounds.values] == ["yes-0"]
    assert bounds.zone in {"ineffective", "effective", "undecided"}


def test_nothing_of_the_inputs_is_changed_or_random() -> None:
    """Two calls agree, float32 samples are taken, the global random state and the inputs stay as they were."""
    net, samples = a_net(1), the_samples(1)
    single = replace(samples, fit=Part(samples.fit.X.float(), samples.fit.Y.float()))
    kept, state = single.fit.X.clone(), torch.get_rng_state()
    assert measure_feedforward(net, single) == measure_feedforward(net, single)
    assert torch.equal(single.fit.X, kept)
    assert torch.equal(torch.get_rng_state(), state)
