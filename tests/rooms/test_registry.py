"""Plug-ins: found by name, loaded when asked for, and broken ones told apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from peel_agent import registry
from peel_agent.errors import PluginError, UnknownFamily
from peel_agent.records import LocalListing
from peel_agent.spi import KINDS
from peel_agent.watch.objects import ObjectListing
from peel_agent.watch.store import RemoteObject


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
    assert names == {"transformers", "safetensors", "torch", "dcp", "deepspeed", "megatron", "peft", "declined"}
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


FOREIGN = """
from peel_agent.records import Claim

class Foreign:
    name = "zz-foreign"

    def claim(self, listing):
        known = {"manifest.ocdbt", "model.safetensors"} & listing.names()
        return Claim("generic", known) if known else None

FORMAT = Foreign()
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution of somebody else's, installed for the length of a test: one format, last by its name."""
    site = tmp_path / "site"
    (site / "foreign_formats-1.0.dist-info").mkdir(parents=True)
    (site / "foreign_formats-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-formats\n")
    (site / "foreign_formats-1.0.dist-info" / "entry_points.txt").write_text(
        "[peel_agent.formats]\nzz-foreign = foreign_formats:FORMAT\n"
    )
    (site / "foreign_formats.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("foreign_formats", None)


@pytest.mark.parametrize(
    ("names", "reader"),
    [
        (["manifest.ocdbt"], "zz-foreign"),
        (["model.safetensors", "config.json"], "zz-foreign"),
        (["model.safetensors", "mp_rank_00_model_states.pt"], "zz-foreign"),
        (["manifest.ocdbt", "common.pt", "__0_0.distcp"], "megatron"),
        (["pytorch_model.bin"], "torch"),
        (["_CHECKPOINT_METADATA"], "declined"),
        (["notes.txt"], None),
    ],
)
def test_somebody_elses_format_comes_before_ours(
    foreign: None, names: list[str], reader: str | None, tmp_path: Path
) -> None:
    """A format of another distribution has what ours only declines, and what ours know no better; in a scan, in a
    store and when one is named."""
    folder = tmp_path / "run" / "some"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    formats = registry.formats()
    assert formats[0].name == "zz-foreign"
    objects = [RemoteObject(f"some/{name}", 10, "v", 0) for name in names]
    for listing in (LocalListing(folder), ObjectListing("run", objects).folder("some")):
        winner = registry.claimed(listing, formats)
        assert (winner[0].name if winner is not None else None) == reader


def test_listing(broken: None) -> None:
    """Every plug-in of every kind is listed with where it comes from, the broken ones with the reason."""
    listings = {(one.kind, one.name): one for one in registry.installed()}
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


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a plug-in's package is missing, the list has it as not usable, with the command; none counts as broken."""
    lacking = {("trackers", "tensorboard"), ("trackers", "wandb"), ("sinks", "apprise"), ("engines", "ray")}
    monkeypatch.setattr("peel_agent.registry.importlib.util.find_spec", lambda _name: None)
    for one in registry.installed():
        if (one.kind, one.name) in lacking:
            assert one.problem == f'the package {one.name} is not installed -> pip install "peel-agent[{one.name}]"'
        else:
            assert one.problem is None
    assert [problem for kind in KINDS for problem in registry.problems(kind)] == []
