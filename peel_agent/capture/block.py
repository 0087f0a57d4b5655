"""One trained block that can be run, observed from inside, and run with other output projections."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peel_agent.records import Anatomy, Observation, Projection


def projection_of(module: nn.Module, layout: Literal["out_in", "in_out"]) -> Projection:
    """The module's weight as [in, out] and its bias."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return Projection(weight.T if layout == "out_in" else weight, bias)


class ResidentBlock:
    """See records.Block. All tensors are float32; nothing here records gradients."""

    def __init__(
        self,
        *,
        index: int,
        name: str,
        module: nn.Module,
        anatomy: Anatomy,
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        initialise: Callable[[nn.Module], None],
    ) -> None:
        self.index = index
        self.name = name
        self._module = module
        self._anatomy = anatomy
        self._arguments = arguments
        self._keywords = dict(keywords)
        self._initialise = initialise
        self.parameters: Mapping[str, Tensor] = dict(module.named_parameters())
        layout = anatomy.projection_layout
        self.attention_projection = projection_of(module.get_submodule(anatomy.attention_output), layout)
        self.mlp_projection = projection_of(module.get_submodule(anatomy.mlp_output), layout)

    @torch.no_grad()
    def run(self, h: Tensor, *, attention: Projection | None = None, mlp: Projection | None = None) -> Tensor:
        substitutes = self._stored(self._anatomy.attention_output, attention)
        substitutes |= self._stored(self._anatomy.mlp_output, mlp)
        return self.run_with(h, substitutes)

    def run_with(self, h: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        returned = functional_call(self._module, dict(parameters), (h, *self._arguments), self._keywords)
        output: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return output

    def initial_parameters(self) -> Mapping[str, Tensor]:
        fresh = copy.deepcopy(self._module)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.index)
            fresh.cpu().apply(self._initialise)
        return {name: tensor.to(self.parameters[name].device) for name, tensor in fresh.named_parameters()}

    def _stored(self, name: str, projection: Projection | None) -> dict[str, Tensor]:
        """A projection under the module's own parameter names and layout; empty for the trained one."""
        if projection is None:
            return {}
        transposed = self._anatomy.projection_layout == "out_in"
        state = {f"{name}.weight": projection.weight.T if transposed else projection.weight}
        if projection.bias is not None:
            state[f"{name}.bias"] = projection.bias
        return state

    @torch.no_grad()
    def observe(self, h: Tensor, *, attention: Projection | None = None) -> Observation:
        names = (self._anatomy.attention_output, self._anatomy.mlp_norm, self._anatomy.mlp_output)
        with self._inputs_of(*names) as inputs:
            output = self.run(h, attention=attention)
        return Observation(inputs[names[0]], inputs[names[1]], inputs[names[2]], output)

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
    def run_mlp_part(self, mid: Tensor) -> Tensor:
        norm = self._module.get_submodule(self._anatomy.mlp_norm)
        mlp = self._module.get_submodule(self._anatomy.mlp)
        output: Tensor = mid + mlp(norm(mid))
        return output
