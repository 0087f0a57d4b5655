"""What the house promises about itself."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("peel_agent", "plugins") for path in (ROOT / top).rglob("*.py"))
LOOSE = ("README.md", "Makefile", "pyproject.toml")


@pytest.mark.parametrize(
    "statement",
    [
        "import peel_agent.cli, peel_agent.agent, peel_agent.watcher",
        "from peel_agent import registry; registry.formats(); registry.tracker('mlflow'); registry.family('gpt2')",
        "from peel_agent import engines, registry; registry.engine('local'); registry.engine('ray')",
        "from peel_agent.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_the_parent_starts_without_torch(statement: str) -> None:
    """The agent, `--help` and every plug-in the parent loads import no torch, transformers or mlflow, and nothing that
    draws.
    """
    heavy = {"torch", "transformers", "mlflow", "ray", "rich", "jinja2", "vl_convert"}
    check = f"import sys; print(sorted({heavy!r} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{check}"], check=True, capture_output=True, text=True
    )
    assert finished.stdout.splitlines()[-1] == "[]"


def test_no_module_is_too_long() -> None:
    """No module of the product is over 400 lines."""
    assert {str(path.relative_to(ROOT)) for path in SOURCES if len(path.read_text().splitlines()) > 400} == set()


def test_top_level() -> None:
    """The repository's top level has the five folders of the layout and the usual loose files, also before a commit."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    folders = {name.split("/")[0] for name in names if "/" in name and not name.startswith(".")}
    assert folders == {"peel_agent", "plugins", "tests", "deploy", "docs"}


def test_constraints_pin_what_is_installed() -> None:
    """The tests ran with the versions that constraints.txt names, torch 2.13.0 among them."""
    from importlib.metadata import version

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0"
    for name in ("torch", "transformers", "mlflow", "safetensors", "watchdog", "tomli", "psutil", "numpy", "rich"):
        assert version(name).split("+")[0] == pins[name]


def test_no_address_of_a_machine() -> None:
    """No file holds an absolute path of somebody's home or workplace."""
    with_address = [
        str(path)
        for path in [*SOURCES, *(ROOT / "docs").glob("*.md"), *(ROOT / name for name in LOOSE)]
        if re.search(r"/(home|root|Users|work)/\w+", path.read_text())
    ]
    assert with_address == []


def test_the_packages_are_the_folders() -> None:
    """Those that pyproject.toml names are all there are: with one too many nothing installs, and one may be missing."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [
        ".".join([package, *file.parent.relative_to(ROOT / folder).parts])
        for package, folder in (("peel_agent", "peel_agent"), ("peel_plugins", "plugins"))
        for file in (ROOT / folder).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(folders)
