"""One dataset: where its chunks lie, their checksums, and their content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Literal, Protocol

import numpy as np

from hbx_gpu._codecs.chain import check_crc32c
from hbx_gpu._codecs.rowpack_format import read_header
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Reader
from hbx_gpu.errors import CorruptChunkError, HbxError

Level = Literal["fast", "checksums", "full"]
"""How far a check goes. ``fast``: tables, metadata, and where each chunk lies. ``checksums``: also the
checksum of each chunk, and the content of chunks without one. ``full``: the content of all chunks."""

ROWS = 4_096
"""Rows that are decoded at a time."""
_CHUNKS = 4_096  # chunks looked up at a time
_BYTES = 32 << 20  # bytes of chunks whose checksums are verified at a time
_AHEAD = 2  # tasks per thread that wait


class Stored(Protocol):
    """A dataset over stored arrays: what is checked of it."""

    @property
    def directory(self) -> ChunkDirectory:
        """Where its chunks lie."""
        ...

    def __len__(self) -> int: ...

    def needed_chunks(self) -> np.ndarray:
        """int64, ascending: the chunks that any row needs."""
        ...

    def open_reader(self, kind: str) -> Reader:
        """Open a reader of the chunks."""
        ...

    def read_rows(self, selections: list[np.ndarray]) -> object:
        """Decode rows."""
        ...


def problems(
    dataset: Stored, level: Level, *, threads: int, progress: Callable[[int], None]
) -> Iterator[str]:
    """Yield a line per damage that is found.

    Parameters
    ----------
    dataset
        What is checked, over all its rows.
    level
        How far the check goes.
    threads
        Threads that read and decode.
    progress
        Called with the bytes of chunks that were read since the last call.
    """
    chunks = dataset.needed_chunks()
    lost: set[str] = set()
    for message in _places(dataset.directory, chunks):
        lost.add(message)
        yield message
    if lost or level == "fast":
        return  # where a chunk lies is not known, so no row of the dataset can be relied on
    has_checksum = np.array([covers(layout) for layout in dataset.directory.layouts], bool)
    covered = has_checksum[np.searchsorted(dataset.directory.base, chunks, "right") - 1]
    by_checksum = chunks[covered] if level == "checksums" else chunks[:0]
    with ThreadPoolExecutor(threads, "hbx_gpu-verify") as pool:
        reader = dataset.open_reader("mmap")
        blocks = _blocks(dataset.directory, by_checksum)
        yield from _run(
            pool,
            (partial(_checksums, dataset.directory, reader, block) for block in blocks),
            threads,
            progress,
        )
        if len(by_checksum) < len(chunks):
            rows = np.arange(len(dataset), dtype=np.int64)
            stored = _nbytes(dataset.directory, chunks) - _nbytes(dataset.directory, by_checksum)
            yield from _run(
                pool,
                (
                    partial(_content, dataset, part, stored * len(part) // len(rows))
                    for part in (rows[first : first + ROWS] for first in range(0, len(rows), ROWS))
                ),
                threads,
                progress,
            )


def covers(layout: ArrayLayout) -> bool:
    """Whether a checksum covers each chunk of an array."""
    names = [codec["name"] for codec in layout.codecs]
    return bool(names) and (names[-1] == "crc32c" or "hbx_gpu.rowpack" in names)


def _places(directory: ChunkDirectory, chunks: np.ndarray) -> Iterator[str]:
    """Look up chunks: shard indexes with their checksums, objects that are missing, sizes of files."""
    for first in range(0, len(chunks), _CHUNKS):
        part = chunks[first : first + _CHUNKS]
        try:
            directory.extents(part)
        except HbxError:
            yield from _one_by_one(part, lambda chunk: directory.extents(np.array([chunk])))


def _one_by_one(chunks: np.ndarray, look: Callable[[int], object]) -> Iterator[str]:
    """The errors of chunks that were looked at together, each once."""
    seen: set[str] = set()
    for chunk in chunks.tolist():
        try:
            look(chunk)
        except (HbxError, OSError) as error:
            if str(error) not in seen:
                seen.add(str(error))
                yield str(error)


def _nbytes(directory: ChunkDirectory, chunks: np.ndarray) -> int:
    """Stored bytes of chunks."""
    return int(np.maximum(directory.extents(chunks).nbytes, 0).sum())


def _blocks(directory: ChunkDirectory, chunks: np.ndarray) -> Iterator[np.ndarray]:
    """Cut chunks into runs of about `_BYTES`."""
    for first in range(0, len(chunks), _CHUNKS):
        part = chunks[first : first + _CHUNKS]
        ends = np.cumsum(np.maximum(directory.extents(part).nbytes, 0))
        cuts = np.flatnonzero(np.diff(ends // _BYTES)) + 1
        yield from np.split(part, cuts)


def _checksums(directory: ChunkDirectory, reader: Reader, chunks: np.ndarray) -> tuple[list[str], int]:
    """Verify chunks whose arrays have checksums; the errors, and the bytes."""
    found: list[str] = []
    extents = directory.extents(chunks)
    try:
        slab = reader.read(extents)
    except (HbxError, OSError) as error:
        return [str(error)], 0
    arrays = np.searchsorted(directory.base, chunks, "right") - 1
    for place, (chunk, array) in enumerate(zip(chunks.tolist(), arrays.tolist(), strict=True)):
        if slab.nbytes[place] < 0:
            continue  # absent: its elements are the fill value
        try:
            if directory.layouts[array].codecs[-1]["name"] == "crc32c":
                check_crc32c(slab.view(place))
            else:
                read_header(slab.view(place), check=True)
        except CorruptChunkError as error:
            found.append(str(directory.error(chunk, error.reason)))
    return found, int(slab.nbytes[slab.nbytes > 0].sum())


def _content(dataset: Stored, rows: np.ndarray, nbytes: int) -> tuple[list[str], int]:
    """Decode rows: every chunk that they need, and whether column numbers are in range.

    `nbytes` is about what they are stored in, and is returned with the errors.
    """
    found: list[str] = []
    try:
        dataset.read_rows([rows])
    except (HbxError, OSError) as error:
        found.append(str(error))
        # The error names the first damaged chunk of the window; others hide after it.
        for part in np.array_split(rows, max(1, len(rows) // 64)) if len(rows) > 1 else ():
            try:
                dataset.read_rows([part])
            except (HbxError, OSError) as other:
                if str(other) not in found:
                    found.append(str(other))
    return found, nbytes


def _run(
    pool: ThreadPoolExecutor,
    tasks: Iterable[Callable[[], tuple[list[str], int]]],
    threads: int,
    progress: Callable[[int], None],
) -> Iterator[str]:
    """Run tasks on threads, a few ahead, and yield what they find in their order."""
    seen: set[str] = set()
    left = iter(tasks)
    running: list[Future[tuple[list[str], int]]] = [
        pool.submit(task) for task in islice(left, _AHEAD * threads)
    ]
    while running:
        found, nbytes = running.pop(0).result()
        running += [pool.submit(task) for task in islice(left, 1)]
        progress(nbytes)
        for message in found:
            if message not in seen:
                seen.add(message)
                yield message
