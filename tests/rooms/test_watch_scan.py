"""The scan of the watch room, with the real formats on real folders."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from peel_agent import registry
from peel_agent.errors import ConfigurationError, PluginError
from peel_agent.pipeline import locate
from peel_agent.records import Claim, LocalListing, Readiness
from peel_agent.watch import scan
from peel_agent.watch.store import RemoteObject
from peel_agent.watch.units import Division

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peel_agent.records import CheckpointRef, Listing, Strength, Weights

FORMATS = registry.formats()


def safetensors_bytes(value: int = 7) -> bytes:
    """A safetensors file with one tensor of four bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value] * 4)


def checkpoint_files(step: int | None) -> Mapping[str, bytes]:
    """The files of a checkpoint in the order in which they are written; with `step`, one of Trainer's."""
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": safetensors_bytes()}
    if step is not None:
        files |= {"optimizer.pt": b"optimizer", "trainer_state.json": json.dumps({"global_step": step}).encode()}
    return files


def write_checkpoint(folder: Path, step: int | None = None) -> Path:
    """A complete checkpoint; with `step`, one of Trainer's, which `folder` must be named after."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in checkpoint_files(step).items():
        (folder / name).write_bytes(content)
    return folder


def sightings(root: Path) -> list[tuple[str, str, str, int | None]]:
    """(path below the root, format, state, step) of every sighting."""
    return [
        (str(seen.path.relative_to(root)), seen.format, seen.readiness.state, seen.step) for seen in scan(root, FORMATS)
    ]


class TestWhatIsSeen:
    def test_a_checkpoint_given_as_root(self, tmp_path: Path) -> None:
        """A root that is itself a checkpoint is the only sighting; its files are not seen again."""
        write_checkpoint(tmp_path / "checkpoint-5", 5)
        assert sightings(tmp_path / "checkpoint-5") == [(".", "transformers", "complete", 5)]

    def test_a_file_given_as_root(self, tmp_path: Path) -> None:
        """A single safetensors file can be the root."""
        write_checkpoint(tmp_path / "m")
        assert sightings(tmp_path / "m" / "model.safetensors") == [(".", "safetensors", "complete", None)]

    @pytest.mark.parametrize(
        "name",
        [
            "tmp-checkpoint-5",
            "tmp_checkpoint-5",
            "checkpoint-5.tmp",
            "checkpoint-5-unfinished",
            "step_5.part",
            "x.incomplete",
        ],
    )
    def test_what_is_still_put_together_is_passed_over(self, tmp_path: Path, name: str) -> None:
        """A folder that will be renamed when it is whole would else count twice."""
        write_checkpoint(tmp_path / name)
        write_checkpoint(tmp_path / "temperature-5")
        assert sightings(tmp_path) == [("temperature-5", "safetensors", "complete", None)]

    def test_checkpoints_of_one_run(self, tmp_path: Path) -> None:
        """Checkpoints are seen directly below the root and no deeper: two runs must not become one series."""
        write_checkpoint(tmp_path / "checkpoint-5", 5)
        write_checkpoint(tmp_path / "exp1" / "checkpoint-7", 7)
        assert sightings(tmp_path) == [("checkpoint-5", "transformers", "complete", 5)]

    def test_single_files_beside_each_other(self, tmp_path: Path) -> None:
        """Safetensors files in a folder that is no checkpoint are one checkpoint each, with a common config.json."""
        (tmp_path / "config.json").write_text("{}")
        for step in (5, 10):
            (tmp_path / f"step-{step}.safetensors").write_bytes(safetensors_bytes())
        assert [(path, step) for path, _, state, step in sightings(tmp_path) if state == "complete"] == [
            ("step-10.safetensors", 10),
            ("step-5.safetensors", 5),
        ]

    def test_a_final_export_does_not_hide_the_checkpoints(self, tmp_path: Path) -> None:
        """A folder with checkpoint-N and Trainer's final export beside them yields the checkpoints, then itself."""
        run = tmp_path
        write_checkpoint(run / "checkpoint-5", 5)
        write_checkpoint(run / "checkpoint-10", 10)
        write_checkpoint(run)
        assert [(seen.path, seen.step) for seen in scan(tmp_path, FORMATS)] == [
            (run / "checkpoint-10", 10),
            (run / "checkpoint-5", 5),
            (run, None),
        ]

    def test_what_is_being_written(self, tmp_path: Path) -> None:
        """An empty checkpoint-N is seen as incomplete; it is one in the making."""
        (tmp_path / "checkpoint-5").mkdir()
        assert sightings(tmp_path) == [("checkpoint-5", "transformers", "incomplete", None)]

    def test_other_things_are_not_seen(self, tmp_path: Path) -> None:
        """Logs, hidden folders and plain files are no checkpoints."""
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "events.out").write_text("x")
        (tmp_path / "config.json").write_text("{}")
        write_checkpoint(tmp_path / ".cache")
        assert sightings(tmp_path) == []

    def test_the_strongest_claim_has_it(self, tmp_path: Path) -> None:
        """Of two formats that know a path the one with the stronger claim has it, of equal ones the first in order."""
        (by_files,) = registry.formats("safetensors")
        other = Renamed()
        write_checkpoint(tmp_path / "step_5")
        for strengths, name in (
            (("generic", "generic"), "renamed"),
            (("specific", "generic"), "renamed"),
            (("declined", "generic"), "safetensors"),
            (("begun", "generic"), "safetensors"),
        ):
            other.strength = strengths[0]
            assert [seen.format for seen in scan(tmp_path, [other, by_files])] == [name]
        assert [seen.format for seen in scan(tmp_path, [by_files, other])] == ["safetensors"]

    def test_each_folder_is_listed_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With every format installed, a look lists the root and each folder in it once, and nothing above."""
        write_checkpoint(tmp_path / "run" / "checkpoint-5", 5)
        write_checkpoint(tmp_path / "run" / "step_6")
        write_checkpoint(tmp_path / "run")
        for name in ("checkpoint-7", "logs", "100", "global_step8"):
            (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / "100" / "_CHECKPOINT_METADATA").touch()
        (tmp_path / "run" / "global_step8" / "mp_rank_00_model_states.pt").touch()
        (tmp_path / "run" / "step_9.pt").touch()
        listed: list[str] = []
        for name in ("scandir", "listdir"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda path=".", real=real: listed.append(str(path)) or real(path))
        for _ in range(2):
            listed.clear()
            assert len(scan(tmp_path / "run", FORMATS)) == 6
            below = ("", "/100", "/checkpoint-5", "/checkpoint-7", "/global_step8", "/logs", "/step_6")
            assert sorted(listed) == [f"{tmp_path / 'run'}{name}" for name in below]


class Renamed:
    """The safetensors format under another name, its claims of another strength."""

    name = "renamed"
    strength: Strength = "generic"
    inspect = registry.formats("safetensors")[0].inspect
    step = registry.formats("safetensors")[0].step

    def claim(self, listing: Listing) -> Claim | None:
        claim = registry.formats("safetensors")[0].claim(listing)
        return None if claim is None else dataclasses.replace(claim, strength=self.strength)

    def open(self, ref: CheckpointRef) -> Weights:
        raise NotImplementedError


class TestLinks:
    def test_a_link_is_followed_one_step(self, tmp_path: Path) -> None:
        """A link to a checkpoint's plain folder is seen under that folder's own path, once; what is seen without it, a
        folder of checkpoints, a file, the root itself and nothing are not.
        """
        outside = write_checkpoint(tmp_path / "outside" / "checkpoint-3", 3)
        root = tmp_path / "root"
        real = write_checkpoint(root / "checkpoint-5", 5)
        deep = write_checkpoint(root / "exp" / "checkpoint-7", 7)
        for name, target in {
            "checkpoint-3": outside,
            "again": outside,
            "latest": real,
            "relative": "checkpoint-5",
            "best": deep,
            "all": tmp_path / "outside",
            "loose.safetensors": outside / "model.safetensors",
            "self": root,
            "up": "..",
            "itself": "itself",
            "gone": tmp_path / "gone",
        }.items():
            (root / name).symlink_to(target)
        seen = scan(root, FORMATS)
        assert [(one.path, one.readiness.state, one.step) for one in seen] == [
            (real, "complete", 5),
            (outside, "complete", 3),
            (deep, "complete", 7),
        ]

    def test_a_checkpoint_behind_a_link_that_is_not_followed(self, tmp_path: Path, monkeypatch: Any) -> None:
        """A checkpoint behind two links, or of another user, is named with the reason and what to do."""
        outside = write_checkpoint(tmp_path / "outside" / "checkpoint-3", 3)
        (root := tmp_path / "root").mkdir()
        (tmp_path / "current").symlink_to(outside)
        (root / "latest").symlink_to(tmp_path / "current")
        (seen,) = scan(root, FORMATS)
        assert (seen.path, seen.readiness.state) == (root / "latest", "damaged")
        assert "latest is a link to" in seen.readiness.reason
        assert "itself a link" in seen.readiness.reason
        assert "watch the folder that it is in" in seen.readiness.remedy
        (root / "latest").unlink()
        (root / "best").symlink_to(outside)
        assert [one.path for one in scan(root, FORMATS)] == [outside]
        seen_by = os.lstat
        others = SimpleNamespace(st_mode=seen_by(outside).st_mode, st_uid=seen_by(outside).st_uid + 1)
        monkeypatch.setattr(Path, "lstat", lambda path: others if path == outside else seen_by(path))
        (seen,) = scan(root, FORMATS)
        assert "which belongs to another user than the watched folder" in seen.readiness.reason

    def test_a_root_that_is_a_link(self, tmp_path: Path) -> None:
        """The root may be a link; paths are those of what it names."""
        real = write_checkpoint(tmp_path / "real" / "checkpoint-5", 5)
        (tmp_path / "current").symlink_to(tmp_path / "real")
        assert [seen.path for seen in scan(tmp_path / "current", FORMATS)] == [real.resolve()]

    def test_a_relative_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Paths are absolute whatever the root looks like."""
        real = write_checkpoint(tmp_path / "checkpoint-5", 5)
        monkeypatch.chdir(tmp_path)
        assert [seen.path for seen in scan(real.parent.relative_to(tmp_path), FORMATS)] == [real.resolve()]


