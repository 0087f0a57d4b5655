"""Every remedy in the source, walked: the commands, options, settings, extras and names that it tells to use exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from peel_agent.cli.main import _parser
from tests.arch.test_documents import EXAMPLE, commands, options_of, uncommented

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("peel_agent", "plugins") for path in (ROOT / top).rglob("*.py"))

FOREIGN = frozenset(
    {
        "--checkpoint_path", "--ckpt-convert-format", "--ckpt-convert-save", "--ckpt-format", "--details",
        "--input_name_or_path", "--load-dir", "--loader", "--model-type", "--output_dir", "--output_path", "--run-id",
        "--save-dir", "--saver", "--allowed-hosts", "--output", "--num-gpus",
    }
)  # fmt: skip
"""Options of other people's commands, which the remedy names."""


SHAPES = frozenset({"rows"})
"""What stands in brackets and is the shape of an array."""


def remedies() -> list[tuple[str, str]]:
    """(where, text) of every text given as `remedy=`, or as the second part of an error or a Check, and of constants
    that hold one; what is filled in is {}.
    """
    located = []
    for path in SOURCES:
        where = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            for given in _given(node):
                located += [(f"{where}:{given.lineno}", text) for text in _texts(given) if len(text) > 3]
    return located


def _given(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.keyword) and node.arg == "remedy":
        return [node.value]
    is_constant = isinstance(node, ast.Assign) and all(
        isinstance(target, ast.Name)
        and re.search(r"REMEDY|AGAIN|WAIT|RENAME|WAY|PLAIN|RESAVE|SAVE|NAME_ONE", target.id)
        for target in node.targets
    )
    return [node.value] if is_constant and isinstance(node, ast.Assign) else []


def _texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)]
    if isinstance(node, ast.BinOp):
        return [a + b for a in _texts(node.left) or ["{}"] for b in _texts(node.right) or ["{}"]]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    if isinstance(node, ast.Dict):
        return [text for value in node.values for text in _texts(value)]
    return []


REMEDIES = remedies()


def test_there_are_remedies_to_walk() -> None:
    """The walk finds them: an error without one is refused by its own class."""
    assert len(REMEDIES) > 250


def test_every_option_exists() -> None:
    """An option that a remedy names is one of ours, or one of the tool that it names."""
    ours = {option for parser in commands().values() for option in options_of(parser)}
    unknown = {
        (where, option)
        for where, text in REMEDIES
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text)
        if option not in ours and option not in FOREIGN
    }
    assert not unknown


def test_every_command_exists() -> None:
    """`peel-agent X` is a command, and its action is one of its own."""
    for where, text in REMEDIES:
        for name, action in re.findall(r"(?:`|then |: )peel-agent ([a-z]+)(?: ([a-z]+))?", text):
            assert name in commands(), where
            nested = [one for one in commands()[name]._actions if isinstance(one, argparse._SubParsersAction)]
            chosen = [
                one.choices for one in commands()[name]._actions if one.choices and not nested and one.dest == "action"
            ]
            if nested and action:
                assert action in nested[0].choices, where
            if chosen and action:
                assert action in chosen[0], where
    assert _parser().prog == "peel-agent"


def test_every_setting_exists() -> None:
    """`[section] key` is a key of that section."""
    shown = tomllib.loads(uncommented(EXAMPLE.read_text()))
    for where, text in REMEDIES:
        for section, key in re.findall(r"\[([a-z]+(?:\.[a-z]+)?)\] ([a-z_]+)", text):
            if section in SHAPES:
                continue
            table = shown
            for part in section.split("."):
                assert part in table, f"{where}: [{section}]"
                table = table[part][0] if isinstance(table[part], list) else table[part]
            if re.search(rf"\[{re.escape(section)}\] {key}(?= =|,|;|\)|$| is| as| or| a | and| with|: )", text):
                known = set(table) | {"factory", "in", "table", "of", "that", "to"}
                assert key in known, f"{where}: [{section}] {key}"


def test_every_extra_exists() -> None:
    """`pip install peel-agent[x]` installs something."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for where, text in REMEDIES:
        for extra in re.findall(r"peel-agent\[([a-z0-9-]+)\]", text):
            assert extra in extras, f"{where}: {extra}"


def test_every_name_of_ours_exists() -> None:
    """`peel_agent.x.Y` can be imported."""
    for where, text in REMEDIES:
        for dotted in re.findall(r"\bpeel_agent(?:\.\w+)+", text):
            module, _, name = dotted.rpartition(".")
            assert hasattr(importlib.import_module(module), name), f"{where}: {dotted}"


def test_every_file_that_is_named_ships() -> None:
    """A file of this repository that a remedy points at is there."""
    for where, text in REMEDIES:
        for path in re.findall(r"\b(?:deploy|docs)/[\w./-]+\w", text):
            assert (ROOT / path).exists(), f"{where}: {path}"


@pytest.mark.parametrize("word", ["simply", "just ", "please try", "contact"])
def test_no_remedy_says_nothing(word: str) -> None:
    """A remedy says what to do, in words that mean something."""
    assert not [where for where, text in REMEDIES if word in text.lower()]
