"""Reader that uses kvikio: it reads extents to 4 KiB-aligned places of one buffer in device or host memory.

With GPUDirect Storage, bytes go from the drive to the device without filling the page cache; without it,
kvikio copies them through host memory. This pays for many whole chunks (chunks that stay in device memory);
blocks of random rows are read faster from the page cache. kvikio is imported by the first read.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._storage.chunks import ChunkDirectory, Extents
from hbx_gpu._storage.readers import Reader, Slab, _Cache, coalesce
from hbx_gpu._untrusted import check_regular
from hbx_gpu.errors import DeviceUnavailableError, UnsupportedError

PAGE = 4096
"""Alignment in bytes that direct reads need for file offsets, sizes and memory."""
THREADS = 16
TASK_BYTES = 4 << 20
_MAX_GAP = 64 << 10  # another read takes kvikio about as long as reading so many bytes more
_MAX_SIZE = 16 << 20
_MAX_OPEN = 256  # kvikio holds two descriptors per file


class Sliceable(Protocol):
    """Memory that is read into: a NumPy array, or bytes on a device."""

    def __getitem__(self, part: slice, /) -> object: ...


class Future(Protocol):
    """A read that was started, as kvikio returns it."""

    def get(self) -> int:
        """Wait for the read to end; return the bytes read."""


class File(Protocol):
    """The part of ``kvikio.CuFile`` that is used here."""

    def pread(self, buf: object, size: int, file_offset: int, task_size: int) -> Future: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Placed:
    """The reads that a set of extents needs, and the place of everything in a buffer.

    Attributes
    ----------
    extents
        The extents to read.
    file, offset, nbytes, slot
        int64, (n_reads,). File, first byte, bytes and place in the buffer of each read. All but `file` are
        multiples of `PAGE`; the last read of a file may reach beyond its end.
    needed
        int64, (n_reads,). Bytes of each read that must exist in the file.
    at
        int64, (k,). Place of each extent in the buffer; 0 where an extent has no bytes.
    """

    extents: Extents
    file: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    slot: np.ndarray
    needed: np.ndarray
    at: np.ndarray

    @property
    def size(self) -> int:
        """Size of the buffer in bytes."""
        return int(self.nbytes.sum())


def missing() -> str | None:
    """Return the reason why kvikio cannot be used here, or None; kvikio itself is not called."""
    if importlib.util.find_spec("kvikio") is None:
        return "kvikio is not installed: pip install 'hbx_gpu[gpu]'"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1), which kvikio asks about every buffer"
    return None


class KvikioReader(Reader):
    """Reader that uses ``kvikio.CuFile``. It can be used from many threads of one process.

    Parameters
    ----------
    directory
        Where the chunks lie.
    threads, task_bytes
        Number of threads of kvikio's pool, and bytes of the tasks that it cuts a read into. They are set as
        kvikio's defaults for the whole process.
    max_gap, max_size
        As for `coalesce`, before reads are widened to whole pages.
    open_file
        Function to use instead of ``kvikio.CuFile``.

    Raises
    ------
    DeviceUnavailableError
        kvikio cannot be used here.
    """

    def __init__(
        self,
        directory: ChunkDirectory,
        *,
        threads: int = THREADS,
        task_bytes: int = TASK_BYTES,
        max_gap: int = _MAX_GAP,
        max_size: int = _MAX_SIZE,
        open_file: Callable[[str], File] | None = None,
    ) -> None:
        super().__init__(directory)
        if directory.is_remote:
            raise UnsupportedError(
                f"{option('io', 'kvikio')} reads local files; leave it out for data in object storage"
            )
        if open_file is None and (reason := missing()) is not None:
            raise DeviceUnavailableError(f"the reader 'kvikio' was asked for, but {reason}")
        self._threads, self._task_bytes = threads, task_bytes
        self._max_gap, self._max_size = max_gap, max_size
        self._open_file, self._given = open_file, open_file
        self._files = _Cache(self._opened, _MAX_OPEN)
        self._process: int | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        options = (self._threads, self._task_bytes, self._max_gap, self._max_size, self._given)
        return (_reader, (self.directory, *options))

    def place(self, extents: Extents) -> Placed:
        """Decide which bytes each read covers and where they go, without any I/O."""
        runs = coalesce(
            extents.file, extents.offset, extents.nbytes, max_gap=self._max_gap, max_size=self._max_size
        )
        # Two runs that share a page both read it, so that their places in the buffer do not overlap.
        offset = runs.offset // PAGE * PAGE
        needed = runs.offset + runs.nbytes - offset
        nbytes = -(-needed // PAGE) * PAGE
        slot = np.cumsum(nbytes) - nbytes
        at = np.zeros(len(extents), np.int64)
        stored = runs.run >= 0
        run = runs.run[stored]
        at[stored] = slot[run] + extents.offset[stored] - offset[run]
        return Placed(extents, runs.file.astype(np.int64), offset, nbytes, slot, needed, at)

    def read_into(self, placed: Placed, buffer: Sliceable) -> None:
        """Carry out the reads; return when all bytes are in the buffer.

        Parameters
        ----------
        placed
            The reads, from `place`.
        buffer
            (placed.size,) bytes, `PAGE`-aligned: a NumPy array, or an array on the device that can be sliced
            and has ``__cuda_array_interface__``.

        Raises
        ------
        CorruptChunkError, OSError
            As for `read`; also where kvikio reads fewer bytes than the file holds.
        """
        self._prepare()
        files = {file: self._file(placed, file) for file in np.unique(placed.file).tolist()}
        reads: list[tuple[int, Future]] = []
        try:
            for i, file in enumerate(placed.file.tolist()):
                offset, slot, nbytes = (
                    int(placed.offset[i]),
                    int(placed.slot[i]),
                    self._count(placed, i, files),
                )
                target = buffer[slot : slot + nbytes]
                reads.append((i, files[file].handle.pread(target, nbytes, offset, self._task_bytes)))
        finally:
            # Wait for all reads, also after an error: nothing may write to the buffer after this call.
            found = [(i, _outcome(read)) for i, read in reads]
        for i, outcome in found:
            self._check(placed, i, outcome, files[int(placed.file[i])])

    def read(self, extents: Extents) -> Slab:
        """See :meth:`Reader.read`; the bytes are read into host memory."""
        placed = self.place(extents)
        backing = np.empty(placed.size + PAGE, np.uint8)
        begin = -backing.ctypes.data % PAGE
        buffer = backing[begin : begin + placed.size]
        self.read_into(placed, buffer)
        address = np.uint64(buffer.ctypes.data) + placed.at.astype(np.uint64)
        return Slab(np.where(extents.nbytes > 0, address, np.uint64(0)), extents.nbytes, backing)

    def close(self) -> None:
        """See :class:`Reader`."""
        self._files.clear()

    def _prepare(self) -> None:
        """Import kvikio and set its pool once; raise an error in a forked child, where kvikio would hang."""
        with self._lock:
            if self._process is None:
                if self._open_file is None:
                    import kvikio
                    import kvikio.defaults

                    kvikio.defaults.set({"num_threads": self._threads, "task_size": self._task_bytes})
                    self._open_file = kvikio.CuFile
                self._process = os.getpid()
        if self._process != os.getpid():
            raise RuntimeError(
                "this process was forked after kvikio had read in its parent, where its threads stayed: "
                f"start processes with the 'spawn' method, or use {option('io', 'pinned')}"
            )

    def _opened(self, path: str) -> _File:
        assert self._open_file is not None
        return _File(path, self._open_file)

    def _file(self, placed: Placed, file: int) -> _File:
        path, identity = self.directory.paths[file], self.directory.identities[file]
        extents = placed.extents
        entry = self._files.peek(path)
        if entry is not None and entry.identity != identity:
            entry = None
        try:
            if entry is None:
                entry = self._files.open(path, lambda new: self._check_opened(extents, file, new.identity))
        except FileNotFoundError:
            raise self._gone(extents, file) from None
        return entry

    def _count(self, placed: Placed, i: int, files: dict[int, _File]) -> int:
        """Return the bytes to read, cut at the end of the file: kvikio fails if a read passes it."""
        file, offset = int(placed.file[i]), int(placed.offset[i])
        size = files[file].size
        if size < offset + int(placed.needed[i]):
            raise self._too_short(placed.extents, file, size)
        return min(int(placed.nbytes[i]), size - offset)

    def _check(self, placed: Placed, i: int, outcome: int | BaseException, file: _File) -> None:
        """Raise an error if a read failed."""
        needed, offset = int(placed.needed[i]), int(placed.offset[i])
        if isinstance(outcome, BaseException):
            raise OSError(f"kvikio cannot read {file.path} from byte {offset} on: {outcome}") from outcome
        if outcome < needed:
            raise OSError(
                f"kvikio read {outcome} of {needed} bytes of {file.path} from byte {offset} on; "
                f"{option('io', 'pinned')} reads without kvikio"
            )


class _File:
    """An open file that closes with its last reference."""

    def __init__(self, path: str, open_file: Callable[[str], File]) -> None:
        self.path = path
        found = os.stat(path)
        check_regular(path, found)
        self.handle = open_file(path)
        weakref.finalize(self, self.handle.close).atexit = False
        self.identity, self.size = (found.st_dev, found.st_ino), found.st_size


def _outcome(read: Future) -> int | BaseException:
    try:
        return int(read.get())
    except Exception as error:  # kvikio's C++ code raises exceptions of many types
        return error


def _reader(
    directory: ChunkDirectory,
    threads: int,
    task_bytes: int,
    max_gap: int,
    max_size: int,
    open_file: Callable[[str], File] | None,
) -> KvikioReader:
    return KvikioReader(
        directory,
        threads=threads,
        task_bytes=task_bytes,
        max_gap=max_gap,
        max_size=max_size,
        open_file=open_file,
    )