class TestWhatVanishes:
    def test_a_root_that_is_not_there(self, tmp_path: Path) -> None:
        """A root that vanished holds nothing."""
        assert scan(tmp_path / "gone", FORMATS) == ()

    def test_a_checkpoint_rotated_away_in_the_middle(self, tmp_path: Path) -> None:
        """A checkpoint removed after it was recognised is an incomplete sighting; the others are whole."""

        class Rotating(Renamed):
            def inspect(self, listing: LocalListing) -> Readiness:
                if listing.name == "step_5":
                    shutil.rmtree(listing.path)
                return Renamed.inspect(listing)

        write_checkpoint(tmp_path / "step_5")
        write_checkpoint(tmp_path / "step_7")
        assert [(seen.path.name, seen.readiness.state) for seen in scan(tmp_path, [Rotating()])] == [
            ("step_5", "incomplete"),
            ("step_7", "complete"),
        ]

    def test_a_folder_that_cannot_be_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stale folder is passed over, the others are seen."""
        (tmp_path / "exp1").mkdir()
        write_checkpoint(tmp_path / "checkpoint-7", 7)
        listed = os.scandir

        def stale(path: Path) -> object:
            if str(path).endswith("exp1"):
                raise OSError(116, "Stale file handle")
            return listed(path)

        monkeypatch.setattr(os, "scandir", stale)
        assert [path for path, *_ in sightings(tmp_path)] == ["checkpoint-7"]

    def test_a_checkpoint_that_may_not_be_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It says so, and how to mend it: never that it should be waited for or written again."""
        (tmp_path / "checkpoint-5").mkdir()
        listed = os.scandir

        def denied(path: Path) -> object:
            if str(path).endswith("checkpoint-5"):
                raise PermissionError(13, "Permission denied")
            return listed(path)

        monkeypatch.setattr(os, "scandir", denied)
        (seen,) = scan(tmp_path, FORMATS)
        assert seen.readiness.reason == f"{tmp_path}/checkpoint-5 may not be listed"
        assert "the right to list and search it" in seen.readiness.remedy

    def test_a_root_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A root that may not be listed is a configuration error that names it, not an empty root."""
        monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK)
        with pytest.raises(ConfigurationError, match=f"{tmp_path} may not be listed"):
            scan(tmp_path, FORMATS)


class Raising:
    """Somebody else's format with a fault in one of its methods."""

    name = "raising"

    def __init__(self, method: str) -> None:
        self._method = method

    def claim(self, listing: Listing) -> Any:
        if self._method == "strength":
            return Claim("certain")  # type: ignore[arg-type]
        if self._method == "claim":
            raise KeyError("a bug")
        return Claim("specific", frozenset(listing.names())) if listing.name == "theirs" else None

    def inspect(self, listing: LocalListing) -> Readiness:
        if self._method == "inspect":
            raise KeyError("a bug")
        return Readiness("complete", "")

    def step(self, _listing: LocalListing) -> int | None:
        raise KeyError("a bug")


