"""Plug-ins: found by name, loaded when asked for, and broken ones told apart."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from peel_agent import registry
from peel_agent.errors import PluginError, UnknownFamily


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that is installed and does not import, beside the real ones."""
    real = registry.entry_points

    def with_broken(*, group: str) -> Any:
        kind = group.removeprefix("peel_agent.")
        return [*real(group=group), EntryPoint("broken", "no_such_module:PLUGIN", group)] if kind != "sinks" else []

    monkeypatch.setattr(registry, "entry_points", with_broken)


def test_unnamed_and_broken_is_left_alone(broken: None) -> None:
    """With `auto`, formats that load are used, and families are found, though one does not load."""
    names = {form.name for form in registry.formats()}
    assert names == {"transformers", "safetensors", "torch", "dcp", "deepspeed", "megatron", "declined"}
    assert registry.family("llama").name == "llama"


def test_what_is_broken_can_be_told(broken: None) -> None:
    """The daemon says at its start which formats it does without."""
    (problem,) = registry.problems("formats")
    assert "`broken`" in problem
    assert "ModuleNotFoundError" in problem


def test_named_and_broken_is_an_error(broken: None) -> None:
    """The message names plug-in, place and cause."""
    with pytest.raises(PluginError, match=r"`broken` of kind formats \(no_such_module:PLUGIN\).*ModuleNotFoundError"):
        registry.formats("broken")


def test_unknown_names(broken: None) -> None:
    """A name that is not installed gets the nearest one, an architecture that is not covered the list."""
    with pytest.raises(PluginError, match=r"(.|\n)*did you mean `mlflow`"):
        registry.tracker("mlfow")
    with pytest.raises(
        UnknownFamily,
        match=r"`mamba`(.|\n)*gpt2, gpt_neox, llama, mistral, mixtral, mlp, olmo2, olmoe, opt, phi3, qwen2, qwen2_moe",
    ):
        registry.family("mamba")


def test_listing(broken: None) -> None:
    """Every plug-in is listed with where it comes from, the broken one with the reason."""
    listings = {(one.kind, one.name): one for one in registry.listings()}
    assert listings["trackers", "jsonl"].problem is None
    assert "peel-agent" in listings["trackers", "jsonl"].source
    assert "no_such_module" in str(listings["formats", "broken"].problem)
