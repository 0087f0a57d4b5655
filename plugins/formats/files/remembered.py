"""What was found in files, remembered by their stamps: every scan asks, and each version of them is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.records import FileStamp

from .checkpoint_folder import WAIT

P = ParamSpec("P")
T = TypeVar("T")


class Remembered(Generic[P, T]):
    """A reading whose arguments, among them the stamps of what it reads, decide what comes of it; made once for each.

    A CheckpointError is remembered too, or else a large file that is refused would be read at every look. Not so a
    disk that failed and a file that changed, nor, without `incomplete`, what may be whole at the next look. `most` are
    kept.
    """

    def __init__(self, anew: Callable[P, T], *, incomplete: bool, most: int = 1024) -> None:
        self.anew = anew
        self._passing = TornCheckpoint if incomplete else (TornCheckpoint, IncompleteCheckpoint)
        self._outcome = lru_cache(maxsize=most)(self._find)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        outcome = self._outcome(*args, **kwargs)  # type: ignore[arg-type]  # paths, texts and stamps can be hashed
        if isinstance(outcome, CheckpointError):
            raise _bare(outcome)
        return outcome

    def _find(self, *args: P.args, **kwargs: P.kwargs) -> T | CheckpointError:
        try:
            return self.anew(*args, **kwargs)
        except self._passing:
            raise
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return _bare(error)


def check_seen(path: Path, files: Iterable[FileStamp], stamps: Iterable[FileStamp]) -> None:
    """Raises TornCheckpoint when files that were read are not those whose stamps were taken before."""
    if not set(files) <= set(stamps):
        raise TornCheckpoint(f"{path.name} changed while it was looked at", remedy=WAIT)


def _bare(error: CheckpointError) -> CheckpointError:
    """The same error without its traceback, whose frames would keep the whole file in memory."""
    return type(error)(error.what, remedy=error.remedy)
