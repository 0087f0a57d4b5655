"""The wheel and the sdist in empty environments: what they hold, and that they install and work without each extra and
with each alone.

`python -m tests.bench.packages FOLDER PYTHON...` for each of these interpreters; it needs PyPI. Each gets one
environment in FOLDER, in which the wheel is installed without extras (one that is there from before is used again); an
extra is installed in an environment of its own above that one. Prints a line a check; exit 1 when one fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests import zoo

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    "apprise": ("apprise", "sinks/apprise"),
    "compressed-tensors": ("compressed_tensors", ""),
    "demo": ("accelerate", ""),
    "gcs": ("gcsfs", ""),
    "nvidia": ("pynvml", ""),
    "ray": ("ray", "engines/ray"),
    "report": ("vl_convert", ""),
    "s3": ("s3fs", ""),
    "sentencepiece": ("sentencepiece", ""),
    "tensorboard": ("tensorboard", "trackers/tensorboard"),
    "wandb": ("wandb", "trackers/wandb"),
}
"""The module that each extra brings, and the plug-in that needs it."""

WITHOUT = {
    "apprise": ("doctor", "-c", "peel.toml"),
    "demo": ("demo",),
    "gcs": ("scan", "gs://bucket/checkpoint-8", "--probe", "probe.npy"),
    "nvidia": ("doctor", "-c", "peel.toml"),
    "report": ("report", "--state", "state", "--out", "report.html"),
    "s3": ("scan", "s3://bucket/checkpoint-8", "--probe", "probe.npy"),
    "sentencepiece": ("probe", "--from", "text.txt", "--tokenizer", "tokenizer.model", "--out", "made.npy"),
    "tensorboard": ("doctor", "-c", "peel.toml"),
    "wandb": ("doctor", "-c", "peel.toml"),
}
"""A command that needs the extra."""

CONFIGURATION = """
[watch]
path = "{0}"
[probe]
path = "{0}/probe.npy"
[device]
select = "auto"
[tracker]
use = ["tensorboard", "wandb"]
[[sink]]
use = "apprise"
urls = ["json://127.0.0.1:9"]
"""
STATE = '[state]\npath = "{0}/state"\n'


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def must(*command: str | Path, folder: Path | None = None) -> str:
    done = run(*command, folder=folder)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist of what is committed, and the wheel of that sdist."""
    source, made = folder / "source", folder / "dist"
    for old in (source, made):
        shutil.rmtree(old, ignore_errors=True)
    source.mkdir(parents=True)
    must("git", "archive", "-o", source / "tree.tar", "HEAD", folder=ROOT)
    must("tar", "xf", "tree.tar", folder=source)
    (source / "tree.tar").unlink()
    tools = folder / "tools"
    if not tools.exists():
        must(sys.executable, "-m", "venv", tools)
        must(tools / "bin" / "pip", "install", "-q", "build")
    must(tools / "bin" / "python", "-m", "build", "-o", made, source)
    (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
    return wheel, sdist


def contents(wheel: Path, sdist: Path) -> Iterator[tuple[str, bool, str]]:
    tracked = set(must("git", "ls-files", folder=ROOT).split())
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        name.replace("plugins/", "peel_plugins/", 1) if name.startswith("plugins/") else name
        for name in tracked
        if name.startswith(("peel_agent/", "plugins/"))
    }
    yield f"the wheel holds the {len(wanted)} files of both packages, and no other", held == wanted, str(held ^ wanted)
    with tarfile.open(sdist) as archive_of_sources:
        names = {member.name.partition("/")[2] for member in archive_of_sources.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if name.startswith("peel_agent.egg-info/"))}
    left_out = {name for name in tracked if name.startswith(".") and not name.startswith(".ci/")}
    differ = (names - made) ^ (tracked - left_out - {"MANIFEST.in"} | ({"MANIFEST.in"} & names))
    yield f"the sdist holds the {len(names - made)} files of the repository", not differ, str(sorted(differ))