class TestAFormatThatFails:
    """It is named where nobody else knows the place; the others' checkpoints are seen as ever."""

    @pytest.mark.parametrize("method", ["claim", "strength", "inspect", "step"])
    def test_in_a_folder(self, tmp_path: Path, method: str) -> None:
        """In the watched place, below it, and in a folder of no checkpoint."""
        write_checkpoint(tmp_path / "checkpoint-3", 3)
        (tmp_path / "theirs").mkdir()
        seen = scan(tmp_path, [Raising(method), *FORMATS])  # type: ignore[list-item]
        assert [(one.path.name, one.format) for one in seen if one.readiness.state == "complete"] == [
            ("checkpoint-3", "transformers")
        ]
        (fault,) = [one.readiness for one in seen if one.readiness.state == "damaged"]
        error = "ValueError" if method == "strength" else "KeyError: 'a bug'"
        assert f"the format plug-in `raising` failed at theirs: {error}" in fault.reason
        assert "uninstall" in fault.remedy

    def test_in_a_store(self) -> None:
        """What it may have is refused, and not fetched."""
        names = ["checkpoint-3/config.json", "checkpoint-3/model.safetensors", "theirs/data"]
        objects = [RemoteObject(name, 10, "v", 0) for name in names]
        units = Division("run", [Raising("claim"), *FORMATS]).units(objects)  # type: ignore[list-item]
        faults = {unit.name: unit.fault for unit in units}
        assert faults["checkpoint-3"] is None
        assert "the format plug-in `raising` failed at theirs" in str(faults["theirs"])

    def test_by_hand(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`scan` of what only it may know ends with its name."""
        monkeypatch.setattr(registry, "formats", lambda _name: (Raising("claim"), *FORMATS))
        (tmp_path / "theirs").mkdir()
        assert locate(write_checkpoint(tmp_path / "checkpoint-3", 3)).step == 3
        with pytest.raises(PluginError, match=r"`raising` failed at theirs"):
            locate(tmp_path / "theirs")


def test_the_room_imports_no_torch() -> None:
    """Importing the watch room leaves torch alone."""
    program = "import sys, peel_agent.watch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
