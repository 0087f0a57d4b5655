"""The watched place and the state folder: what is in them, and what may be done there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from peel_agent import registry
from peel_agent.config import RunSettings
from peel_agent.doctor.configuration import failed
from peel_agent.doctor.folder import Checkpoints, Opened, checkpoints_in, opened_by_child
from peel_agent.errors import PeelError
from peel_agent.ledger import FILE, is_held, open_beside
from peel_agent.mounts import SILENT, kind_of
from peel_agent.probing import probe_path
from peel_agent.records import Check, CheckpointRef
from peel_agent.watch import Hints, Pins, Reserve, Store, is_url
from peel_agent.watch.nearby import misplaced
from peel_agent.watch.objects import ObjectListing
from peel_agent.watch.units import Division

WHERE = "see to that: [watch] path is the folder that a run's whole checkpoints are directly in"
GIB = 2**30
LEAST_STATE_BYTES = 256 * 2**20
CLOCK_SECONDS = 30.0
EVENT_SECONDS = 5.0
"""A file that was written is heard of within this time, where events come at all."""


def check_state(state_dir: Path) -> Iterator[Check]:
    """Whether an agent may keep its state in this folder, made or not yet made, and whether one does."""
    what = "state folder"
    folder = nearest(state_dir)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        remedy = f"let this user write there, or give another folder: [state] path, --state (user: {_user()})"
        yield Check(what, False, f"nothing can be written to {folder}: {error.strerror or error}", remedy)
        return
    kind = kind_of(folder)
    words = f"{state_dir} can be written to ({kind or 'a file system of unknown kind'})"
    if folder != state_dir:
        words = f"{state_dir} can be made ({kind or 'a file system of unknown kind'})"
    if (state_dir / FILE).exists():
        try:
            open_beside(state_dir).close()
        except PeelError as error:
            yield failed(what, error)
            return
    yield Check(what, True, words + ("; an agent is at work with it" if is_held(state_dir) else ""))
    free = shutil.disk_usage(folder).free
    if free < LEAST_STATE_BYTES:
        remedy = "make room, or give another folder: [state] path"
        yield Check("space for the state", False, f"{free / GIB:.2f} GiB are free in {folder}", remedy)
    else:
        yield Check("space for the state", True, f"{free / GIB:.1f} GiB are free")


def nearest(path: Path) -> Path:
    """The path itself, or the nearest of those above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container
        return "without a name"


# ---------------------------------------------------------------- the watched place


def check_place(run: RunSettings, state_dir: Path | None, name: str, now: Callable[[], float]) -> Iterator[Check]:
    """The watched place of a run, the model in it, the probe, and what an agent does there; `name` begins each."""
    place = str(run.watch.path)
    if is_url(place):
        yield from _bucket(run, place, name)
        yield from _probe_file(run, name)
        return
    root = Path(place)
    what = f"{name}watched place"
    if not root.is_dir():
        remedy = "correct [watch] path, or make the directory before the training does: mkdir -p"
        yield Check(what, False, f"{root} is no directory", remedy)
        yield from _probe_file(run, name)
        return
    checkpoints = checkpoints_in(root, run.watch.format, run.watch.ready_markers, now())
    yield _contents(root, checkpoints, what)
    yield from _events_and_clock(root, name, now)
    yield from _model_and_probe(run, checkpoints.newest, name)
    yield from check_pins(root, checkpoints.newest, state_dir, name, Reserve(run.watch.keep_free_gb))


def _contents(root: Path, checkpoints: Checkpoints, what: str) -> Check:
    newest = checkpoints.newest
    if newest is not None:
        step = "" if newest.step is None else f", step {newest.step:,}"
        others = "".join(
            f"; {len(some)} {word}"
            for some, word in ((checkpoints.waiting, "not whole"), (checkpoints.unreadable, "unreadable"))
            if some
        )
        count = f"{len(checkpoints.whole)} whole checkpoint{'s' if len(checkpoints.whole) != 1 else ''} in {root}"
        return Check(what, True, f"{count}, the last {newest.path.name} ({newest.format}{step}){others}")
    if checkpoints.misplaced:
        return Check(what, False, f"no checkpoint in {root}: {'; '.join(checkpoints.misplaced)}", WHERE)
    if checkpoints.unreadable:
        path, reason, remedy = checkpoints.unreadable[0]
        remedy = remedy or "save it in a format that is read"
        return Check(what, False, f"nothing readable in {root}: {path}: {reason}", remedy)
    if checkpoints.waiting:
        path, reason, remedy = checkpoints.waiting[0]
        remedy = remedy or "ask again once it is written"
        return Check(what, None, f"nothing whole in {root} yet: {path}: {reason}", remedy)
    words = checkpoints.other[0] if checkpoints.other else f"{root} is empty as yet"
    return Check(what, None, words, "ask again once there is a checkpoint: then the model is tried")


def _bucket(run: RunSettings, url: str, name: str) -> Iterator[Check]:
    what = f"{name}watched place"
    try:
        objects = Store(url).list()
    except PeelError as error:
        yield failed(what, error)
        return
    newest = max((remote.modified_ns for remote in objects), default=0)
    words = f"{url} can be listed: {len(objects):,} objects" + ("" if newest else "; it is empty as yet")
    listing = ObjectListing(url.rstrip("/").rpartition("/")[2], objects)
    formats = registry.formats(run.watch.format)
    found_below = () if Division(listing.name, formats).units(objects) else misplaced(listing, url, formats)
    if found_below:
        yield Check(what, False, f"no checkpoint in {url}: {'; '.join(found_below)}", WHERE)
        return
    yield Check(what, True, words)
    remedy = "try one: peel-agent scan URL --probe FILE"
    yield Check(f"{name}model", None, "a checkpoint of an object store is not fetched only to be looked at", remedy)


