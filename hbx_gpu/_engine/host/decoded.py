"""Keep decoded chunks for later batches, up to a number of bytes."""

from __future__ import annotations

import threading

import numpy as np


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
