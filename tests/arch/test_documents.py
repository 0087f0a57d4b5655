"""What the README and the example configuration say is true, and says all there is."""

from __future__ import annotations

import argparse
import dataclasses
import re
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import tomli

import peel_agent
from peel_agent import registry
from peel_agent.cli.main import _parser
from peel_agent.config import Settings, load_settings
from peel_agent.config.sections import DEFAULT_RULES
from peel_agent.destinations import sink_settings
from peel_agent.doctor import configuration_text
from peel_agent.publish import publication
from peel_agent.records import CHECKPOINTS, CLEARED_AFTER, NEEDS, OF_TIME, THRESHOLDS, Rule, RuleState, Verdict
from peel_agent.spi import KINDS
from tests import zoo
from tests.rooms.test_publish_form import FULL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ALERTS = (ROOT / "docs" / "alerts.md").read_text()
GUIDES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
"""What a user reads."""
EXAMPLE = ROOT / "deploy" / "examples" / "peel.toml"


def tree() -> list[str]:
    """The paths that README's tree names."""
    block = README.split("## The tree")[1].split("```")[1]
    paths, top = [], ""
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            top = name
        paths.append(name if not line.startswith(" ") else top + name)
    return paths


def test_the_tree_is_true() -> None:
    """Every path in the tree exists, and every module and room of the package is in it."""
    named = tree()
    for path in named:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    modules = {
        f"peel_agent/{path.name}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "peel_agent").iterdir()
        if not path.name.startswith("_") and path.name != "py.typed"
    }
    assert modules <= set(named)
    for folder in ("plugins", "tests"):
        rooms = {f"{folder}/{path.name}/" for path in (ROOT / folder).iterdir() if path.is_dir()}
        assert {room for room in rooms if "__pycache__" not in room} <= set(named)