def _events_and_clock(root: Path, name: str, now: Callable[[], float]) -> Iterator[Check]:
    """A hidden file is written to the watched place and removed: whether it is heard of, and what its time is."""
    kind = kind_of(root) or "a file system of unknown kind"
    what = f"{name}file system events"
    before = now()
    with Hints(root) as hints:
        has_events = hints.status.startswith("events")
        try:
            with tempfile.NamedTemporaryFile(prefix=".peel-agent-", dir=root) as file:
                file.write(b"x")
                file.flush()
                written = Path(file.name).stat().st_mtime
        except OSError as error:
            yield Check(what, None if has_events else True, f"{kind}: {hints.status}")
            words = f"it could not be told: nothing may be written to {root} ({error.strerror or error})"
            yield Check(f"{name}clock", None, words, "nothing to do, where both machines have NTP")
            return
        heard = has_events and hints.wait(EVENT_SECONDS)
        if has_events and not heard:
            remedy = "nothing to do: timed scans see everything, [watch] poll_seconds says how soon"
            yield Check(what, None, f"{kind}: a file that was written was not heard of", remedy)
        else:
            yield Check(what, True, f"{kind}: {hints.status}")
    yield _clock(f"{name}clock", written - min(max(written, before), now()), kind in SILENT)


def _clock(what: str, ahead: float, is_remote: bool) -> Check:
    """`ahead` is by how many seconds the file's time is out of the time in which it was written."""
    if abs(ahead) <= CLOCK_SECONDS:
        return Check(what, True, "the watched file system's clock agrees with this machine's")
    which = "ahead of" if ahead > 0 else "behind"
    who = "the file server" if is_remote else "the machine that keeps it"
    words = f"the watched file system's clock is {abs(ahead):.0f} s {which} this machine's"
    return Check(what, False, words, f"have both set by NTP: {who} gives checkpoints wrong times")


# ---------------------------------------------------------------- model and probe


def _probe_file(run: RunSettings, name: str) -> Iterator[Check]:
    """The probe without a model to hold it against: whether it is named, and there."""
    what = f"{name}probe"
    try:
        path = probe_path(run.probe)
    except PeelError as error:
        yield failed(what, error)
        return
    if path.exists():
        remedy = "ask again once there is a checkpoint"
        yield Check(what, None, f"{path} is there; whether it suits the model is not known yet", remedy)
    else:
        yield Check(
            what, False, f"no probe at {path}", "correct [probe] path; it is taken from where peel-agent starts"
        )


def _model_and_probe(run: RunSettings, newest: CheckpointRef | None, name: str) -> Iterator[Check]:
    """What a worker would say of the newest whole checkpoint, and of the probe for it."""
    if newest is None:
        yield from _probe_file(run, name)
        return
    opened = opened_by_child(newest, run.model, run.probe, quick=run.peel.effort == "quick")
    fault = opened.broken or opened.fault
    if opened.model is None:
        reason = fault or PeelError("it could not be opened", remedy="please report it")
        yield failed(f"{name}model", reason)
        yield from _probe_file(run, name)
        return
    yield Check(f"{name}model", True, f"{newest.path.name}: {opened.model.words}")
    yield _probe(run, opened, f"{name}probe")


def _probe(run: RunSettings, opened: Opened, what: str) -> Check:
    if opened.probe is not None:
        return Check(what, True, f"{run.probe.path}: {opened.probe}")
    try:
        probe_path(run.probe)
    except PeelError as error:
        return failed(what, error)
    return failed(what, opened.probe_fault or PeelError("it was not read", remedy="please report it"))


# ---------------------------------------------------------------- pins


def check_pins(
    root: Path, newest: CheckpointRef | None, state_dir: Path | None, name: str, reserve: Reserve
) -> Iterator[Check]:
    """Whether checkpoints that wait can be kept from rotation: the newest is held for a moment, as the agent would."""
    what = f"{name}pins"
    if newest is None or state_dir is None:
        yield Check(what, None, "they are tried on a checkpoint, and there is none", "ask again once there is one")
        return
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=nearest(state_dir)) as stand_in:
            pins = Pins(root, Path(stand_in))
            try:
                is_held_now = pins.pin(newest).held is not None
            finally:
                pins.release(newest)
    except OSError as error:
        is_held_now, why = False, f": {error.strerror or error}"
    else:
        why = f": {pins.why_not}"
    if is_held_now:
        yield Check(what, True, "a checkpoint that waits can be held by links, whatever is rotated away meanwhile")
    else:
        yield Check(
            what,
            False,
            f"a checkpoint that waits cannot be held{why}: one that is rotated away before its turn is lost",
            "run the agent as the user that writes the checkpoints, who may link to them, or have the training keep "
            "more of them (save_total_limit)",
        )
    yield _space(root, newest, name, reserve)


def _space(root: Path, newest: CheckpointRef, name: str, reserve: Reserve) -> Check:
    """Pins are let go of when little is left of the file system; a checkpoint that is rewritten in place is copied."""
    usage = shutil.disk_usage(root)
    kept, size = reserve.of(usage.total), sum(stamp.size for stamp in newest.own_files)
    words = f"{usage.free / GIB:.1f} GiB are free in {root}; {kept / GIB:.1f} GiB are left to the training"
    what = f"{name}space"
    if usage.free < kept:
        remedy = "make room on that file system, or lower [watch] keep_free_gb"
        return Check(what, False, f"{words}: no checkpoint is held there now", remedy)
    if usage.free - size < kept:
        return Check(what, True, f"{words}, so that there is no room for a copy of one that is rewritten in place")
    return Check(what, True, words)
