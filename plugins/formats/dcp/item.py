"""One chunk in a `.distcp` file: an archive of torch.save inside the file, with a pickle and the numbers' bytes.

Only where the numbers lie is found out here; they are read by whoever asked.
"""

from __future__ import annotations

from peel_agent.errors import CheckpointError, TornCheckpoint

from ..files.checkpoint_folder import SAVE_AGAIN, refused
from ..pickles.machine import ORDERED_DICT
from ..pickles.torch_archive import View, offsets_of, view_of
from ..pickles.torch_pickle import REBUILD_TENSOR, UNTYPED, read_pickle
from ..pickles.torch_tensors import DTYPE_BYTES, STORAGES
from ..pickles.torch_zip import read_archive
from .metadata import StoredChunk

MAX_READ = 1 << 20  # the directory of an archive with one tensor has under 1 KiB, its pickle under 300 bytes
_PICKLE_MEMORY = 16 << 20
_WORDS = frozenset({*REBUILD_TENSOR, UNTYPED, ORDERED_DICT, *(("torch", name) for name in (*STORAGES, *DTYPE_BYTES))})


def find_numbers(descriptor: int, chunk: StoredChunk, dtype: str) -> View:
    """Where the numbers of a chunk lie in its open file, side by side in some order of the dimensions.

    Raises CheckpointError when what is stored there is not a tensor of this dtype and of the chunk's sizes.
    """
    item = chunk.item
    what = f"{item.file}, {item.length:,} bytes from {item.offset:,} on:"
    try:
        archive = read_archive(descriptor, what, item.length, start=item.offset, most=MAX_READ)
        pickle = archive.content("data.pkl", MAX_READ)
        content = read_pickle(pickle, f"{what} data.pkl", words=_WORDS, memory=_PICKLE_MEMORY)
        view = view_of(content.value, offsets_of(archive, content), f"{what} data.pkl")
    except TornCheckpoint:
        raise
    except CheckpointError as error:  # never incomplete: the file is as long as it should be, nothing more will come
        raise CheckpointError(error.what, remedy=SAVE_AGAIN) from error
    if view.dtype != dtype:
        raise refused(what, f"holds {view.dtype} where .metadata says {dtype}")
    if view.shape != chunk.sizes:
        raise refused(what, f"holds another size than the {chunk.sizes} of .metadata")
    if sum(storage.size for storage in content.storages.values()) != view.size or not _is_dense(view):
        raise refused(what, "has strides, an offset or a storage by which its numbers are not side by side, and alone")
    return view


def _is_dense(view: View) -> bool:
    """True when the strides visit each of the numbers once, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(view.strides, view.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