def commands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions.choices)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command and of its own commands."""
    options = {option for action in parser._actions for option in action.option_strings}
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return options.union(*(options_of(one) for action in nested for one in action.choices.values()))


def test_every_command_is_in_the_readme() -> None:
    """README's table has exactly the commands that there are; no guide shows an option that does not exist."""
    table = README.split("| command | does | exit |")[1].split("\n\n")[0]
    assert set(re.findall(r"`peel-agent (\w+)", table)) == set(commands())
    known = {option for parser in commands().values() for option in options_of(parser)}
    shown = {option for text in GUIDES.values() for option in re.findall(r"peel-agent [^`\n]*?(--[a-z][a-z-]*)", text)}
    assert shown | set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Each link of a guide to a file of this repository, and to a heading of it, is to one that exists."""
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", GUIDES[path]):
        file = (path.parent / target).resolve() if target else path
        assert file.is_file(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, heading


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in re.findall(r"```\w*\n(.*?)```", "\n".join(GUIDES.values()), flags=re.DOTALL)
        for line in re.findall(r"^ *peel-agent (\w+ .*)$", block, flags=re.MULTILINE)
    ],
)
def test_shown_commands_parse(line: str) -> None:
    """Each command line in a code block is accepted by the parser."""
    assert _parser().parse_args(line.split("#", maxsplit=1)[0].split()).run is not None


def test_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python code in the README runs as it stands and prints a line a block."""
    path = zoo.save(zoo.build("llama", steps=5), tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-8000").symlink_to(path)
    np.save("heldout.npy", zoo.token_ids(400, 1))
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    real = peel_agent.scan
    monkeypatch.setattr(peel_agent, "scan", lambda _, **options: real(path, **options))
    capsys.readouterr()  # a library may have said something as it was imported to write the checkpoint
    exec(compile(code, "README.md", "exec"), {})  # the text of this repository
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [f"model.layers.{index}" for index in range(zoo.BLOCKS)]


def uncommented(text: str) -> str:
    """The example with its keys and tables switched on."""
    return "\n".join(re.sub(r"^# (?=\w+ = |\[)", "", line) for line in text.splitlines())


def test_the_example_has_every_key_with_its_default(tmp_path: Path) -> None:
    """deploy/examples/peel.toml is what `peel-agent init` writes of nothing: every key, with its true default."""
    assert EXAMPLE.read_text() == configuration_text()
    assert load_settings(EXAMPLE, {}) == Settings()
    (tmp_path / "peel.toml").write_text(uncommented(EXAMPLE.read_text()))
    settings, shown = load_settings(tmp_path / "peel.toml", {}), tomli.loads((tmp_path / "peel.toml").read_text())
    for section in (one for one in dataclasses.fields(Settings) if one.name not in ("rules", "sinks", "runs")):
        default, switched_on = getattr(Settings(), section.name), getattr(settings, section.name)
        for key in {one.name for one in dataclasses.fields(default)} - {"options", "flags"}:
            assert key in shown[section.name], f"{section.name}.{key}"
            if getattr(default, key) not in (None, (), {}, ""):
                assert getattr(switched_on, key) == getattr(default, key), f"{section.name}.{key}"
    assert {key for rule in shown["rule"] for key in rule} == {field.name for field in dataclasses.fields(Rule)}
    assert [rule["kind"] for rule in shown["rule"][: len(DEFAULT_RULES)]] == [rule.kind for rule in DEFAULT_RULES]
    assert {rule["kind"] for rule in shown["rule"]} == set(CHECKPOINTS)
    assert [run.name for run in settings.runs] == [shown["run"][0]["name"]]


def test_the_example_has_every_key_of_the_plug_ins() -> None:
    """Each tracker, sink and engine of this distribution is in the example with all of its keys."""
    shown = tomli.loads(uncommented(EXAMPLE.read_text()))
    sinks = {sink["use"]: set(sink) for sink in shown["sink"]}
    for point in (one for one in entry_points(group="peel_agent.trackers") if one.value.startswith("peel_plugins")):
        keys = {field.name for field in dataclasses.fields(registry.tracker(point.name).settings)}
        assert set(shown["tracker"][point.name]) == keys, point.name
    for point in (one for one in entry_points(group="peel_agent.sinks") if one.value.startswith("peel_plugins")):
        keys = {field.name for field in dataclasses.fields(registry.sink(point.name).settings)}
        assert keys <= sinks.get(point.name, set()), point.name
        assert point.name in sinks
    for point in (one for one in entry_points(group="peel_agent.engines") if one.value.startswith("peel_plugins")):
        fields = {field.name for field in dataclasses.fields(registry.engine(point.name).settings)}
        assert set(shown["engine"].get(point.name, {})) == fields, point.name


def test_the_sinks_that_are_shown_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each [[sink]] in a code block is taken as it stands, once its secret is there."""
    blocks = [block for block in re.findall(r"```toml\n(.*?)```", ALERTS, flags=re.DOTALL) if "[[sink]]" in block]
    monkeypatch.setenv("PEEL_HOOK_SECRET", "a secret")
    (tmp_path / "password").write_text("a secret")
    text = "\n".join(blocks).replace("file:/etc/peel-agent/smtp-password", f"file:{tmp_path}/password")
    (tmp_path / "peel.toml").write_text(text)
    sinks = load_settings(tmp_path / "peel.toml", {}).sinks
    assert [sink.use for sink in sinks] == ["webhook", "email"]
    for sink in sinks:
        assert "a secret" not in repr(sink_settings(sink))


def test_every_sink_is_documented() -> None:
    """The table of sinks has each first-party one, and no other."""
    table = ALERTS.split("| `use` | what it does with a group |")[1].split("\n\n")[0]
    points = entry_points(group="peel_agent.sinks")
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == {
        point.name for point in points if point.value.startswith("peel_plugins")
    }


def test_every_kind_of_rule_is_documented() -> None:
    """The table has each kind, in order, marks those in force by themselves, and has the true counts and defaults."""
    table = ALERTS.split("| kind of rule | says |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0].split("`")[1] for row in rows] == list(CHECKPOINTS)
    assert {row[0].split("`")[1] for row in rows if row[0].endswith("\\*")} == {rule.kind for rule in DEFAULT_RULES}
    for (_, _, threshold, needed, counts), kind in zip(rows, CHECKPOINTS, strict=True):
        default = THRESHOLDS[kind].default
        assert default is None or f"({default:g})" in threshold, kind
        assert set(NEEDS.get(kind, ())) <= set(re.findall(r"`(\w+)`", needed)), kind
        expected = "at once" if kind in OF_TIME else f"{CHECKPOINTS[kind]}, {CLEARED_AFTER[kind]}"
        assert counts.startswith(expected), kind


def test_every_plug_in_is_in_the_readme() -> None:
    """README's tree lists every first-party plug-in of each kind by name."""
    lines = README.split("## The tree")[1].splitlines()
    for kind in KINDS:
        names = {
            point.name for point in entry_points(group=f"peel_agent.{kind}") if point.value.startswith("peel_plugins")
        }
        listed = [line.split(maxsplit=1)[1] for line in lines if line.strip().startswith(f"{kind}/")]
        assert names == (set(listed[0].split(", ")) if listed else set()), kind


def test_every_metric_and_tag_is_in_the_readme() -> None:
    """What a publication holds is named in the README."""
    verdict = Verdict((RuleState("layer_below", "model.layers.0", "inactive", 0, None),), ())
    sent = publication(FULL, verdict, committed_at=1.0, max_series=400)
    text = README.replace("`", "")
    for key in [*sent.metrics, *sent.tags, *sent.files]:
        generic = re.sub(r"L\d{3}(?=$|/)", "L003", re.sub(r"step-\d+", "step-000000800", key))
        generic = re.sub(r"^(peel/yes/|peel\.alert\.).*", r"\1<", generic)
        assert generic in text, key


def test_every_section_that_is_cited_exists() -> None:
    """What is cited as a number of method.md is a section of it, and no number stands for two."""
    sections = re.findall(r"^## (\d+[a-z]?)\. ", (ROOT / "docs" / "method.md").read_text(), flags=re.MULTILINE)
    cited: dict[str, str] = {}
    for path in [source for top in ("peel_agent", "plugins", "tests") for source in (ROOT / top).rglob("*.py")]:
        for numbers in re.findall(r"method\.md (\d+[a-z]?(?:, \d+[a-z]?)*)", path.read_text()):
            cited |= dict.fromkeys(numbers.split(", "), str(path))
    assert len(sections) == len(set(sections))
    assert len(cited) > 5
    assert {number: path for number, path in cited.items() if number not in sections} == {}
