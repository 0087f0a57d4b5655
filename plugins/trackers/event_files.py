"""TensorBoard's event files: one record a checkpoint, in numbered directories, each a run of TensorBoard's.

TensorBoard's curve goes back where its steps do, and its reader never gets past a torn record. So the next directory
begins where the training went back to an earlier step, and where a crash left the last record torn.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from peel_agent.records import Publication

from .local_files import write_whole

FILE = "events.out.tfevents.peel"
"""What TensorBoard takes for an event file has `tfevents` in its name."""

VERSION = "brain.Event:2"
"""What each event file begins with."""

VERDICT = "peel/verdict"
"""The tags of a publication, as a text."""

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")

_WRITING: dict[Path, threading.Lock] = {}


@dataclass
class _Kept:
    """What the directories hold: each publication by step and time, and how the newest directory ends."""

    sizes: dict[Path, int]
    publications: set[tuple[int, int]]
    newest: int
    last_step: int
    ends_whole: bool


class EventFiles:
    """All event files of one run. Several threads of a process may write, each with an object of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: _Kept | None = None
        self._writing = _WRITING.setdefault(folder, threading.Lock())

    def write(self, publication: Publication) -> None:
        """Appends one record, unless it is there already. Raises OSError, and ImportError without `tensorboard`."""
        with self._writing:
            kept = self._read()
            if (publication.step, publication.timestamp_ms) in kept.publications:
                return
            self._kept = None  # unknown until this record is known to be whole
            record = _framed(_event(publication))
            if kept.newest and kept.ends_whole and publication.step > kept.last_step:
                file = self._file(kept.newest)
                _append(file, record)
            else:
                file = self._file(kept.newest + 1)
                version = _proto().event_pb2.Event(wall_time=publication.timestamp_ms / 1000, file_version=VERSION)
                write_whole(file, _framed(version) + record)
            self._kept = _Kept(
                sizes={**kept.sizes, file: file.stat().st_size},
                publications={*kept.publications, (publication.step, publication.timestamp_ms)},
                newest=int(file.parent.name),
                last_step=publication.step,
                ends_whole=True,
            )

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:03d}" / FILE

    def _read(self) -> _Kept:
        """What is there, read again only where a file is of another size than it was."""
        numbers = sorted(int(path.parent.name) for path in self._folder.glob(f"*/{FILE}") if path.parent.name.isdigit())
        sizes = {path: path.stat().st_size for path in map(self._file, numbers)}
        if self._kept is not None and self._kept.sizes == sizes:
            return self._kept
        kept = _Kept(sizes, set(), numbers[-1] if numbers else 0, last_step=-1, ends_whole=True)
        for number in numbers:
            events = list(_events(self._file(number)))
            kept.ends_whole = None not in events
            written = [event for event in events if event is not None and event.HasField("summary")]
            kept.publications |= {(event.step, round(event.wall_time * 1000)) for event in written}
            kept.last_step = max((event.step for event in written), default=-1)
        self._kept = kept
        return kept


def _append(file: Path, record: bytes) -> None:
    size = file.stat().st_size
    with file.open("ab") as stream:
        try:
            stream.write(record)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            os.truncate(file, size)
            raise


def _events(file: Path) -> Iterator[Any]:
    """The events of a file, in order; None in the place of a last record that is torn."""
    proto = _proto()
    with file.open("rb") as stream:
        while header := stream.read(_HEADER.size):
            length = _HEADER.unpack(header)[0] if len(header) == _HEADER.size else 0
            record = stream.read(length + _FOOTER.size) if length <= file.stat().st_size else b""
            body = record[:length]
            if not length or len(record) < length + _FOOTER.size or not _is_intact(body, record[length:], stream):
                yield None
                return
            yield proto.event_pb2.Event.FromString(body)


def _is_intact(body: bytes, footer: bytes, stream: Any) -> bool:
    """Only the last record of a file can be torn: the sum of another is not computed, which takes long."""
    if stream.peek(1):
        return True
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return bool(_FOOTER.unpack(footer)[0] == masked_crc32c(body))


def _framed(event: Any) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def _event(publication: Publication) -> Any:
    """One record with every number as TensorBoard's scalars, and the tags as a text.

    In single precision: TensorBoard's fast reader shows no others (tensorboard-data-server 0.7).
    """
    proto = _proto()
    summary = proto.summary_pb2.Summary()
    scalar = proto.tensor_shape_pb2.TensorShapeProto()
    for key, value in publication.metrics.items():
        tensor = proto.tensor_pb2.TensorProto(dtype=proto.types_pb2.DT_FLOAT, tensor_shape=scalar, float_val=[value])
        summary.value.add(tag=key, tensor=tensor, metadata=proto.scalars.create_summary_metadata("", ""))
    if publication.tags:
        words = "\n".join(f"- {key}: {text}" for key, text in sorted(publication.tags.items()))
        tensor = proto.tensor_pb2.TensorProto(
            dtype=proto.types_pb2.DT_STRING, tensor_shape=scalar, string_val=[words.encode()]
        )
        summary.value.add(tag=VERDICT, tensor=tensor, metadata=proto.texts.create_summary_metadata("", ""))
    return proto.event_pb2.Event(wall_time=publication.timestamp_ms / 1000, step=publication.step, summary=summary)


@dataclass(frozen=True)
class _Proto:
    """The modules of `tensorboard` that make a record."""

    event_pb2: Any
    summary_pb2: Any
    tensor_pb2: Any
    tensor_shape_pb2: Any
    types_pb2: Any
    scalars: Any
    texts: Any


def _proto() -> _Proto:
    from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
    from tensorboard.plugins.scalar import metadata as scalars
    from tensorboard.plugins.text import metadata as texts

    return _Proto(event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2, scalars, texts)
