"""The child process of `doctor` and `init` that imports torch: one request in JSON on stdin, the answer on stdout.

It opens a checkpoint and a probe as the worker does, and computes nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from peel_agent import registry
from peel_agent.errors import PeelError
from peel_agent.probing import probe_for, probe_path, probe_sizes
from peel_agent.records import CheckpointRef, ModelSettings, ProbeSettings, Stack, Weights, restored
from peel_agent.worker import be_ended_first, end_with_parent, give_way, quiet_libraries

NICENESS = 10
"""A training on this machine stays first."""


def main() -> int:
    """Answers one request."""
    end_with_parent()
    be_ended_first()
    give_way(NICENESS)
    answer = answered(json.loads(sys.stdin.read()))
    sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")
    return 0


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request of `found`. An expected error is one too; anything else is raised."""
    with quiet_libraries():
        answer = _libraries()
        try:
            if request["ref"] is not None and "broken" not in answer:
                answer |= _opened(request)
        except PeelError as error:
            answer["fault"] = {"what": error.what, "remedy": error.remedy}
    return answer


def _libraries() -> dict[str, Any]:
    """Imports what a worker imports; whatever that raises is told."""
    try:
        import torch
        import transformers
    except Exception as error:  # a library that is not found, a driver, another build of numpy
        remedy = "install peel-agent's dependencies anew into an environment of its own"
        return {"libraries": "", "broken": {"what": f"{type(error).__name__}: {error}", "remedy": remedy}}
    return {"libraries": f"torch {torch.__version__}, transformers {transformers.__version__}"}


def _opened(request: dict[str, Any]) -> dict[str, Any]:
    """The model, and the probe for it; a fault of the probe is told beside the model."""
    ref = restored(CheckpointRef, request["ref"])
    probe = restored(ProbeSettings, request["probe"])
    model = restored(ModelSettings, request["model"])
    (form,) = registry.formats(ref.format)
    weights = form.open(ref.in_place())
    stack = _stack_of(weights.config()) if model.factory is None else None
    if stack is not None:
        return _network(weights, *stack, probe)
    return _decoder(ref, weights, model, probe, quick=request["quick"])


def _stack_of(config: Any) -> tuple[str, Stack] | None:
    family = registry.family(str(config.get("model_type", "(none)")))
    anatomy = family.anatomy(config)
    return (family.name, anatomy) if isinstance(anatomy, Stack) else None


def _decoder(
    ref: CheckpointRef, weights: Weights, model: ModelSettings, probe: ProbeSettings, *, quick: bool
) -> dict[str, Any]:
    from peel_agent.load import open_snapshot

    (form,) = registry.formats(ref.format)
    snapshot = open_snapshot(
        ref.in_place(), form, registry.family, sets=model.precision, factory=model.factory, stored=weights
    )
    blocks = snapshot.model.get_submodule(snapshot.anatomy.blocks)
    model_facts = {
        "family": snapshot.family,
        "blocks": len(list(blocks.children())),
        "width": snapshot.width,
        "vocabulary": snapshot.vocabulary,
        "context": snapshot.context,
        "parameters": snapshot.parameters,
        "precision": snapshot.precision,
    }
    if probe.path is None:
        return {"model": model_facts}
    try:
        tokens = probe_for(snapshot, probe, quick=quick)
    except PeelError as error:
        return {"model": model_facts, "probe_fault": {"what": error.what, "remedy": error.remedy}}
    return {
        "model": model_facts,
        "probe": f"{tokens.fit.size:,} tokens to fit, {tokens.select.size:,} to select, {tokens.confirm.size:,} to "
        f"confirm, in sequences of {tokens.sequence_length:,}",
    }


def _network(weights: Weights, family: str, stack: Stack, probe: ProbeSettings) -> dict[str, Any]:
    from peel_agent.load import load_samples, open_network

    network = open_network(weights, family, stack)
    model_facts = {
        "family": family,
        "blocks": len(network.weights),
        "width": int(network.weights[0].shape[1]),
        "vocabulary": None,
        "context": None,
        "parameters": sum(tensor.numel() for tensor in (*network.weights, *(network.biases or ()))),
        "precision": network.precision,
    }
    if probe.path is None:
        return {"model": model_facts}
    try:
        samples = load_samples(probe_path(probe), probe_sizes(probe))
    except PeelError as error:
        return {"model": model_facts, "probe_fault": {"what": error.what, "remedy": error.remedy}}
    counts = (part.X.shape[1] for part in (samples.fit, samples.select, samples.confirm))
    return {"model": model_facts, "probe": "samples to fit, select and confirm: {}, {}, {}".format(*counts)}


if __name__ == "__main__":
    sys.exit(main())
