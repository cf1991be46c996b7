"""The iterable a training loop sees: batches in sampler order, made ahead of it.

Owns threads, queues and the position within an epoch; knows nothing of how a batch is made.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from hbx_gpu._loading.feeds.device import Feed, HostFeed, tell_epoch
from hbx_gpu._loading.sizing import Made, Sizing
from hbx_gpu.stats import LiveLine, LoaderStats, Recorder

ROWS_PER_WINDOW = 4096
# Wide (dense) batches: more than this per window saves no planning and only makes more memory be touched, as
# long as measurements do not say otherwise.
BYTES_PER_WINDOW = 64 << 20
_DECIDED_BY_SAMPLER = ("batch_size", "shuffle", "drop_last", "batch_sampler")


def _identity(batch: Any) -> Any:
    return batch


def default_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_window(sampler: Any) -> int:
    """Batches that make a window of about `ROWS_PER_WINDOW` rows."""
    return max(1, ROWS_PER_WINDOW // int(getattr(sampler, "batch_size", ROWS_PER_WINDOW)))


class CellLoader(DataLoader):
    """A torch DataLoader that reads ahead with threads (num_workers 0) or spawned workers, and resumes.

    See :func:`hbx_gpu.dataloader.make_loader` for the parameters.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Any,
        collate_fn: Callable[[Any], Any] | None = None,
        *,
        num_workers: int | None = None,
        threads: int | None = None,
        window: int | None = None,
        memory_budget: int = 512 << 20,
        feed: Feed | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> None:
        wrong = [name for name in _DECIDED_BY_SAMPLER if name in kwargs]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: the sampler decides this; set it there")
        if num_workers is None:
            num_workers = int(getattr(sampler, "num_workers", 0))
        if num_workers > 0:
            # Spawn: forked children of a process with threads and open files hang or corrupt.
            kwargs = {"multiprocessing_context": "spawn", "persistent_workers": True} | kwargs
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate_fn or _identity,
            num_workers=num_workers,
            **kwargs,
        )
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 batch, got {window}")
        if memory_budget < 1:
            raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
        self._feed = feed or HostFeed(dataset, self.collate_fn)
        self._memory_budget = memory_budget
        self._progress = progress
        self._threads = threads or default_threads()
        single = getattr(self._feed, "one_batch_per_window", False)
        self._window = window or (1 if single else default_window(sampler))
        given = window is not None or threads is not None or single
        self._sizing = Sizing(self._threads, fixed=given)
        self._recorder = self._new_recorder()
        self._live: list[Ahead] = []
        self._delivered = 0
        self._skip = 0
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._delivered = 0
        skip, self._skip = self._skip, 0
        if self.num_workers > 0:
            batches: Iterator[Any] = islice(super().__iter__(), skip, None)
        else:
            ahead = self._read_ahead(skip)
            self._live.append(ahead)
            batches = ahead
        return self._counted(batches, skip)

    def _counted(self, batches: Iterator[Any], skip: int) -> Iterator[Any]:
        self._delivered = skip
        line: LiveLine | None = None
        ahead = batches if isinstance(batches, Ahead) else None
        recorder = self._recorder = Recorder() if ahead is None else ahead.recorder
        clock = time.perf_counter
        try:
            if self._progress:
                line = LiveLine(recorder, len(self) if hasattr(self.batch_sampler, "__len__") else None, skip)
            while True:
                begin = clock()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                recorder.handed_over(clock() - begin, cells=0 if ahead is None else ahead.cells)
                # Counted before it is handed over: a state saved by the consumer includes this batch.
                self._delivered += 1
                if line is not None:
                    line.update()
                yield batch
        finally:
            recorder.end()
            if line is not None:
                line.close()
            if ahead is not None:
                ahead.close()
                if ahead in self._live:
                    self._live.remove(ahead)

    def _read_ahead(self, skip: int) -> Ahead:
        sampler: Any = self.batch_sampler
        tell_epoch(self._feed, int(getattr(sampler, "epoch", self._epoch)))
        order = sampler.batches() if hasattr(sampler, "batches") else iter(sampler)
        return _ReadAhead(
            self._feed,
            islice(order, skip, None),
            threads=self._threads,
            window=self._window,
            memory_budget=self._memory_budget,
            sizing=self._sizing,
            recorder=self._new_recorder(),
            timeout=self.timeout,
        )

    def _new_recorder(self) -> Recorder:
        return Recorder(self._threads, self._window * self._sizing.factor, self._sizing.depth)

    def stats(self) -> LoaderStats:
        """Where the time of the running or last epoch went, so far.

        With worker processes only batches and the consumer's waiting are known.
        """
        return self._recorder.stats()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; handed to the sampler."""
        self._delivered, self._epoch = 0, epoch
        set_epoch = getattr(self.batch_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed over: small, picklable, independent of read-ahead.

        Restored with :meth:`load_state_dict` into a loader over the same cells, it resumes with the next
        batch, also with another number of workers or ranks.
        """
        sampler: Any = self.batch_sampler
        if hasattr(sampler, "state_dict"):
            return {"sampler": sampler.state_dict(delivered=self._delivered)}
        return {"delivered": self._delivered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` at the next iteration.

        Raises
        ------
        ValueError
            The state belongs to other cells, or to a loader with another kind of sampler.
        """
        sampler: Any = self.batch_sampler
        if hasattr(sampler, "load_state_dict") != ("sampler" in state):
            raise ValueError(
                f"this state holds {sorted(state)}, but the loader's sampler is a {type(sampler).__name__}; "
                "load it into a loader made with the same kind of sampler"
            )
        self._delivered = 0
        if "sampler" in state:
            sampler.load_state_dict(state["sampler"])
        else:
            self._skip = int(state["delivered"])

    def close(self) -> None:
        """Stop reading ahead and end the threads; running iterations stop."""
        for ahead in list(self._live):
            ahead.close()
        self._live.clear()
        workers: Any = getattr(self, "_iterator", None)
        if workers is not None and hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
            self._iterator = None

    def __enter__(self) -> CellLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def sizes_of(feed: Feed, batches: list[np.ndarray]) -> list[int]:
    """Bytes of each batch, asked for together where a feed can tell them together."""
    together = getattr(feed, "nbytes_of", None)
    return together(batches) if together is not None else [feed.nbytes(rows) for rows in batches]


@dataclass(frozen=True, slots=True)
class _Window:
    """A window in the making: its entries and the seconds they took, and of each batch bytes and cells."""

    made: Future[tuple[list[Any], float]]
    nbytes: list[int]
    cells: list[int]
    factor: int


class Ahead:
    """Batches of one iteration, made ahead of whoever calls ``next()``.

    Attributes
    ----------
    recorder
        Adds up where the time goes.
    cells
        In the batch handed over last.
    """

    recorder: Recorder
    cells: int = 0

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """End the threads; no batch comes any more."""
        raise NotImplementedError


class _ReadAhead(Ahead):
    """Makes windows of batches on threads, a bounded number of bytes ahead, and hands them over in order."""

    def __init__(
        self,
        feed: Feed,
        order: Iterator[np.ndarray],
        *,
        threads: int,
        window: int,
        memory_budget: int,
        sizing: Sizing,
        recorder: Recorder,
        timeout: float = 0,
    ) -> None:
        self._feed, self._order = feed, order
        self._window, self._budget = window, memory_budget
        self._sizing, self.recorder = sizing, recorder
        self._timeout = timeout or None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hbx_gpu-loader")
        self._pending: deque[_Window] = deque()
        self._ready: deque[tuple[Any, int, int]] = deque()
        self._held = 0  # bytes of windows made or in the making, until their batches are handed over
        self._upcoming: deque[tuple[np.ndarray, int]] = deque()  # batches and their bytes, looked at together
        self._closed = False
        # Where the clocks stood when the window before was taken; None before the first.
        self._taken: tuple[float, float] | None = None

    def __next__(self) -> Any:
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
            if window.made.done():  # the feed's own
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
        """The consumer has the batch: its bytes count no longer."""
        self._held -= nbytes

    def _refill(self) -> None:
        while not self._closed and len(self._pending) < self._sizing.depth:
            rows, sizes = self._take_window()
            if not rows:
                return
            cells = [len(part) for part in rows]
            made = self._pool.submit(self._make, rows, sum(cells))
            self._pending.append(_Window(made, sizes, cells, self._sizing.factor))
        self.recorder.windows_ahead = self._sizing.depth

    def _make(self, rows: list[np.ndarray], cells: int) -> tuple[list[Any], float]:
        with self.recorder.window(cells) as window:
            made = self._feed.make(rows)
        return made, window.seconds

    def _take_window(self) -> tuple[list[np.ndarray], list[int]]:
        """The next batches, as many as make a window and as fit the budget beside what is held."""
        rows: list[np.ndarray] = []
        sizes: list[int] = []
        most = self._window * self._sizing.factor
        # Windows small enough that every thread has one, however wide the batches.
        most_bytes = min(self._budget // (self._sizing.depth + 1), BYTES_PER_WINDOW * self._sizing.factor)
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
        """Ask for at most `n` batches of the order; whether there is one."""
        batches = list(islice(self._order, n))
        self._upcoming.extend(zip(batches, sizes_of(self._feed, batches), strict=True))
        return bool(batches)

    def close(self) -> None:
        """End the threads; returns when the last running window is done."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()
            self._ready.clear()

    def _abandon(self) -> None:
        """As `close`, without waiting for a window that may never be done."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()
        self._ready.clear()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()
