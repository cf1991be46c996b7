"""Reader over kvikio: extents to 4 KiB-aligned slots of one buffer, in device memory or in the host's.

With GPUDirect Storage bytes go from the drive to the device and never fill the page cache; without it kvikio
copies them through host memory. Worth it for whole chunks in bulk (chunks that stay in device memory);
blocks of random rows are better read from the page cache. kvikio is imported by the first read.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hbx_gpu._storage.chunks import ChunkDirectory, Extents
from hbx_gpu._storage.readers import Reader, Slab, _Cache, coalesce
from hbx_gpu._untrusted import check_regular
from hbx_gpu.errors import DeviceUnavailableError

PAGE = 4096
"""Alignment of file offsets, sizes and memory that direct reads want."""
THREADS = 16
TASK_BYTES = 4 << 20
_MAX_GAP = 64 << 10  # a read costs kvikio about as long as these bytes
_MAX_SIZE = 16 << 20
_MAX_OPEN = 256  # kvikio holds two descriptors per file


class Future(Protocol):
    """A read under way."""

    def get(self) -> int:
        """Wait; bytes read."""


class File(Protocol):
    """What of ``kvikio.CuFile`` is used."""

    def pread(self, buf: Any, size: int, file_offset: int, task_size: int) -> Future: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Placed:
    """Reads of a set of extents, and where in a buffer everything lies.

    Attributes
    ----------
    extents
        What is wanted.
    file, offset, nbytes, slot
        int64, (n_reads,). Reads: `offset`, `nbytes` and `slot`, the place in the buffer, are multiples of
        `PAGE`; the last may reach beyond the file's end.
    needed
        int64, (n_reads,). Bytes of a read that hold something wanted.
    at
        int64, (k,). Place of every extent in the buffer; 0 where it has no bytes.
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
        """Bytes of the buffer."""
        return int(self.nbytes.sum())


def missing() -> str | None:
    """What keeps kvikio from being used here; None if nothing does. Calls nothing of it."""
    if importlib.util.find_spec("kvikio") is None:
        return "kvikio is not installed: pip install 'hbx_gpu[gpu]'"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1), which kvikio asks about every buffer"
    return None


class KvikioReader(Reader):
    """Reads with ``kvikio.CuFile``. Safe to use from many threads, of one process.

    Parameters
    ----------
    directory
        Where the chunks lie.
    threads, task_bytes
        Of kvikio's pool, and how it cuts reads. They are kvikio's defaults, common to the process.
    max_gap, max_size
        As in `coalesce`, before reads are widened to pages.
    open_file
        Instead of ``kvikio.CuFile``.

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
        if open_file is None and (reason := missing()) is not None:
            raise DeviceUnavailableError(f"the reader 'kvikio' was asked for, but {reason}")
        self._threads, self._task_bytes = threads, task_bytes
        self._max_gap, self._max_size = max_gap, max_size
        self._open_file, self._given = open_file, open_file
        self._files = _Cache(self._opened, _MAX_OPEN)
        self._process: int | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        options = (self._threads, self._task_bytes, self._max_gap, self._max_size, self._given)
        return (_reader, (self.directory, *options))

    def place(self, extents: Extents) -> Placed:
        """Decide what is read at once, and where it goes; no I/O."""
        runs = coalesce(
            extents.file, extents.offset, extents.nbytes, max_gap=self._max_gap, max_size=self._max_size
        )
        # Runs that share a page both read it: slots stay apart.
        offset = runs.offset // PAGE * PAGE
        needed = runs.offset + runs.nbytes - offset
        nbytes = -(-needed // PAGE) * PAGE
        slot = np.cumsum(nbytes) - nbytes
        at = np.zeros(len(extents), np.int64)
        stored = runs.run >= 0
        run = runs.run[stored]
        at[stored] = slot[run] + extents.offset[stored] - offset[run]
        return Placed(extents, runs.file.astype(np.int64), offset, nbytes, slot, needed, at)

    def read_into(self, placed: Placed, buffer: Any) -> None:
        """Carry reads out; returns when the bytes are there.

        Parameters
        ----------
        placed
            From `place`.
        buffer
            (placed.size,) bytes, `PAGE`-aligned: a NumPy array, or anything on the device that can be sliced
            and has ``__cuda_array_interface__``.

        Raises
        ------
        CorruptChunkError, OSError
            As `read`; also where kvikio reads less than the file holds.
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
            # All of them, whatever happens: the buffer must not be written to after this.
            found = [(i, _outcome(read)) for i, read in reads]
        for i, outcome in found:
            self._check(placed, i, outcome, files[int(placed.file[i])])

    def read(self, extents: Extents) -> Slab:
        """See :class:`Reader`; into host memory."""
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
        """Import kvikio and set its pool, once; refuse to go on in a forked child, where it would hang."""
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
                "start processes with the 'spawn' method, or use io='pinned'"
            )

    def _opened(self, path: str) -> _File:
        assert self._open_file is not None
        return _File(path, self._open_file)

    def _file(self, placed: Placed, file: int) -> _File:
        path, identity = self.directory.paths[file], self.directory.identities[file]
        extents = placed.extents
        entry = self._files.peek(path, lambda entry: entry.identity == identity)
        try:
            if entry is None:
                entry = self._files.open(path, lambda new: self._check_opened(extents, file, new.identity))
        except FileNotFoundError:
            raise self._gone(extents, file) from None
        return entry

    def _count(self, placed: Placed, i: int, files: dict[int, _File]) -> int:
        """Bytes to read: kvikio takes the end of a file in mid-read for an error."""
        file, offset = int(placed.file[i]), int(placed.offset[i])
        size = files[file].size
        if size < offset + int(placed.needed[i]):
            raise self._too_short(placed.extents, file, size)
        return min(int(placed.nbytes[i]), size - offset)

    def _check(self, placed: Placed, i: int, outcome: int | BaseException, file: _File) -> None:
        """Raise what is wrong with the outcome of a read."""
        needed, offset = int(placed.needed[i]), int(placed.offset[i])
        if isinstance(outcome, BaseException):
            raise OSError(f"kvikio cannot read {file.path} from byte {offset} on: {outcome}") from outcome
        if outcome < needed:
            raise OSError(
                f"kvikio read {outcome} of {needed} bytes of {file.path} from byte {offset} on; io='pinned' "
                "reads without kvikio"
            )


class _File:
    """An open file that closes with its last reference."""

    def __init__(self, path: str, open_file: Callable[[str], File]) -> None:
        self.path = path
        found = os.stat(path)
        check_regular(path, found)
        self.handle = open_file(path)
        self.identity, self.size = (found.st_dev, found.st_ino), found.st_size

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.handle.close()


def _outcome(read: Future) -> int | BaseException:
    try:
        return int(read.get())
    except Exception as error:  # whatever kvikio's C++ raises
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
