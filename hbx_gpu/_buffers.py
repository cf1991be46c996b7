"""Reuse the memory of outputs, because getting fresh pages from the system takes longer than filling them.

An array from a pool is used like any other. When nothing refers to it any more, nor to a view or tensor of
it, its memory goes back to the pool instead of to the system.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64
_SMALL = 1 << 16  # below this malloc recycles by itself


class BufferPool:
    """Recycles blocks of memory by size.

    Parameters
    ----------
    max_bytes
        Most bytes of free memory that are kept; memory beyond that is returned to the system.

    Attributes
    ----------
    n_allocated
        Number of blocks that were taken from the system so far. It stops growing in the steady state of a
        loop.
    """

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        self.max_bytes = max_bytes
        self.n_allocated = 0
        self._free: dict[int, list[_Block]] = {}
        self._free_bytes = 0
        self._lock = (
            threading.RLock()
        )  # garbage collection while it is held may return a block on this thread

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """Like ``numpy.empty``; 64-byte aligned, but for small arrays, which NumPy itself allocates."""
        dtype = np.dtype(dtype)
        count = shape if isinstance(shape, int) else math.prod(shape)
        nbytes = count * dtype.itemsize
        if nbytes < _SMALL:
            return np.empty(shape, dtype)
        size = _size_class(nbytes)
        with self._lock:
            blocks = self._free.get(size)
            block = blocks.pop() if blocks else None
            if block is not None:
                self._free_bytes -= size
            else:
                self.n_allocated += 1
        lease = np.asarray(_Lease(self, block or _Block(size)))
        result: np.ndarray = lease[:nbytes].view(dtype)
        return result if isinstance(shape, int) else result.reshape(shape)

    def _give_back(self, block: _Block) -> None:
        with self._lock:
            if self._free_bytes + block.size <= self.max_bytes:
                self._free.setdefault(block.size, []).append(block)
                self._free_bytes += block.size

    @property
    def free_bytes(self) -> int:
        """Bytes of free memory that are kept for later requests."""
        return self._free_bytes

    def clear(self) -> None:
        """Return all free memory to the system."""
        with self._lock:
            self._free.clear()
            self._free_bytes = 0


def _size_class(nbytes: int) -> int:
    """Round a size up in steps of an eighth, so that batches of nearly equal size share blocks."""
    step = max(_SMALL, 1 << (nbytes.bit_length() - 4))
    return -(-nbytes // step) * step


class _Block:
    """Memory from the system, and what NumPy asks for to make arrays of it."""

    __slots__ = ("interface", "memory", "size")

    def __init__(self, size: int) -> None:
        self.size, self.memory = size, np.empty(size + _ALIGNMENT, np.uint8)
        address = int(self.memory.__array_interface__["data"][0])
        aligned = -(-address // _ALIGNMENT) * _ALIGNMENT
        self.interface = {"shape": (size,), "typestr": "|u1", "data": (aligned, False), "version": 3}


class _Lease:
    """Owner of one block; NumPy keeps it alive as the base of the array, and of all its views."""

    __slots__ = ("__array_interface__", "_block", "_pool")

    def __init__(self, pool: BufferPool, block: _Block) -> None:
        self._pool, self._block = pool, block
        self.__array_interface__ = block.interface

    def __del__(self) -> None:
        self._pool._give_back(self._block)


POOL = BufferPool()
"""Pool of this process for the memory of batches."""


def give_back_unused() -> None:
    """Give the system the pages that C's malloc keeps after memory was freed; glibc alone is asked.

    It keeps hundreds of megabytes after a scan of a long table, and threads that are idle by then never use
    them again.
    """
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library
        return
    trim(ctypes.c_size_t(0))
