"""One checkpoint copied from an object store, for a scan; and what a copy of any of them must hold to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from peel_agent.errors import CheckpointError, ConfigurationError, IncompleteCheckpoint, NoRoom
from peel_agent.spi import Format
from peel_agent.watch.pins import COMPANIONS
from peel_agent.watch.reserve import GIB, USUAL, Reserve
from peel_agent.watch.store import RemoteObject, Store, torn
from peel_agent.watch.units import RENAME, ROOT, Division, Unit, companions_of


def fetch(
    url: str,
    folder: Path,
    formats: Sequence[Format],
    options: Mapping[str, str] | None = None,
    reserve: Reserve = USUAL,
) -> Path:
    """Copies one checkpoint, a folder or a single file, into an empty `folder`; returns where it is then.

    The config.json and tokenizer.json above it come too, if it has none of its own. Raises ConfigurationError as
    `Store` does, CheckpointError when there is no checkpoint, none that may be written, or no room, TornCheckpoint when
    it changed meanwhile, and StoreUnavailable.
    """
    url = Store(url, options).url
    parent, _, name = url.rpartition("/")
    if parent.endswith("/"):
        raise ConfigurationError(
            f"{url} is a whole bucket", remedy="give the folder or the file of one checkpoint in it"
        )
    store = Store(parent, options)
    try:
        unit, companions = _one(store, name, formats)
        objects = {remote.name: remote for remote in (*companions, *unit.objects)}.values()
        check_space(reserve, folder, sum(remote.size for remote in objects), url)
        part = folder / "part"
        for remote in objects:
            (part / remote.name).parent.mkdir(parents=True, exist_ok=True)
            download(store, remote, part / remote.name, lambda: False)
        check_unchanged(unit.objects, (*store.list(name), *companions), url)
    finally:
        store.close()
    for child in part.iterdir():
        child.replace(folder / child.name)
    part.rmdir()
    return folder / name


def _one(store: Store, name: str, formats: Sequence[Format]) -> tuple[Unit, tuple[RemoteObject, ...]]:
    """The checkpoint of this name, and the objects above it that it needs."""
    listed = store.list(name)
    listed_names = {remote.name for remote in listed}
    beside = (store.stat(companion) for companion in COMPANIONS if f"{name}/{companion}" not in listed_names)
    companions = companions_of(remote for remote in beside if remote is not None)
    units = Division(store.name, formats).units((*listed, *companions))
    unit = next((unit for unit in units if unit.name in (name, ROOT)), None)
    if unit is None:
        raise CheckpointError(
            f"{store.url}/{name} is no checkpoint of a known format" if listed else f"there is no {store.url}/{name}",
            remedy="give one checkpoint (a checkpoint-N or save_pretrained folder, a .safetensors or .pt file); "
            "for a folder of checkpoints use `peel-agent watch --once`",
        )
    if unit.fault is not None:
        raise CheckpointError(f"{store.url}/{name} is refused: {unit.fault}", remedy=unit.remedy or RENAME)
    if unit.awaits or not unit.objects:
        missing = f"{', '.join(unit.awaits)} is not there yet" if unit.awaits else "no weights are there yet"
        raise IncompleteCheckpoint(
            f"{store.url}/{name} is incomplete: {missing}",
            remedy="wait until it is written, or let whoever writes the checkpoint upload that too",
        )
    return unit, companions


def download(store: Store, remote: RemoteObject, target: Path, stopping: Callable[[], bool]) -> bool:
    """As `Store.download`; CheckpointError too when the disk is full or broken."""
    try:
        return store.download(remote, target, stopping)
    except OSError as error:
        raise CheckpointError(
            f"{store.url}/{remote.name} cannot be written to {target.parent}: {error.strerror}",
            remedy="make room there, or put the state elsewhere ([state] path)",
        ) from error


def check_space(reserve: Reserve, folder: Path, size: int, url: str) -> None:
    """Raises NoRoom when `size` bytes more would not leave the reserve free of the folder's file system."""
    if reserve.leaves_room(folder, size):
        return
    kept = reserve.of(shutil.disk_usage(folder).total) / GIB
    raise NoRoom(
        f"{url} needs {size:,} bytes, more than the file system of {folder} has beside the {kept:.1f} GiB that stay "
        "free for the training",
        remedy="make room there, lower [watch] keep_free_gb, or take a larger disk: [state] path for an agent, TMPDIR "
        "for a command",
    )


def check_unchanged(before: Iterable[RemoteObject], now: Iterable[RemoteObject], url: str) -> None:
    """Raises TornCheckpoint when an object is not in the store as it was when it was listed first."""
    there = set(now)
    for remote in before:
        if remote not in there:
            raise torn(f"{url} changed while it was fetched: {remote.name}")
