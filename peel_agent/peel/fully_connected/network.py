"""A fully connected network peeled: what layers fitted in closed form reach (YES bounds), as findings (method.md 7)."""

from __future__ import annotations

from collections.abc import Callable

from peel_agent.peel.fully_connected.feedforward import Net, Precision
from peel_agent.peel.fully_connected.yes_bounds import measure_feedforward
from peel_agent.records import BoundReport, Findings, Network, Samples, Skipped, Timing, YesMemory

NO_BLOCKS = Skipped("margins, headroom and redundancy", "a fully connected network has no blocks")


def peel_network(
    network: Network, samples: Samples, clock: Callable[[], float], *, earlier: YesMemory | None = None
) -> tuple[Findings, int]:
    """The bounds YES-0 to YES-(K-1) of one checkpoint, and its number of parameters.

    References of a one-bit network have one bit too. A bound's map holds its way-points, 1-based hidden layers.
    """
    start = clock()
    net = Net.of(network.weights, network.biases)
    precision: Precision = "one_bit" if net.one_bit else "full"
    yes_bounds = measure_feedforward(net, samples, precision=precision, earlier=earlier)
    bounds = tuple(
        BoundReport(
            label=yes_value.label,
            map=yes_value.waypoints,
            solver=f"pseudo_inverse, {precision}",
            value=yes_value.value,
            best=yes_value.value.value,
            within_class=yes_value.within_class,
        )
        for yes_value in yes_bounds.values
    )
    findings = Findings(
        loss=yes_bounds.loss,
        bound=bounds[-1].value if bounds else None,
        gap=yes_bounds.gap,
        zone=yes_bounds.zone,
        bounds=bounds,
        layers=(),
        redundancy=None,
        memory=yes_bounds.memory,
        skipped=(*yes_bounds.skipped, NO_BLOCKS),
        timing=Timing(solve=clock() - start),
        bound_label=bounds[-1].label if bounds else None,
    )
    return findings, sum(layer.numel() for layer in net.layers)
