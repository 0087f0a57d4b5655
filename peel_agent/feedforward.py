"""One checkpoint of a fully connected network -> PeelReport: YES bounds (method.md 7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from peel_agent import registry
from peel_agent.probing import probe_path, probe_sizes
from peel_agent.records import (
    CheckpointInfo,
    CheckpointRef,
    Memory,
    ModelInfo,
    Peeled,
    PeelReport,
    ProbeInfo,
    ProbeSettings,
    Stack,
    Weights,
    YesMemory,
)


def network_of(weights: Weights) -> tuple[str, Stack] | None:
    """The family and the layers of a fully connected network; None for a decoder."""
    config = weights.config()
    family = registry.family(str(config.get("model_type", "(none)")))
    anatomy = family.anatomy(config)
    return (family.name, anatomy) if isinstance(anatomy, Stack) else None


def measure_network(
    ref: CheckpointRef,
    weights: Weights,
    *,
    family: str,
    stack: Stack,
    probe: ProbeSettings,
    clock: Callable[[], float],
    earlier: Memory | None,
) -> Peeled:
    """A fully connected network: YES bounds, in squared error a sample."""
    from peel_agent.load import load_samples, open_network
    from peel_agent.peel import peel_network

    start = clock()
    network = open_network(weights, family, stack)
    samples = load_samples(probe_path(probe), probe_sizes(probe))
    loaded = clock()
    known = earlier if isinstance(earlier, YesMemory) else None
    findings, parameters = peel_network(network, samples, clock, earlier=known)
    fit, select, confirm = (part.X.shape[1] for part in (samples.fit, samples.select, samples.confirm))
    report = PeelReport(
        checkpoint=CheckpointInfo(ref.label, ref.step, ref.format, ref.fingerprint),
        model=ModelInfo(family, len(network.weights), parameters, network.precision),
        probe=ProbeInfo(samples.fingerprint, fit, select, confirm, 1),
        loss=findings.loss,
        bound=findings.bound,
        gap=findings.gap,
        zone=findings.zone,
        bounds=findings.bounds,
        layers=(),
        bound_label=findings.bound_label,
        skipped=findings.skipped,
        timing=dataclasses.replace(findings.timing, load=loaded - start),
    )
    return Peeled(report, findings.memory)
