"""One trained block that can be run, observed from inside, and run with other output projections."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peel_agent.precision import Quantisers
from peel_agent.records import Anatomy, Features, Gradient, Observation, PartName, Projection, WeightSet

Handed = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What the model hands to a block beside the stream: positions, masks; by position and by name."""


class ResidentBlock:
    """See records.Block. All tensors are float32; gradients are recorded by `run_with` and `backward` only.

    `handed` gives what the model hands to this block for sequences of a length.

    The module stays on the meta device and is called with the block's own tensors, so that a block's weights take
    memory exactly as long as somebody holds the block.
    """

    def __init__(
        self,
        *,
        index: int,
        name: str,
        module: nn.Module,
        stored: Mapping[str, Tensor],
        quantisers: Quantisers,
        anatomy: Anatomy,
        handed: Callable[[int], Handed],
        initialise: Callable[[nn.Module], None],
    ) -> None:
        self.index = index
        self.name = name
        self._module = module
        self._anatomy = anatomy
        self._handed = handed
        self._initialise = initialise
        self._quantisers = quantisers
        sets = {key: quantisers.of(f"{name}.{key}", weight) for key, weight in stored.items()}
        self.sets: Mapping[str, WeightSet] = {
            key: weight_set for key, weight_set in sets.items() if weight_set.restricts
        }
        self.latents: Mapping[str, Tensor] = {key: stored[key] for key in self.sets}
        self.parameters: Mapping[str, Tensor] = {
            key: quantisers.effective(weight, sets[key]) for key, weight in stored.items()
        }
        self.has_parts = bool(anatomy.mlp_path)
        self.part_names: Mapping[PartName, tuple[str, ...]] = _part_names(stored, anatomy.mlp_path)
        self.has_projections = anatomy.attention_output is not None and anatomy.mlp_output is not None
        if anatomy.attention_output is not None:
            self.attention_projection = self._projection(anatomy.attention_output)
            self.attention_set = sets[f"{anatomy.attention_output}.weight"]
        if anatomy.mlp_output is not None:
            self.mlp_projection = self._projection(anatomy.mlp_output)
            self.mlp_set = sets[f"{anatomy.mlp_output}.weight"]

    def _projection(self, name: str) -> Projection:
        weight = self.parameters[f"{name}.weight"]
        as_linear = self._anatomy.projection_layout == "out_in"
        return Projection(weight.T if as_linear else weight, self.parameters.get(f"{name}.bias"))

    @torch.no_grad()
    def run(self, h: Tensor, *, attention: Projection | None = None, mlp: Projection | None = None) -> Tensor:
        return self._call(h, self.stored(attention=attention, mlp=mlp))

    def stored(self, *, attention: Projection | None = None, mlp: Projection | None = None) -> dict[str, Tensor]:
        return self._named(self._anatomy.attention_output, attention) | self._named(self._anatomy.mlp_output, mlp)

    def run_with(self, h: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return self._call(h, {key: self._straight_through(key, weight) for key, weight in parameters.items()})

    @torch.no_grad()
    def run_as(self, h: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return self._call(h, parameters)

    def _straight_through(self, key: str, latents: Tensor) -> Tensor:
        if key not in self.sets:
            return latents
        return latents + (self._quantisers.effective(latents, self.sets[key]) - latents).detach()

    def backward(self, h: Tensor, gradient: Tensor) -> Gradient:
        attention, mlp = self._outputs()
        with torch.enable_grad(), self._inputs_of(attention, self._anatomy.mlp_path[0], mlp) as inputs:
            h = h.detach().requires_grad_()
            output = self._call(h, {})
            mid, entering = torch.autograd.grad(output, (inputs[self._anatomy.mlp_path[0]], h), gradient)
        return Gradient(_like(inputs[attention].detach(), h), _like(inputs[mlp].detach(), h), _like(mid, h), entering)

    def _outputs(self) -> tuple[str, str]:
        """The names of the two output projections, which only some architectures have."""
        attention, mlp = self._anatomy.attention_output, self._anatomy.mlp_output
        assert attention is not None
        assert mlp is not None
        return attention, mlp

    def _call(self, h: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        state = {**self.parameters, **parameters}
        arguments, keywords = self._handed(h.shape[1])
        returned = functional_call(self._module, state, (h, *arguments), dict(keywords))
        output: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return output

    def initial_parameters(self) -> Mapping[str, Tensor]:
        fresh = copy.deepcopy(self._module).to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.index)
            fresh.apply(self._initialise)
        return {name: tensor.to(self.parameters[name].device) for name, tensor in fresh.named_parameters()}

    def _named(self, name: str | None, projection: Projection | None) -> dict[str, Tensor]:
        """A projection under the module's own parameter names and layout; empty for the trained one."""
        if projection is None or name is None:
            return {}
        transposed = self._anatomy.projection_layout == "out_in"
        state = {f"{name}.weight": projection.weight.T if transposed else projection.weight}
        if projection.bias is not None:
            state[f"{name}.bias"] = projection.bias
        return state

    @torch.no_grad()
    def observe(self, h: Tensor) -> Observation:
        if not self.has_parts:
            return Observation(h, self.run(h))
        entry = self._anatomy.mlp_path[0]
        with self._inputs_of(entry) as inputs:
            output = self.run(h)
        return Observation(_like(inputs[entry], h), output)

    @torch.no_grad()
    def features(self, h: Tensor) -> Features:
        attention, mlp = self._outputs()
        entry = self._anatomy.mlp_path[0]
        with self._inputs_of(attention, entry, mlp) as inputs:
            output = self.run(h)
        return Features(_like(inputs[attention], h), _like(inputs[entry], h), _like(inputs[mlp], h), output)

    @contextmanager
    def _inputs_of(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """While open, keeps the input of each named submodule."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                inputs[name] = args[0]

            return hook

        handles = [self._module.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
        try:
            yield inputs
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run_mlp_part(self, mid: Tensor, *, mlp: Projection | None = None) -> Tensor:
        added = mid
        for name in self._anatomy.mlp_path:
            added = self._part(name, added, mlp)
        return mid + added

    @torch.no_grad()
    def observe_mlp_part(self, mid: Tensor) -> tuple[Tensor, Tensor]:
        _, name = self._outputs()
        with self._inputs_of(name) as inputs:
            output = self.run_mlp_part(mid)
        return inputs[name], output

    def _part(self, name: str, x: Tensor, mlp: Projection | None) -> Tensor:
        """A submodule called with the block's tensors, its output projection replaced when one is given."""
        state = {**self.parameters, **self._named(self._anatomy.mlp_output, mlp)}
        inner = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        returned = functional_call(self._module.get_submodule(name), inner, (x,))
        output: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return output


def _part_names(names: Iterable[str], mlp_path: tuple[str, ...]) -> dict[PartName, tuple[str, ...]]:
    """The weights of the two parts: those of the modules on the MLP's path, and all others."""
    if not mlp_path:
        return {}
    inside = tuple(name for name in names if name.startswith(tuple(f"{module}." for module in mlp_path)))
    return {"attention": tuple(name for name in names if name not in inside), "mlp": inside}


def _like(inner: Tensor, h: Tensor) -> Tensor:
    """[B, S, .] again, where an architecture runs its MLP on [B * S, .]."""
    return inner.reshape(*h.shape[:2], -1)
