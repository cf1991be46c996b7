"""Keep decoded chunks for later batches, up to a number of bytes."""

from __future__ import annotations

import math
import multiprocessing
import threading

import numpy as np

from hbx_gpu._devices import cores, free_host_memory
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.chunks import chunk_grid

LEAST = 64 << 20
"""Bytes that decoded chunks may take on any machine."""
_SHARE = 8


def default_budget(needed: int) -> int:
    """Bytes that decoded chunks may take where the user names no number.

    Parameters
    ----------
    needed
        Bytes of all chunks of the dataset, decoded. More is never of use.

    Returns
    -------
    int
        `needed`, but at most an eighth of the memory that is free, of which worker processes get a part each.
    """
    processes = cores() if multiprocessing.parent_process() is not None else 1
    return min(needed, max(LEAST, free_host_memory() // (_SHARE * processes)))


def decoded_nbytes(layout: ArrayLayout) -> int:
    """Bytes that all chunks of an array take when they are decoded; every chunk has its full shape."""
    return math.prod(chunk_grid(layout)) * math.prod(layout.chunk_shape) * layout.dtype.itemsize


class DecodedChunks:
    """Decoded chunks by their number. It can be used from many threads.

    When it is full, a new chunk takes the place of a random one. With more chunks than fit, visited again and
    again in the order of the file, dropping the oldest would drop each chunk just before its use.

    Parameters
    ----------
    budget
        Bytes that all kept chunks may take together.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._nbytes = budget, 0
        self._chunks: dict[int, np.ndarray] = {}
        self._order: list[int] = []
        self._lock = threading.Lock()
        self._draw = np.random.default_rng(0)

    def get(self, number: int) -> np.ndarray | None:
        """The chunk, if it is kept."""
        return self._chunks.get(number)

    def add(self, number: int, chunk: np.ndarray) -> None:
        """Keep a chunk, unless it alone is larger than the budget."""
        with self._lock:
            if number in self._chunks or chunk.nbytes > self._budget:
                return
            while self._nbytes + chunk.nbytes > self._budget:
                at = int(self._draw.integers(len(self._order)))
                self._order[at], self._order[-1] = self._order[-1], self._order[at]
                self._nbytes -= self._chunks.pop(self._order.pop()).nbytes
            self._chunks[number] = chunk
            self._order.append(number)
            self._nbytes += chunk.nbytes
