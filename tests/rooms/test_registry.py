"""Plug-ins: found by name, loaded when asked for, and broken ones told apart."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from peel_agent import registry
from peel_agent.errors import PluginError, UnknownFamily
from peel_agent.spi import KINDS


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that is installed and does not import, beside the real ones."""
    real = registry.entry_points

    def with_broken(*, group: str) -> Any:
        return [*real(group=group), EntryPoint("broken", "no_such_module:PLUGIN", group)]

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


BY_NAME: dict[str, tuple[Callable[[str], Any], str]] = {
    "formats": (lambda name: registry.formats(name)[0], "safetensors"),
    "trackers": (registry.tracker, "mlflow"),
    "sinks": (registry.sink, "stderr"),
    "engines": (registry.engine, "local"),
}


def test_every_kind_can_be_asked_for() -> None:
    """What is asked for by name, and families, which are asked for by architecture, are all there is."""
    assert {*BY_NAME, "families"} == set(KINDS)


@pytest.mark.parametrize("kind", BY_NAME)
def test_by_name(broken: None, kind: str) -> None:
    """A name that is installed is that plug-in; a broken one is an error that names plug-in, place and cause."""
    ask, name = BY_NAME[kind]
    assert ask(name).name == name
    words = rf"`broken` of kind {kind} \(no_such_module:PLUGIN\).*ModuleNotFoundError"
    with pytest.raises(PluginError, match=words) as caught:
        ask("broken")
    assert caught.value.exit_code == 2
    with pytest.raises(PluginError, match=rf"no plug-in `{name}x` of kind {kind}(.|\n)*did you mean `{name}`"):
        ask(f"{name}x")


def test_unknown_architectures(broken: None) -> None:
    """An architecture that is not covered gets the list of those that are."""
    with pytest.raises(
        UnknownFamily,
        match=r"`mamba`(.|\n)*gpt2, gpt_neox, llama, mistral, mixtral, mlp, olmo2, olmoe, opt, phi3, qwen2, qwen2_moe",
    ):
        registry.family("mamba")


def test_listing(broken: None) -> None:
    """Every plug-in of every kind is listed with where it comes from, the broken ones with the reason."""
    listings = {(one.kind, one.name): one for one in registry.listings()}
    assert listings["trackers", "jsonl"].problem is None
    assert "peel-agent" in listings["trackers", "jsonl"].source
    for kind in KINDS:
        assert "no_such_module" in str(listings[kind, "broken"].problem)
    assert {key for key, one in listings.items() if one.problem is None} >= {
        ("trackers", "mlflow"),
        ("sinks", "stderr"),
        ("sinks", "jsonl"),
        ("engines", "local"),
    }
