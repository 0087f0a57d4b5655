"""A folder of an object store, `s3://bucket/run` or `gs://bucket/run`, through fsspec: what is in it, and its bytes.

Objects appear whole, and a reader may see any of them replaced or gone at the next request.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from peel_agent.errors import (
    ConfigurationError,
    PeelError,
    StoreUnavailable,
    TornCheckpoint,
    printable,
)

LIBRARIES: Mapping[str, tuple[str, str]] = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""The library of each scheme, and the extra that installs it."""

OPTIONS: Mapping[str, frozenset[str]] = {
    "s3fs": frozenset({"anon", "endpoint_url", "profile", "requester_pays"}),
    "gcsfs": frozenset({"anon", "endpoint_url", "project", "requester_pays"}),
}
"""What may be configured. Credentials may not: the libraries find them in the environment and in their own files."""

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0
CALL_SECONDS = 60.0
"""After so long a listing or a window of bytes counts as failed, whatever the library is still trying."""

MAX_OBJECTS = 100_000
BLOCK_BYTES = 8 << 20
BLOCKS_AT_ONCE = 4
"""One request a block: more would fill the network that the training uses too."""

_MISTAKES = frozenset({errno.EINVAL, errno.EPERM, getattr(errno, "EREMCHG", errno.EINVAL)})
_SETUP_ERRORS = re.compile(r"\w*Credential\w*|ProfileNotFound|\w*Region\w*Error|ParamValidationError|RefreshError")
_LATEST_NS = 4 * 10**18  # the year 2096: file systems keep no later time as it is


@dataclass(frozen=True)
class RemoteObject:
    """One object: its name below the store's root, and what tells it from another of the same name.

    `version` is the store's etag, or its generation where it has one. `modified_ns` is in Unix nanoseconds; where the
    store tells whole seconds only, their fraction is made from the version: an object that is overwritten within the
    second then has another time, and a checkpoint another fingerprint.
    """

    name: str
    size: int
    version: str
    modified_ns: int


def is_url(path: str) -> bool:
    """Whether a path names an object store and not a file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def name_fault(name: str) -> str | None:
    """Why an object of this name, which anybody may have chosen, is not written to disk; None when it can be."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has a part that is empty, `.` or `..`"
    if not name.isprintable():
        return "has characters that cannot be printed"
    if re.search(r"[\\?*#]", name):
        return "has one of the characters \\ ? * #"
    if len(parts) > 8 or len(name.encode()) > 1024 or any(len(part.encode()) > 255 for part in parts):
        return "is too long or too deep"
    return None


class Store:
    """One folder of a bucket. Nothing is asked of the store before the first `list`.

    Raises ConfigurationError for an unknown scheme or option, a missing library, and a URL that is none. The first
    request raises it too, for a bucket that is not there or may not be listed; what fails after one that succeeded,
    and every outage, is StoreUnavailable.
    """

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        scheme, _, path = url.partition("://")
        self._library, extra = _library(scheme, url)
        self._path = _checked(path.rstrip("/"))
        self.url = f"{scheme}://{self._path}"
        self.name = self._path.rpartition("/")[2]
        if importlib.util.find_spec(self._library) is None:
            raise ConfigurationError(
                f"{self.url} cannot be read: {self._library} is not installed",
                remedy=f'pip install "peel-agent[{extra}]"',
            )
        self._options = _constructor_options(self._library, options or {})
        self._opened: Any = None
        self._reached = False

    def list(self, under: str = "") -> tuple[RemoteObject, ...]:
        """Every object below the root, or below `under` (or of that very name), in the order of their names.

        The empty objects that stand for folders are left out.
        """
        path = f"{self._path}/{under}" if under else self._path
        with self._asking():
            listed = self._filesystem().find(path, detail=True, withdirs=False, **self._limit())
        self._reached = True
        if len(listed) > MAX_OBJECTS:
            raise ConfigurationError(
                f"{self.url} holds {len(listed):,} objects, more than the {MAX_OBJECTS:,} that are looked through",
                remedy="give the folder that the run's checkpoints are directly in",
            )
        if self._path in listed:
            raise ConfigurationError(f"{self.url} is an object", remedy="give the folder that it is in")
        start = len(self._path) + 1
        objects = (_remote(key[start:], facts) for key, facts in listed.items() if facts.get("type") == "file")
        return tuple(sorted((o for o in objects if o.size or not o.name.endswith("/")), key=lambda o: o.name))

    def stat(self, name: str) -> RemoteObject | None:
        """The object of this name below the root, or None."""
        try:
            with self._asking(of_one=True):
                facts = self._filesystem().info(f"{self._path}/{name}", **self._limit())
        except FileNotFoundError:
            return None
        return _remote(name, facts) if facts.get("type") == "file" else None

    def download(self, remote: RemoteObject, target: Path, stopping: Callable[[], bool]) -> bool:
        """Writes an object to a new file, with the object's time; False when `stopping` said so in between.

        `target` appears only when it is whole and on disk. Raises TornCheckpoint when the object is gone or shorter
        than listed; one that was replaced meanwhile must be found by listing again.
        """
        part = target.with_name(target.name + ".tmp")
        with part.open("wb") as file:
            for window in range(0, remote.size, BLOCK_BYTES * BLOCKS_AT_ONCE):
                if stopping():
                    return False
                for block in self._blocks(remote, window):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.utime(part, ns=(remote.modified_ns, remote.modified_ns))
        part.replace(target)
        return True

    def close(self) -> None:
        """Hangs up; the next request connects again."""
        filesystem, self._opened = self._opened, None
        client = getattr(filesystem, "_s3creator", None)
        if client is not None:
            filesystem.close_session(filesystem.loop, client)

    def _blocks(self, remote: RemoteObject, window: int) -> Sequence[bytes]:
        end = min(remote.size, window + BLOCK_BYTES * BLOCKS_AT_ONCE)
        starts = list(range(window, end, BLOCK_BYTES))
        ends = [min(end, start + BLOCK_BYTES) for start in starts]
        path = f"{self._path}/{remote.name}"
        try:
            with self._asking(of_one=True):
                blocks: Sequence[bytes] = self._filesystem().cat_ranges(
                    [path] * len(starts), starts, ends, on_error="raise", **self._limit()
                )
        except FileNotFoundError as error:
            raise torn(f"{self.url}/{remote.name} vanished while it was fetched") from error
        if [len(block) for block in blocks] != [stop - start for start, stop in zip(starts, ends, strict=True)]:
            raise torn(f"{self.url}/{remote.name} is shorter than the {remote.size:,} bytes it was listed with")
        return blocks

    def _filesystem(self) -> Any:
        if self._opened is None:
            # Its caches would show a listing of before, and hand a closed session to the next store.
            self._opened = importlib.import_module("fsspec").filesystem(
                "s3" if self._library == "s3fs" else "gs",
                skip_instance_cache=True,
                use_listings_cache=False,
                **self._options,
            )
            if self._library == "s3fs":
                self._opened.retries = 2
            # It logs a traceback for each failed attempt, which is told here in one line.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return self._opened

    def _limit(self) -> dict[str, float]:
        return {"timeout": CALL_SECONDS} if getattr(self._filesystem(), "async_impl", False) else {}

    @contextmanager
    def _asking(self, *, of_one: bool = False) -> Iterator[None]:
        """Whatever a request raises, as an error of the tree; for one object, FileNotFoundError as it is."""
        try:
            yield
        except PeelError:
            raise
        # botocore, aiohttp and google.auth each have a tree of errors of their own, and none is imported here.
        except Exception as error:
            if self._reached and of_one and isinstance(error, FileNotFoundError):
                raise
            if not self._reached and _is_mistake(error):
                missing = "there is no such bucket: " if isinstance(error, FileNotFoundError) else ""
                raise ConfigurationError(
                    f"{self.url} cannot be read: {missing}{_said(error)}",
                    remedy="check the bucket's name and region, and that the credentials in the environment (or in the "
                    "library's own files) allow to list it and to get its objects",
                ) from error
            raise StoreUnavailable(
                f"{self.url} cannot be read now: {_said(error)}", remedy="nothing to do: it is tried again"
            ) from error


