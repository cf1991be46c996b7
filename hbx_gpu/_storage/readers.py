"""Readers turn extents into addresses of stored bytes. They check that bytes exist, not what they hold."""

from __future__ import annotations

import bisect
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._storage.chunks import REPLACED, ChunkDirectory, Extents
from hbx_gpu._storage.file_identity import Identity
from hbx_gpu._storage.maps import FileMap
from hbx_gpu._untrusted import open_regular
from hbx_gpu.errors import CorruptChunkError, UnsupportedError

MAX_GAP = 16 << 10  # reading 16 KiB that nobody needs costs less than another system call
_MAX_SIZE = 8 << 20
_ALIGNMENT = 8
_MAX_OPEN = 512  # half of the common limit of 1,024 descriptors per process
_MAX_MAPS = 8192  # a map holds no descriptor; Linux allows 65,530 maps per process
_RESIDENT_BYTES = 256 << 20  # bytes read from mapped files before their pages are handed back
# The same for plain files. It is larger, because touching the pages of a row again costs as much as copying
# the row.
_RESIDENT_PLAIN_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Runs:
    """Byte ranges to read, and which of them holds each extent.

    Attributes
    ----------
    file, offset, nbytes
        int32, int64, int64, (n_runs,). File, first byte and bytes of each run, in ascending order of
        (file, offset). Runs of one file do not overlap.
    run
        int64, (k,). Run that holds each extent; -1 where there is nothing to read.
    """

    file: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    run: np.ndarray


def coalesce(
    file: np.ndarray, offset: np.ndarray, nbytes: np.ndarray, *, max_gap: int, max_size: int
) -> Runs:
    """Merge extents into runs, each of which is read at once; every byte asked for lies in exactly one run.

    Parameters
    ----------
    file, offset, nbytes
        Integers, (k,). Any order; repeats and overlaps are allowed; nbytes <= 0 reads nothing.
    max_gap
        Neighboring extents with at most this many bytes between them are merged.
    max_size
        Most bytes of a run. A larger extent is one run all the same, and so are extents that overlap each
        other: no byte is read twice.
    """
    run = np.full(len(file), -1, np.int64)
    wanted = np.flatnonzero(np.asarray(nbytes) > 0)
    order = wanted[np.lexsort((offset[wanted], file[wanted]))]
    files, starts = file[order].astype(np.int64), offset[order].astype(np.int64)
    ends = starts + nbytes[order]
    if not len(order):
        empty = np.zeros(0, np.int64)
        return Runs(empty.astype(np.int32), empty, empty, run)
    # Shift offsets so that the files follow each other on one line; one running maximum then serves all
    # files.
    new_file = np.flatnonzero(np.diff(files, prepend=files[0] - 1))
    lengths = np.maximum.reduceat(ends, new_file)
    shift = np.repeat(np.cumsum(lengths) - lengths, np.diff(new_file, append=len(files)))
    reach = np.maximum.accumulate(ends + shift) - shift  # furthest byte wanted so far in this file
    gap = np.full(len(order), np.iinfo(np.int64).max)
    gap[1:] = starts[1:] - reach[:-1]
    gap[new_file] = np.iinfo(np.int64).max
    first = np.array(_run_starts(starts.tolist(), reach.tolist(), gap, max_gap, max_size))
    run[order] = np.repeat(np.arange(len(first)), np.diff(first, append=len(order)))
    last = np.append(first[1:], len(order)) - 1
    return Runs(files[first].astype(np.int32), starts[first], reach[last] - starts[first], run)


def _run_starts(
    starts: list[int], reach: list[int], gap: np.ndarray, max_gap: int, max_size: int
) -> list[int]:
    """Return the positions of the extents that begin a run, chosen greedily from the left."""
    breaks = np.flatnonzero(gap > max_gap).tolist()
    may_split = np.flatnonzero(gap >= 0).tolist()  # not inside an overlap
    first: list[int] = []
    for begin, end in zip(breaks, [*breaks[1:], len(starts)], strict=True):
        while begin < end:
            first.append(begin)
            # Find the first extent that does not fit, then the last place before it (or the first after it)
            # where splitting is allowed.
            over = bisect.bisect_right(reach, starts[begin] + max_size, begin, end)
            if over >= end:
                break
            place = bisect.bisect_right(may_split, over) - 1
            if may_split[place] <= begin:
                place += 1
            begin = may_split[place] if place < len(may_split) else end
    return first


