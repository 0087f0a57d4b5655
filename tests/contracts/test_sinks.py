"""Both sink plug-ins against the conformance kit, and what each does when its place refuses."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peel_agent import registry
from peel_agent.errors import DestinationUnavailable
from peel_agent.records import NoticeGroup, restored
from peel_agent.testing.sinks import CHECKS, Connect, Read, example_group
from peel_plugins.sinks import jsonl_file, stderr
from peel_plugins.sinks.jsonl_file import JsonlSettings
from peel_plugins.sinks.stderr import StderrSettings

checks = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@checks
def test_jsonl(check: Callable[[Connect, Read], None], tmp_path: Path) -> None:
    """The file sink passes every check of the kit."""
    file = tmp_path / "state" / "notices.jsonl"
    check(lambda: jsonl_file.PLUGIN.connect(JsonlSettings(), state_dir=tmp_path / "state"), file.read_text)


@checks
def test_stderr(check: Callable[[Connect, Read], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sink for terminals passes every check of the kit."""
    shown = ""

    def read() -> str:
        nonlocal shown
        shown += capsys.readouterr().err
        return shown

    check(lambda: stderr.PLUGIN.connect(StderrSettings(), state_dir=tmp_path), read)


@pytest.mark.parametrize("fault", ["loses", "reorders", "multiplies"])
def test_the_kit_refuses_a_sink_that_does_not_keep_its_word(fault: str) -> None:
    """One that loses a notice, turns the order, or repeats what came once fails, so the kit can fail."""
    kept: list[str] = []

    class Broken:
        def deliver(self, group: NoticeGroup) -> None:
            lines = group.text.splitlines()
            if fault == "reorders":
                kept[:0] = lines
            else:
                kept.extend(lines[:-1] if fault == "loses" else lines * 3)

        def where(self) -> str:
            return "here"

        def close(self) -> None:
            pass

    broken = []
    for check in CHECKS:
        kept.clear()
        try:
            check(Broken, lambda: "\n".join(kept))
        except AssertionError:
            broken.append(check.__name__)
    assert broken


def test_first_party_sinks_are_found_by_name() -> None:
    """They enter by the plug-in door."""
    assert registry.sink("jsonl") is jsonl_file.PLUGIN
    assert registry.sink("stderr") is stderr.PLUGIN


def test_a_line_holds_the_whole_group_once(tmp_path: Path) -> None:
    """Everything of a group can be read back from its line, at the path that the settings name; again is nothing."""
    file = tmp_path / "new" / "n.jsonl"
    sink = jsonl_file.PLUGIN.connect(JsonlSettings(file), state_dir=tmp_path)
    for _ in range(2):
        sink.deliver(example_group("one"))
    jsonl_file.PLUGIN.connect(JsonlSettings(file), state_dir=tmp_path).deliver(example_group("one"))
    (line,) = file.read_text().splitlines()
    assert restored(NoticeGroup, json.loads(line)) == example_group("one")
    assert str(file) in sink.where()


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    """After a crash in the middle of a line, the line is written whole and those before it are kept."""
    file = tmp_path / "notices.jsonl"
    sink = jsonl_file.PLUGIN.connect(JsonlSettings(), state_dir=tmp_path)
    sink.deliver(example_group("one"))
    first = file.read_bytes()
    sink.deliver(example_group("two"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(first) + 40])
    jsonl_file.PLUGIN.connect(JsonlSettings(), state_dir=tmp_path).deliver(example_group("two"))
    assert file.read_bytes() == whole


def test_a_full_disk_is_told_and_the_group_comes_again_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fails, the error names the file and what to do; the same group sent again is there once."""
    sink = jsonl_file.PLUGIN.connect(JsonlSettings(), state_dir=tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as fault:
        fault.setattr(os, "fsync", full)
        with pytest.raises(DestinationUnavailable, match="No space left on device") as caught:
            sink.deliver(example_group("one"))
    assert str(tmp_path / "notices.jsonl") in caught.value.what
    assert "disk" in caught.value.remedy
    sink.deliver(example_group("one"))
    assert len((tmp_path / "notices.jsonl").read_text().splitlines()) == 1


def test_a_stderr_that_is_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that is gone, or a pipe whose reader left, is tried again and ends nothing."""
    sink = stderr.PLUGIN.connect(StderrSettings(), state_dir=tmp_path)
    closed = io.StringIO()
    closed.close()

    class Broken(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patched:
        for gone, words in ((closed, "closed file"), (Broken(), "Broken pipe")):
            patched.setattr(sys, "stderr", gone)
            with pytest.raises(DestinationUnavailable, match=words):
                sink.deliver(example_group("one"))