def _library(scheme: str, url: str) -> tuple[str, str]:
    if scheme not in LIBRARIES or not is_url(url):
        known = ", ".join(f"{name}://" for name in LIBRARIES)
        raise ConfigurationError(
            f"no object store of the scheme {ascii(scheme)[:40]} is known", remedy=f"give a folder, or one of {known}"
        )
    return LIBRARIES[scheme]


def _checked(path: str) -> str:
    if "@" in path.partition("/")[0]:
        raise ConfigurationError(
            "the URL has something before the bucket's name",  # not shown: it may be a password
            remedy="write it as s3://bucket/folder; credentials come from the environment",
        )
    fault = name_fault(path)
    if fault is not None:
        raise ConfigurationError(
            f"the name {ascii(path)[:80]} of the folder {fault}", remedy="write it as s3://bucket/folder"
        )
    return path


def _constructor_options(library: str, options: Mapping[str, str]) -> dict[str, Any]:
    for key in sorted(set(options) - OPTIONS[library]):
        raise ConfigurationError(
            f"unknown option `{key[:80]}` of {library}",
            remedy=f"known: {', '.join(sorted(OPTIONS[library]))}; credentials come from the environment",
        )
    switches = {"anon", "requester_pays"}
    chosen: dict[str, Any] = {key: value for key, value in options.items() if key not in switches}
    chosen |= {key: options[key].lower() in ("1", "true", "yes") for key in switches & set(options)}
    if library == "gcsfs":
        return chosen | ({"token": "anon"} if chosen.pop("anon", False) else {})
    attempts = {"total_max_attempts": 2, "mode": "standard"}
    return chosen | {
        "config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": attempts}
    }


def _remote(name: str, facts: Mapping[str, Any]) -> RemoteObject:
    version = str(facts.get("generation") or facts.get("ETag") or facts.get("etag") or "").strip('"')
    modified = _nanoseconds(facts.get("LastModified") or facts.get("updated") or facts.get("mtime"))
    if modified % 10**9 == 0:
        modified += int(hashlib.sha256(version.encode()).hexdigest(), 16) % 10**6 * 1000
    return RemoteObject(name, int(facts.get("size") or 0), version, modified)


def _nanoseconds(when: object) -> int:
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    if not isinstance(when, datetime):
        return 0
    seconds = int(when.replace(microsecond=0).timestamp())
    return min(max(seconds * 10**9 + when.microsecond * 1000, 0), _LATEST_NS)


def _is_mistake(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | ValueError):
        return True
    if isinstance(error, OSError) and error.errno in _MISTAKES:
        return True
    return _SETUP_ERRORS.fullmatch(type(error).__name__) is not None


def _said(error: Exception) -> str:
    """What the library or the server said, in one short line without control characters and passwords of a URL."""
    text = re.sub(r"://[^/@\s]*@", "://", printable(str(error)).strip()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def torn(what: str) -> TornCheckpoint:
    """The error of a checkpoint that changed while it was fetched."""
    return TornCheckpoint(what, remedy="nothing to do: it is fetched again once it is at rest")