@dataclass(frozen=True, slots=True)
class Slab:
    """Stored chunks in host memory.

    Attributes
    ----------
    address
        uint64, (k,). Absolute address of each extent's first byte; 0 where it has no bytes.
    nbytes
        int64, (k,). Stored bytes of each extent; -1 for an absent chunk.
    owner
        Object that keeps the memory alive. Addresses are valid while the slab, or its owner, is referenced.
    copy
        Function that reads parts of the slab into other memory without touching the addresses. It is called
        with records of ``source`` (address), ``target`` (offset) and ``nbytes``, and a uint8 array. None
        where parts are to be copied from the addresses.
    """

    address: np.ndarray
    nbytes: np.ndarray
    owner: object
    copy: Callable[[np.ndarray, np.ndarray], None] | None = None

    def view(self, i: int) -> np.ndarray:
        """Return the stored bytes of extent i without a copy: uint8, (nbytes[i],), read-only."""
        nbytes = int(self.nbytes[i])
        if nbytes < 0:
            raise ValueError(f"extent {i} is absent: its chunk is all fill value, there are no bytes to view")
        if nbytes == 0:
            return np.frombuffer(b"", np.uint8)
        return np.asarray(Memory(int(self.address[i]), nbytes, self.owner))


class Memory:
    """Memory of another owner, in a form that NumPy makes arrays of; these keep `owner` alive."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": (nbytes,),
            "typestr": "|u1",
        }


_T = TypeVar("_T")


class _Cache(Generic[_T]):
    """Opened files, of which the least recently used is dropped first.

    Nothing is closed here: an entry closes itself when its last user drops it. No thread can therefore see
    its descriptor closed, or reused for another file, during a read.
    """

    def __init__(self, open_file: Callable[[str], _T], bound: int) -> None:
        self._open_file, self._bound = open_file, bound
        self._entries: OrderedDict[str, _T] = OrderedDict()
        self._lock = threading.Lock()

    def peek(self, path: str) -> _T | None:
        """Return the opened file if it is in the cache, or None."""
        with self._lock:
            entry = self._entries.get(path)
            if entry is not None:
                self._entries.move_to_end(path)
            return entry

    def open(self, path: str, check: Callable[[_T], None]) -> _T:
        """Open a file, and keep it if `check` raises nothing."""
        entry = self._open_file(path)
        check(entry)
        with self._lock:
            self._entries[path] = entry
            self._entries.move_to_end(path)
            while len(self._entries) > self._bound:
                self._entries.popitem(last=False)
        return entry

    def values(self) -> list[_T]:
        with self._lock:
            return list(self._entries.values())

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


class Reader(ABC):
    """Reads the stored chunks of a `ChunkDirectory` into host memory.

    A reader can be used from many threads, and is a context manager. Its pickle holds its directory, not its
    opened files.
    """

    def __init__(self, directory: ChunkDirectory) -> None:
        self.directory = directory

    @abstractmethod
    def read(self, extents: Extents) -> Slab:
        """Read extents into memory.

        Parameters
        ----------
        extents
            The extents, from `ChunkDirectory.extents` of this reader's directory.

        Raises
        ------
        CorruptChunkError
            A file is gone, is too short for an extent, or was replaced by another one after its chunks were
            looked up. A file that is open already is read on, whatever its path leads to by then.
        OSError
            The file cannot be opened or read for any other reason.
        """

    @abstractmethod
    def close(self) -> None:
        """Drop the opened files. Slabs stay valid; a later read opens the files again."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.directory,))

    def _too_short(self, extents: Extents, file: int, size: int) -> CorruptChunkError:
        """Make the error for the first extent of a file that reaches beyond `size` bytes."""
        beyond = (extents.file == file) & (extents.offset + extents.nbytes > size)
        if not beyond.any():
            return self._error_in(
                extents,
                file,
                f"a read came to the end of the file before its {size} bytes were read; the storage lost "
                "sight of them, or the file is being rewritten: try again when nothing writes to it",
            )
        i = int(np.flatnonzero(beyond)[0])
        offset, nbytes = int(extents.offset[i]), int(extents.nbytes[i])
        reason = (
            f"bytes {offset} + {nbytes} are beyond the end of the file, which has {size} now; it was cut "
            "short after it was written, copy it again from its origin"
        )
        return self.directory.error_at(file, offset, nbytes, reason)

    def _gone(self, extents: Extents, file: int) -> CorruptChunkError:
        reason = "the file was there when its chunks were looked up, and is missing now"
        return self._error_in(extents, file, reason)

    def _error_in(self, extents: Extents, file: int, reason: str) -> CorruptChunkError:
        i = int(np.flatnonzero(extents.file == file)[0])
        return self.directory.error_at(file, int(extents.offset[i]), int(extents.nbytes[i]), reason)

    def _check_opened(self, extents: Extents, file: int, identity: Identity) -> None:
        """Raise an error if a file that was just opened is not the one whose chunks were looked up."""
        if identity != self.directory.identities[file]:
            raise self._error_in(extents, file, REPLACED)
        # A system reuses the inode number of a deleted file, so the metadata are compared too.
        self.directory.check_current(self.directory.array_of(file))


