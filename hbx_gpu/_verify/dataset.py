"""One dataset: where its chunks lie, their checksums, and their content."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, Protocol

import numpy as np

from hbx_gpu._codecs.chain import check_crc32c
from hbx_gpu._codecs.checksum import WITH_ITSELF
from hbx_gpu._codecs.crc32c_numba import crc32c_each
from hbx_gpu._codecs.rowpack_format import read_header
from hbx_gpu._executors import handed_out
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Reader, Slab
from hbx_gpu._verify import raw
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

    def column_limits(self) -> np.ndarray:
        """What every column number of an array is less than, int64; -1 for arrays of anything else."""
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
    lost = list(dict.fromkeys(_places(dataset.directory, chunks)))
    yield from lost
    if lost or level == "fast":
        return  # where a chunk lies is not known, so no row of the dataset can be relied on
    by_checksum, decoded = _divided(dataset, chunks, level)
    with ThreadPoolExecutor(threads, "hbx_gpu-verify") as pool:
        reader = dataset.open_reader("mmap")
        blocks = _blocks(dataset.directory, by_checksum)
        yield from _run(
            pool,
            (partial(_checksums, dataset.directory, reader, block) for block in blocks),
            threads,
            progress,
        )
        if len(decoded) and not _whole_where_it_lies(pool, dataset, reader, decoded, threads, progress):
            rows = np.arange(len(dataset), dtype=np.int64)
            stored = _nbytes(dataset.directory, decoded)
            yield from _run(
                pool,
                (
                    partial(_content, dataset, part, stored * len(part) // len(rows))
                    for part in (rows[first : first + ROWS] for first in range(0, len(rows), ROWS))
                ),
                threads,
                progress,
            )


def _whole_where_it_lies(
    pool: ThreadPoolExecutor,
    dataset: Stored,
    reader: Reader,
    chunks: np.ndarray,
    threads: int,
    progress: Callable[[int], None],
) -> bool:
    """Whether chunks are raw and whole, so that no row has to be decoded."""
    if not raw.are_raw(dataset.directory, chunks):
        return False
    tasks = (
        partial(_doubts, dataset.directory, reader, block, dataset.column_limits())
        for block in _blocks(dataset.directory, np.sort(chunks))
    )
    return not any(_run(pool, tasks, threads, progress))


def _doubts(
    directory: ChunkDirectory, reader: Reader, chunks: np.ndarray, limits: np.ndarray
) -> tuple[list[str], int]:
    """A line if something may be wrong with raw chunks; and the bytes that were read."""
    whole, nbytes = raw.is_whole(directory, reader, chunks, limits)
    return [] if whole else ["decode the rows"], nbytes


@dataclass(frozen=True, slots=True)
class Found:
    """What a task found in its share of a dataset: lines of damage, and the bytes of chunks it read."""

    places: list[str]
    checksums: list[str]
    content: list[str]
    nbytes: int


def submit(dataset: Stored, level: Level, executor: Executor) -> list[Future[Found]]:
    """Hand a dataset to an executor, in shares of a few thousand chunks.

    Workers need the paths of the data only. A task writes nothing, so it may run twice.
    """
    shares = max(1, -(-len(dataset.needed_chunks()) // _CHUNKS))
    pickled = pickle.dumps(dataset, protocol=pickle.HIGHEST_PROTOCOL)
    return [handed_out(executor, check_share, (pickled, level, share, shares)) for share in range(shares)]


def check_share(pickled: bytes, level: Level, share: int, shares: int) -> Found:
    """Check one of the equal shares of the chunks and rows of a dataset, where its executor runs it."""
    dataset: Stored = pickle.loads(pickled)
    chunks = dataset.needed_chunks()
    mine = chunks[len(chunks) * share // shares : len(chunks) * (share + 1) // shares]
    found = Found(list(_places(dataset.directory, mine)), [], [], 0)
    if found.places or level == "fast":
        return found
    nbytes = 0
    by_checksum, decoded = _divided(dataset, mine, level)
    reader = dataset.open_reader("mmap")
    for block in _blocks(dataset.directory, by_checksum):
        lines, n = _checksums(dataset.directory, reader, block)
        found.checksums.extend(lines)
        nbytes += n
    nbytes += _nbytes(dataset.directory, decoded)
    windows = range(0, len(dataset), ROWS)
    every = _divided(dataset, chunks, level)[1]
    if raw.are_raw(dataset.directory, every):
        limits, blocks = dataset.column_limits(), _blocks(dataset.directory, np.sort(decoded))
        # Any row may need a chunk that is damaged, so a share that has one looks at all of them.
        if not any(_doubts(dataset.directory, reader, block, limits)[0] for block in blocks):
            windows = windows[:0]
    else:
        # Rows do not end where chunks do: they are shared by themselves, wherever a chunk is to be decoded.
        windows = windows[len(windows) * share // shares : len(windows) * (share + 1) // shares]
    for first in windows:
        rows = np.arange(first, min(first + ROWS, len(dataset)), dtype=np.int64)
        found.content.extend(_content(dataset, rows, 0)[0])
    return Found(found.places, found.checksums, found.content, nbytes)


def merged(found: Iterable[Found]) -> list[str]:
    """The lines that :func:`problems` yields, of all shares of a dataset."""
    shares = list(found)
    if lost := [line for share in shares for line in share.places]:
        return list(dict.fromkeys(lost))
    checksums = dict.fromkeys(line for share in shares for line in share.checksums)
    content = dict.fromkeys(line for share in shares for line in share.content)
    return [*checksums, *content]


def _divided(dataset: Stored, chunks: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """The chunks whose checksums are verified, and those that are decoded."""
    has_checksum = np.array([covers(layout) for layout in dataset.directory.layouts], bool)
    covered = has_checksum[np.searchsorted(dataset.directory.base, chunks, "right") - 1]
    covered &= level == "checksums"
    return chunks[covered], chunks[~covered]


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
    for place in np.flatnonzero(_suspect(slab)).tolist():
        try:
            if directory.layouts[arrays[place]].codecs[-1]["name"] == "crc32c":
                check_crc32c(slab.view(place))
            else:
                read_header(slab.view(place), check=True)
        except CorruptChunkError as error:
            found.append(str(directory.error(int(chunks[place]), error.reason)))
    return found, int(slab.nbytes[slab.nbytes > 0].sum())


def _suspect(slab: Slab) -> np.ndarray:
    """bool, (k,). Stored chunks that do not end with the CRC32C of the bytes before it.

    One call without the GIL computes all checksums, so that threads do not wait for each other. What exactly
    is wrong with a chunk is found out by the code that decodes it. Absent chunks hold the fill value and are
    never suspect.
    """
    suspect: np.ndarray = slab.nbytes >= 0
    stored = np.flatnonzero(slab.nbytes > 0)
    suspect[stored] = crc32c_each(slab.address[stored], slab.nbytes[stored]) != WITH_ITSELF
    return suspect


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
