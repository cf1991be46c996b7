"""Make batches ahead of the consumer: windows on threads, in order, up to a number of bytes ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hbx_gpu._loading.closing import THREADS, close_dropped
from hbx_gpu._loading.sizing import Made, Sizing
from hbx_gpu._protocols import AnyFeed, Rows
from hbx_gpu.loader_stats import Recorder


@dataclass(frozen=True, slots=True)
class _Window:
    """A window that a thread makes: its entries, the seconds they took, and bytes and cells of each batch."""

    made: Future[tuple[list[object], float]]
    nbytes: list[int]
    cells: list[int]
    factor: int


class Ahead:
    """Batches of one iteration, made ahead of the consumer, who calls ``next()``.

    Attributes
    ----------
    recorder
        Recorder that adds up where the time goes.
    cells
        Number of cells in the batch that was handed over last.
    """

    recorder: Recorder
    cells: int = 0
    _closed = True  # until a constructor has come to its end

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> object:
        raise NotImplementedError

    def close(self) -> None:
        """End the threads; no batch comes after this."""
        raise NotImplementedError


class ReadAhead(Ahead):
    """Makes windows of batches on threads, a bounded number of bytes ahead, and hands them over in order."""

    def __init__(
        self,
        feed: AnyFeed,
        order: Iterator[Rows],
        *,
        threads: int,
        window: int,
        window_nbytes: int,
        memory_budget: int,
        sizing: Sizing,
        recorder: Recorder,
        timeout: float = 0,
    ) -> None:
        self._feed, self._order = feed, order
        self._window, self._window_nbytes, self._budget = window, window_nbytes, memory_budget
        self._sizing, self.recorder = sizing, recorder
        self._timeout = timeout or None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=THREADS)
        self._pending: deque[_Window] = deque()
        self._ready: deque[tuple[object, int, int]] = deque()
        self._held = 0  # bytes of windows made or in the making, until their batches are handed over
        self._upcoming: deque[tuple[np.ndarray, int]] = deque()  # batches and their bytes, looked at together
        self._begun = 0  # windows
        self._closed = False
        # Times at which the previous window was taken; None before the first.
        self._taken: tuple[float, float] | None = None

    def __next__(self) -> object:
        try:
            if not self._ready:
                self._refill()
                if not self._pending:
                    raise StopIteration
                self._take(self._pending.popleft())
            made, size, self.cells = self._ready.popleft()
            batch = self._feed.deliver(made)
            self._release(size)
            if len(self._pending) < self._sizing.depth:
                self._refill()
        except BaseException:
            self.close()
            raise
        return batch

    def _take(self, window: _Window) -> None:
        """Wait for a window; its batches are next."""
        begin = time.perf_counter()
        try:
            made, seconds = window.made.result(self._timeout)
        except TimeoutError as error:
            if window.made.done():  # the error was raised by the feed, not by the waiting
                raise
            self._abandon()
            raise TimeoutError(
                f"no batch was ready within timeout={self._timeout:g} s: reading or decoding stalls. "
                "Look at the storage, or allow more time; the thread that stalls ends when storage answers"
            ) from error
        end, idle = time.perf_counter(), self.recorder.idle
        self._ready.extend(zip(made, window.nbytes, window.cells, strict=True))
        if self._taken is not None:
            self._sizing.observe(
                Made(window.factor, sum(window.cells), sum(window.nbytes), seconds),
                elapsed=end - self._taken[0],
                waited=end - begin,
                idle=idle - self._taken[1],
                budget=self._budget,
            )
        self._taken = end, idle

    def _release(self, nbytes: int) -> None:
        """Subtract the bytes of a batch that the consumer has taken."""
        self._held -= nbytes

    def _refill(self) -> None:
        while not self._closed and len(self._pending) < self._sizing.depth:
            rows, sizes = self._take_window()
            if not rows:
                return
            cells = [len(part) for part in rows]
            made = self._pool.submit(self._make, rows, sum(cells))
            factor = self._sizing.factor if self._sizing.halvings(self._begun) == 0 else 0
            self._pending.append(_Window(made, sizes, cells, factor))
            self._begun += 1
        self.recorder.windows_ahead = self._sizing.depth

    def _make(self, rows: list[np.ndarray], cells: int) -> tuple[list[object], float]:
        with self.recorder.window(cells) as window:
            made = self._feed.make(rows)
        return made, window.seconds

    def _take_window(self) -> tuple[list[np.ndarray], list[int]]:
        """Return the batches of the next window: as many as it holds, and as fit the rest of the budget."""
        rows: list[np.ndarray] = []
        sizes: list[int] = []
        most = max(1, self._window * self._sizing.factor >> self._sizing.halvings(self._begun))
        # Windows must be small enough that every thread can make one, however wide batches are.
        most_bytes = min(self._budget // (self._sizing.depth + 1), self._window_nbytes * self._sizing.factor)
        taken = 0
        while len(rows) < most and (self._upcoming or self._look_ahead(most - len(rows))):
            batch, nbytes = self._upcoming[0]
            if self._held and self._held + nbytes > self._budget:
                break  # what is held is handed over first
            if rows and taken + nbytes > most_bytes:
                break
            self._upcoming.popleft()
            rows.append(batch)
            sizes.append(nbytes)
            taken += nbytes
            self._held += nbytes
        if len(rows) == most or self._upcoming:  # not the rest of an epoch
            self.recorder.batches_per_window = max(1, len(rows))
        return rows, sizes

    def _look_ahead(self, n: int) -> bool:
        """Take at most `n` batches from the order; return whether there is one."""
        batches = self._feed.checked(list(islice(self._order, n)))
        self._upcoming.extend(zip(batches, self._feed.nbytes(batches), strict=True))
        return bool(batches)

    def close(self) -> None:
        """End the threads; returns when the last running window is done."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()
            self._ready.clear()

    def _abandon(self) -> None:
        """Do what `close` does, without waiting for a window that may never be done."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()
        self._ready.clear()

    def __del__(self) -> None:
        if not self._closed:
            close_dropped(self.close)