class PreadReader(Reader):
    """Reader that reads into one contiguous buffer: neighboring extents at once, and each byte once.

    Parameters
    ----------
    directory
        Where the chunks lie.
    max_gap, max_size
        As for `coalesce`, in bytes.
    """

    def __init__(
        self, directory: ChunkDirectory, *, max_gap: int = MAX_GAP, max_size: int = _MAX_SIZE
    ) -> None:
        super().__init__(directory)
        if not hasattr(os, "preadv"):  # Windows
            raise UnsupportedError(
                f"reading with {option('io', 'pinned')} needs preadv of Linux or macOS, which {sys.platform} "
                "does not have"
            )
        self._max_gap, self._max_size = max_gap, max_size
        self._files = _Cache(_Descriptor, _MAX_OPEN)

    def __reduce__(self) -> tuple[object, ...]:
        return (_pread_reader, (self.directory, self._max_gap, self._max_size))

    def read(self, extents: Extents) -> Slab:
        runs = coalesce(
            extents.file, extents.offset, extents.nbytes, max_gap=self._max_gap, max_size=self._max_size
        )
        # Each run is as far from a multiple of 8 as in the file, so that elements of plain files stay
        # aligned.
        shift = runs.offset % _ALIGNMENT
        room = -(-(shift + runs.nbytes) // _ALIGNMENT) * _ALIGNMENT
        place = np.cumsum(room) - room + shift
        buffer = np.empty(int(room.sum()), np.uint8)
        current, descriptor = -1, None
        for file, offset, nbytes, at in zip(
            runs.file.tolist(), runs.offset.tolist(), runs.nbytes.tolist(), place.tolist(), strict=True
        ):
            if file != current or descriptor is None:
                current, descriptor = file, self._open(extents, file)
            if not descriptor.read([buffer[at : at + nbytes].data], offset):
                raise self._too_short(extents, file, descriptor.size())
        base = np.uint64(buffer.ctypes.data)
        stored = runs.run >= 0
        address = np.zeros(len(extents), np.uint64)
        run = runs.run[stored]
        inside = extents.offset[stored] - runs.offset[run] + place[run]
        address[stored] = base + inside.astype(np.uint64)
        return Slab(address, extents.nbytes, buffer)

    def close(self) -> None:
        self._files.clear()

    def _open(self, extents: Extents, file: int) -> _Descriptor:
        path, identity = self.directory.paths[file], self.directory.identities[file]
        descriptor = self._files.peek(path)
        if descriptor is not None and descriptor.identity == identity:
            return descriptor
        try:
            return self._files.open(path, lambda entry: self._check_opened(extents, file, entry.identity))
        except FileNotFoundError:
            raise self._gone(extents, file) from None


def _pread_reader(directory: ChunkDirectory, max_gap: int, max_size: int) -> PreadReader:
    return PreadReader(directory, max_gap=max_gap, max_size=max_size)


class _Descriptor:
    """A file descriptor that closes with its last reference."""

    _fd = -1

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = open_regular(path)
        found = os.fstat(self._fd)
        self.identity = (found.st_dev, found.st_ino)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, targets: list[memoryview], offset: int) -> bool:
        """Fill the targets one after the other from `offset` on; return False if the file ends before."""
        try:
            while targets:
                count = os.preadv(self._fd, targets, offset)
                if count == 0:
                    return False
                offset += count
                while targets and count >= len(targets[0]):
                    count -= len(targets.pop(0))
                if count:
                    targets[0] = targets[0][count:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from error
        return True


class MmapReader(Reader):
    """Reader that maps files and points into the maps, without a copy; processes share the pages.

    If a file is cut short while a slab points into it, the kernel ends the process (SIGBUS), as with any map.
    The size of every file is checked before each read, so this happens only if a file shrinks within one
    window of batches. Where files may shrink, use `preadv` (``io="pinned"`` in `make_loader`).

    Pages that were touched count as memory of this process. They are handed back after `resident_bytes` of
    reads: they then stay in the page cache, and touching one again costs a minor page fault. Bytes of chunks
    that are not looked at (`Extents.share`) do not count. Files that together are smaller than
    `resident_bytes` are never handed back.
    """

    def __init__(self, directory: ChunkDirectory, *, resident_bytes: int | None = None) -> None:
        super().__init__(directory)
        if resident_bytes is None:
            resident_bytes = _RESIDENT_PLAIN_BYTES if directory.has_plain_files else _RESIDENT_BYTES
        self._maps = _Cache(FileMap, _MAX_MAPS)
        self._resident_bytes = resident_bytes
        self._read_bytes = 0

    def read(self, extents: Extents) -> Slab:
        file, offset, nbytes = extents.file, extents.offset, extents.nbytes
        stored = nbytes > 0
        some_absent = not stored.all()
        if some_absent:
            file, offset, nbytes = file[stored], offset[stored], nbytes[stored]
        if not len(file):
            return Slab(np.zeros(len(stored), np.uint64), extents.nbytes, [])
        # Extents in a row mostly lie in one file, which is looked up once for all of them.
        first = [0, *((file[1:] != file[:-1]).nonzero()[0] + 1).tolist()]
        files = file[first].tolist()
        needed: dict[int, int] = {}
        for number, end in zip(files, np.maximum.reduceat(offset + nbytes, first).tolist(), strict=True):
            needed[number] = max(end, needed.get(number, 0))
        maps = {number: self._map(extents, number, end) for number, end in needed.items()}
        counts = [b - a for a, b in pairwise([*first, len(file)])]
        address = np.repeat(np.array([maps[number].address for number in files], np.uint64), counts)
        address += offset.view(np.uint64)
        if some_absent:
            held, address = address, np.zeros(len(stored), np.uint64)
            address[stored] = held
        # Without the lock, threads may race and hand back a little early or late, which does no harm.
        self._read_bytes += int(extents.share * int(nbytes.sum()))
        if self._read_bytes > self._resident_bytes:
            self._read_bytes = 0
            maps_now = self._maps.values()
            if sum(entry.nbytes for entry in maps_now) > self._resident_bytes:
                for entry in maps_now:
                    entry.hand_back()
        return Slab(address, extents.nbytes, maps)

    def close(self) -> None:
        self._maps.clear()

    def _map(self, extents: Extents, file: int, needed: int) -> FileMap:
        path, identity = self.directory.paths[file], self.directory.identities[file]
        entry = self._maps.peek(path)
        if entry is not None and (entry.nbytes < needed or entry.identity != identity):
            entry = None
        try:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) != identity:
                # A mapped file stays whole even if its path leads to another file by now.
                if entry is None:
                    raise self._error_in(extents, file, REPLACED)
                return entry
            if needed > found.st_size:
                raise self._too_short(extents, file, found.st_size)
            if entry is None:
                entry = self._maps.open(path, lambda new: self._check_opened(extents, file, new.identity))
        except FileNotFoundError:
            if entry is None:
                raise self._gone(extents, file) from None
            return entry
        if needed > entry.nbytes:
            raise self._too_short(extents, file, entry.nbytes)
        return entry