def bare(name: str, python: Path, given: Path) -> Iterator[tuple[str, bool, str]]:
    program = python.parent / "peel-agent"
    done = run(program, "plugins", folder=given)
    for extra, (_, plugin) in EXTRAS.items():
        if plugin:
            line = next((one for one in done.stdout.splitlines() if one.split()[:1] == [extra]), "")
            yield f"{name} without {extra}: plugins", f'pip install "peel-agent[{extra}]"' in line, line
    done = run(program, "scan", "checkpoint-8", "--probe", "probe.npy", folder=given)
    rows = [line for line in done.stdout.splitlines() if line.startswith("model.layers.")]
    yield f"{name} without extras: scan prints a line a block", len(rows) >= zoo.BLOCKS, done.stdout + done.stderr
    run(program, "watch", "-c", "once.toml", "--once", folder=given)  # leaves what `report` reads
    for command in dict.fromkeys(WITHOUT.values()):
        done = run(program, *command, folder=given)
        said = done.stdout + done.stderr
        for extra in (one for one, needing in WITHOUT.items() if needing == command):
            is_named = f'pip install "peel-agent[{extra}]"' in said
            ends = done.returncode in (1, 2, 3) and "Traceback" not in said
            yield f"{name} without {extra}: {command[0]} names the command", is_named and ends, said


def alone(name: str, base: Path, extra: str, wheel: Path, folder: Path) -> Iterator[tuple[str, bool, str]]:
    """The extra in an environment that sees the bare one, and nothing else."""
    above = folder / f"{name}-{extra}"
    shutil.rmtree(above, ignore_errors=True)
    must(base, "-m", "venv", "--without-pip", above)
    (site,) = (above / "lib").glob("python*/site-packages")
    (below,) = (base.parent.parent / "lib").glob("python*/site-packages")
    (site / "below.pth").write_text(f"{below}\n")
    python, pins = above / "bin" / "python", ("-c", ROOT / "constraints.txt")
    done = run(python, "-m", "pip", "install", "-q", *pins, f"{wheel}[{extra}]")
    yield f"{name} with {extra}: installs", done.returncode == 0, done.stderr
    module, plugin = EXTRAS[extra]
    done = run(python, "-c", f"import {module}, importlib.metadata; importlib.metadata.version('peel-agent')")
    yield f"{name} with {extra}: {module} is imported", done.returncode == 0, done.stderr
    if plugin:
        done = run(python, "-m", "peel_agent", "plugins")
        line = next((one for one in done.stdout.splitlines() if one.split()[:1] == [extra]), "")
        yield f"{name} with {extra}: plugins says usable", line.endswith(" usable"), line
    shutil.rmtree(above, ignore_errors=True)


def material(folder: Path) -> Path:
    """A tiny checkpoint, a probe, and what else the commands are given."""
    given = folder / "given"
    shutil.rmtree(given, ignore_errors=True)
    given.mkdir(parents=True)
    zoo.build("llama", steps=5).save_pretrained(given / "checkpoint-8")
    np.save(given / "probe.npy", zoo.token_ids(400, 1))
    (given / "text.txt").write_text("some text\n" * 1000)
    (given / "tokenizer.model").write_bytes(b"\x0a\x00")
    (given / "peel.toml").write_text(CONFIGURATION.format(given))
    (given / "peel.toml").chmod(0o600)  # a sink's address may be a secret
    (given / "once.toml").write_text(CONFIGURATION.format(given).replace('"tensorboard", "wandb"', '"jsonl"'))
    (given / "once.toml").write_text((given / "once.toml").read_text().partition("[[sink]]")[0] + STATE.format(given))
    return given


def environment(name: str, interpreter: str, wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment with this wheel and what it requires."""
    place = folder / name
    python = place / "bin" / "python"
    if not python.exists():
        must(interpreter, "-m", "venv", place)
    pins = ("-c", ROOT / "constraints.txt")
    must(python, "-m", "pip", "install", "-q", *pins, wheel)
    must(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    must(python, "-m", "pip", "check")
    return python


def checks(options: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    folder: Path = options.folder.resolve()
    wheel, sdist = build(folder)
    yield from contents(wheel, sdist)
    extras = set(SETTINGS["project"]["optional-dependencies"]) - {"test"}
    yield "each extra is checked", extras == set(EXTRAS), str(extras ^ set(EXTRAS))
    given = material(folder)
    for interpreter in options.python:
        version = must(interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
        name = f"base-{version}"
        python = environment(name, interpreter, wheel, folder)
        yield f"{name}: the wheel installs, and pip check finds nothing", True, ""
        yield from bare(name, python, given)
        for extra in options.extra or EXTRAS:
            yield from alone(name, python, extra, wheel, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("python", nargs="+", help="interpreters: python3.11 python3.12 python3.13")
    parser.add_argument("--extra", action="append", help="only this one of the extras, alone")
    failed = 0
    for what, holds, said in checks(parser.parse_args()):
        print("ok   " if holds else "WRONG", what, flush=True)
        if not holds:
            failed += 1
            print(said, flush=True)
    print(f"{failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
