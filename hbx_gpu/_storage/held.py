"""Chunks from object storage that stay in memory for later windows, where there is no cache on a disk."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Protocol

import numpy as np

from hbx_gpu._storage.claims import MOST_OBJECTS, Claims, keys_of

_MOST = 1 << 30
_SHARE = 16  # of the memory of the machine, one part


class Kept(Protocol):
    """Where chunks that were fetched are kept: in memory, or in a cache on the local disk.

    Attributes
    ----------
    claims
        Which thread brings which of the chunks that are not there.
    """

    claims: Claims

    def object_number(self, url: str, version: str, nbytes: int) -> int:
        """The number of an object in this process; another version is another object."""

    def find(
        self, objects: np.ndarray, offset: np.ndarray, nbytes: np.ndarray
    ) -> tuple[np.ndarray, list[object]]:
        """Addresses of chunks, uint64, 0 where one is not there; and what keeps their memory alive."""

    def has(self, objects: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """bool, (k,): whether chunks are there, as far as this process knows."""

    def add(
        self,
        objects: np.ndarray,
        offset: np.ndarray,
        nbytes: np.ndarray,
        address: np.ndarray,
        owner: np.ndarray,
    ) -> None:
        """Keep chunks that lie in `owner`, a buffer, at these addresses."""

    def flush(self) -> None:
        """Write what waits to be written."""


def default_most() -> int:
    """Bytes that chunks may take: 1 GiB, or a sixteenth of the memory of the machine if that is less."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return _MOST
    return min(_MOST, memory // _SHARE) if memory > 0 else _MOST


class HeldChunks:
    """Chunks in memory, up to a number of bytes; buffers that were used longest ago go first.

    It can be used from many threads. A buffer is kept or dropped as a whole, with all chunks in it, so its
    bytes count, the gaps between chunks too.

    Parameters
    ----------
    most
        Bytes of all buffers; None: :func:`default_most`.

    Attributes
    ----------
    claims
        See :class:`Kept`.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = default_most() if most is None else most
        self.claims = Claims()
        self._lock = threading.Lock()
        self._objects: dict[tuple[str, str, int], int] = {}
        # Sorted by key: size and address of each chunk, and the number of the buffer that it lies in.
        self._keys, self._sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._addresses, self._buffer_of = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._buffers: OrderedDict[int, np.ndarray] = OrderedDict()  # in the order of their last use
        self._nbytes = 0
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are kept."""
        return self._nbytes

    def object_number(self, url: str, version: str, nbytes: int) -> int:
        """See :class:`Kept`."""
        with self._lock:
            return self._objects.setdefault((url, version, nbytes), len(self._objects))

    def find(
        self, objects: np.ndarray, offset: np.ndarray, nbytes: np.ndarray
    ) -> tuple[np.ndarray, list[object]]:
        """See :class:`Kept`."""
        address = np.zeros(len(objects), np.uint64)
        keys = keys_of(objects, offset)
        with self._lock:
            if not len(self._keys):
                return address, []
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            hit = (self._keys[at] == keys) & (self._sizes[at] == nbytes) & (nbytes > 0)
            address[hit] = self._addresses[at[hit]]
            used = np.unique(self._buffer_of[at[hit]]).tolist()
            for number in used:
                self._buffers.move_to_end(number)
            return address, [self._buffers[number] for number in used]

    def has(self, objects: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """See :class:`Kept`."""
        with self._lock:
            return np.isin(keys_of(objects, offset), self._keys)

    def add(
        self,
        objects: np.ndarray,
        offset: np.ndarray,
        nbytes: np.ndarray,
        address: np.ndarray,
        owner: np.ndarray,
    ) -> None:
        """See :class:`Kept`. A buffer that is larger than all that may be kept is not kept."""
        if owner.nbytes > self.most:
            return
        keys, first = np.unique(keys_of(objects, offset), return_index=True)
        with self._lock:
            new = (nbytes[first] > 0) & (objects[first] < MOST_OBJECTS) & ~np.isin(keys, self._keys)
            keys, first = keys[new], first[new]
            if not len(keys):
                return
            place = np.searchsorted(self._keys, keys)
            self._keys = np.insert(self._keys, place, keys)
            self._sizes = np.insert(self._sizes, place, nbytes[first])
            self._addresses = np.insert(self._addresses, place, address[first])
            self._buffer_of = np.insert(self._buffer_of, place, self._next)
            self._buffers[self._next] = owner
            self._next += 1
            self._nbytes += owner.nbytes
            self._drop()

    def _drop(self) -> None:
        gone = []
        while self._nbytes > self.most:
            number, buffer = self._buffers.popitem(last=False)
            self._nbytes -= buffer.nbytes
            gone.append(number)
        if gone:
            keep = ~np.isin(self._buffer_of, gone)
            self._keys, self._sizes = self._keys[keep], self._sizes[keep]
            self._addresses, self._buffer_of = self._addresses[keep], self._buffer_of[keep]

    def flush(self) -> None:
        """Nothing waits to be written."""
