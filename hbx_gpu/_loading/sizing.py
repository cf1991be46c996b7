"""Choose the size of windows and the depth of read-ahead from measurements of the running loader.

This decides when batches are made and how many share a plan, never what they contain.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

_BEGIN = 3  # halvings of the first window of an epoch; the second has one less, and so on
_GROWTH = 8  # windows of at most this many times their first size
_DEPTH = 4  # windows made ahead, per thread, at most
_BETTER = 0.9  # a larger window must lower the cost per cell to this share to be worth its memory
_WAITS = 0.03  # share of its time that the consumer may wait
_IDLES = 0.1  # share of their time that threads may idle while it does
PATIENCE = 10.0
"""Seconds of loading before larger windows are tried: a trial touches fresh memory, which costs time that a
short run would not gain back."""
_DRIFT = 2.0  # a cost that changed by this factor is worth another look


@dataclass(frozen=True, slots=True)
class Made:
    """A window that reached the consumer.

    Attributes
    ----------
    factor
        Factor of the sizing when the batches of the window were taken; 0 for the small windows with which an
        epoch begins.
    cells, nbytes
        Cells and bytes in the window.
    seconds
        Seconds that a thread spent on the window.
    """

    factor: int
    cells: int
    nbytes: int
    seconds: float


class Sizing:
    """Size of windows and depth of read-ahead.

    If the consumer waits while threads idle, too little is made ahead to even out windows that take longer,
    so one more window is made ahead. If the consumer waits and no thread idles, making batches is the limit,
    so windows twice as large are tried after some seconds, and kept if a cell then costs less. If the
    consumer never waits, nothing changes.

    Parameters
    ----------
    threads
        Number of threads that make windows.
    fixed
        Whether size and depth stay as they are at first.

    Attributes
    ----------
    factor
        Factor by which windows are larger than at first: a power of two.
    depth
        Number of windows that are made or being made, besides the one that is consumed.
    """

    def __init__(self, threads: int, *, fixed: bool = False) -> None:
        self.factor = 1
        # One window made per thread, one waiting.
        self.depth = threads + 1
        self._threads, self._fixed = threads, fixed
        self._round = max(4, 2 * threads)
        self._age = 0.0
        self._skip = threads + 1  # the first windows compile, open files and verify checksums
        self._before: float | None = None  # cost per cell with windows half as large, while those are tried
        self._settled: float | None = None  # cost per cell when larger windows were found to be no better
        self._reset()

    def halvings(self, number: int) -> int:
        """Return how often the window with this number in an epoch, counted from 0, is halved.

        The first windows are small, so that the first batches are there soon.
        """
        return 0 if self._fixed else max(0, _BEGIN - number)

    def _reset(self) -> None:
        self._costs: list[float] = []
        self._nbytes = 0
        self._elapsed = self._waited = self._idle = 0.0

    def observe(self, made: Made, *, elapsed: float, waited: float, idle: float, budget: int) -> None:
        """Take a window into account.

        Parameters
        ----------
        elapsed, waited, idle
            Seconds since the previous window: in all, those that the consumer waited, and those that threads
            had nothing to do, summed over threads.
        budget
            Bytes that read-ahead may use.
        """
        if self._fixed or made.factor != self.factor or not made.cells:
            return
        if self._skip:
            self._skip -= 1
            return
        self._costs.append(made.seconds / made.cells)
        self._nbytes = max(self._nbytes, made.nbytes)
        self._elapsed += elapsed
        self._age += elapsed
        self._waited += waited
        self._idle += idle
        if len(self._costs) >= self._round:
            self._decide(budget)
            self._reset()

    def _decide(self, budget: int) -> None:
        cost = statistics.median(self._costs)  # other work of the machine slows single windows down
        waits = self._waited > _WAITS * self._elapsed
        idles = self._idle > _IDLES * self._elapsed * self._threads
        if self._before is not None:
            if cost > _BETTER * self._before:
                self.factor //= 2
                self._settled = self._before
            self._before = None
            return
        if self._settled is not None and not self._settled / _DRIFT < cost < self._settled * _DRIFT:
            self._settled = None
        if waits and idles:
            if self.depth < _DEPTH * self._threads and self._nbytes * (self.depth + 2) <= budget:
                self.depth += 1
        elif waits and self._settled is None and self.factor < _GROWTH and self._age >= PATIENCE:
            self._before = cost
            self.factor *= 2
