"""Measure where a loader's time goes: the work of its threads, and the waiting of threads and consumer.

Code that does a step of the work charges its time with :func:`stage`. The loader collects these times once
per window, so nothing is counted per row. Outside a loader's window, a stage reads a clock twice and is not
recorded.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from types import TracebackType

STAGES = ("plan", "read", "copy", "decode", "sort")
"""Stages of a window: planning, reading chunks, copying to page-locked memory, decoding to tensors, and
sorting rows for sparse tensors on the CPU, which is needed only where rows are not stored in order."""

OTHER = "other"
"""Time of the threads in a window that no stage charged."""

WARM_UP = "warm-up"
"""How much longer the first window of each thread took than later ones, not counting reading.

Code is compiled then, and memory touched for the first time.
"""


class _Here(threading.local):
    """The stage and the window that the calling thread is in."""

    current: stage | None = None
    window: Window | None = None


_here = _Here()
# Share of its time that a consumer may wait for worker processes before it is told to try threads.
_WAITS_MUCH = 0.1


class stage:
    """Charge the time of a block to a stage of the window that this thread makes.

    A stage inside a stage takes its time away from the outer one.

    Parameters
    ----------
    name
        One of `STAGES`.

    Attributes
    ----------
    nbytes
        Bytes that the stage moved or made; set it inside the block.
    """

    __slots__ = ("_begin", "_inner", "_outer", "name", "nbytes")

    def __init__(self, name: str) -> None:
        self.name, self.nbytes = name, 0
        self._inner = 0.0

    def __enter__(self) -> stage:
        self._outer = _here.current
        _here.current = self
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        spent = time.perf_counter() - self._begin
        _here.current = self._outer
        if self._outer is not None:
            self._outer._inner += spent
        if (window := _here.window) is not None:
            window.charge(self.name, spent - self._inner, self.nbytes)


@dataclass(frozen=True, slots=True)
class Remote:
    """What an epoch took from object storage.

    Attributes
    ----------
    requests
        Requests for ranges of objects, those that had to be tried again included.
    wanted, moved
        Bytes of the chunks that batches needed, and bytes that came from the store: gaps between chunks that
        were read over make `moved` larger, hits of the cache make it smaller.
    cache_hits, cache_misses
        Chunks that the cache on the local disk had, and those that it did not have.
    """

    requests: int = 0
    wanted: int = 0
    moved: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    def __add__(self, other: Remote) -> Remote:
        return Remote(
            self.requests + other.requests,
            self.wanted + other.wanted,
            self.moved + other.moved,
            self.cache_hits + other.cache_hits,
            self.cache_misses + other.cache_misses,
        )


def in_window() -> bool:
    """Whether this thread makes a window of a loader."""
    return _here.window is not None


def count_remote(
    *, requests: int = 0, wanted: int = 0, moved: int = 0, cache_hits: int = 0, cache_misses: int = 0
) -> None:
    """Charge requests to the window that this thread makes; see `Remote`."""
    if (window := _here.window) is not None:
        window.remote += Remote(requests, wanted, moved, cache_hits, cache_misses)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a loader's threads did in one stage of an epoch.

    Attributes
    ----------
    seconds
        Seconds spent in the stage, summed over threads.
    share
        Share of the threads' time, which they spend working or waiting for the consumer.
    nbytes
        Read: stored bytes of the chunks asked for (a reader that maps files touches only what is decoded,
        and its page faults count as decoding). Copy: what was packed to cross to the device. Decode: the
        batches made.
    bytes_per_s, cells_per_s
        Rates of one thread that does nothing but this stage; 0 where no time was spent.
    """

    seconds: float
    share: float
    nbytes: int
    bytes_per_s: float
    cells_per_s: float


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """An epoch so far, as :meth:`hbx_gpu._loading.loader.CellLoader.stats` tells it.

    Attributes
    ----------
    seconds
        Seconds from the request for the epoch's first batch until the epoch ended, or until now.
    batches, cells
        Numbers of batches and cells that were handed over.
    windows
        Number of windows that were made, each of which is several batches under one plan.
    threads, batches_per_window, windows_ahead
        Current settings of read-ahead.
    workers
        Number of worker processes that make the batches. Their work is not measured, so there are no stages.
    stages
        `STAGES`, `OTHER` and `WARM_UP`, which only the first epoch of a loader has.
    wait_for_data
        Seconds that the consumer spent in ``next()``.
    wait_for_consumer
        Seconds, summed over threads, that these had nothing to do because enough was made ahead.
    remote
        Requests to object storage and their bytes; all zero where data are on a local disk.
    """

    seconds: float
    batches: int
    cells: int
    windows: int
    threads: int
    batches_per_window: int
    windows_ahead: int
    stages: dict[str, Stage]
    wait_for_data: float
    wait_for_consumer: float
    workers: int = 0
    remote: Remote = field(default_factory=Remote)

    @property
    def requests(self) -> int:
        """Requests to object storage."""
        return self.remote.requests

    @property
    def bytes_wanted(self) -> int:
        """Bytes of the chunks that batches needed, where these lie in object storage."""
        return self.remote.wanted

    @property
    def bytes_moved(self) -> int:
        """Bytes that came from object storage."""
        return self.remote.moved

    @property
    def cache_hits(self) -> int:
        """Chunks that the cache on the local disk had."""
        return self.remote.cache_hits

    @property
    def cells_per_s(self) -> float:
        """Cells handed over per second, whether loader or consumer was slower."""
        return _per(self.cells, self.seconds)

    @property
    def wait_for_data_share(self) -> float:
        """Share of the consumer's time that it spent in ``next()``, 0 to 1."""
        return min(1.0, _per(self.wait_for_data, self.seconds))

    @property
    def wait_for_consumer_share(self) -> float:
        """Share of the threads' time that they had nothing to do, 0 to 1."""
        busy = sum(stage.seconds for stage in self.stages.values())
        return _per(self.wait_for_consumer, busy + self.wait_for_consumer)

    def as_dict(self) -> dict[str, object]:
        """Plain numbers, for JSON."""
        return {
            **asdict(self),
            "cells_per_s": self.cells_per_s,
            "wait_for_data_share": self.wait_for_data_share,
            "wait_for_consumer_share": self.wait_for_consumer_share,
        }

    def __str__(self) -> str:
        return format_line(self)


def format_line(stats: LoaderStats) -> str:
    """One line for a terminal: rate, what the threads do, and who waits."""
    if stats.workers:
        processes = "1 worker process" if stats.workers == 1 else f"{stats.workers} worker processes"
        line = (
            f"{_per(stats.batches, stats.seconds):,.1f} batches/s | {processes} (no stages), "
            f"waiting {stats.wait_for_data_share:.0%}"
        )
        return f"{line}: try num_workers=0" if stats.wait_for_data_share > _WAITS_MUCH else line
    stages = "  ".join(
        f"{name} {stage.share:.0%}"
        for name, stage in stats.stages.items()
        if stage.seconds or name not in ("copy", "sort", WARM_UP)
    )
    return (
        f"{stats.cells_per_s:,.0f} cells/s | {stats.threads} threads: {stages}  "
        f"idle {stats.wait_for_consumer_share:.0%} | waiting for data {stats.wait_for_data_share:.0%}"
        f"{_format_remote(stats)}"
    )


def _format_remote(stats: LoaderStats) -> str:
    remote = stats.remote
    if not remote.wanted:
        return ""
    looked_up = remote.cache_hits + remote.cache_misses
    cache = f", {remote.cache_hits / looked_up:.0%} of chunks from the cache" if looked_up else ""
    return (
        f" | {remote.requests:,} requests, {remote.moved / 1e6:,.0f} MB for {remote.wanted / 1e6:,.0f} MB "
        f"wanted{cache}"
    )


class LiveLine:
    """A progress bar of batches followed by :func:`format_line`, on stderr.

    Parameters
    ----------
    total, initial
        Batches of the epoch, None where that is unknown, and batches that were done before a resumed epoch.
    """

    def __init__(self, recorder: Recorder, total: int | None, initial: int = 0) -> None:
        from tqdm import tqdm

        self._recorder = recorder
        self._bar = tqdm(total=total, initial=initial, unit="batch", mininterval=0.2, leave=True)
        self._told = 0.0

    def update(self) -> None:
        """One batch more."""
        now = time.perf_counter()
        if now - self._told > 0.5:
            self._told = now
            self._bar.set_postfix_str(format_line(self._recorder.stats()), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the last line standing."""
        self._bar.set_postfix_str(format_line(self._recorder.stats()), refresh=False)
        self._bar.close()


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


class Window:
    """The time of one window, on the thread that makes it."""

    __slots__ = ("_begin", "_recorder", "cells", "remote", "seconds", "stages")

    def __init__(self, recorder: Recorder, cells: int) -> None:
        self._recorder, self.cells = recorder, cells
        self.seconds = 0.0
        self.stages: dict[str, tuple[float, int]] = {}
        self.remote = Remote()

    def charge(self, name: str, seconds: float, nbytes: int) -> None:
        """Add to a stage."""
        before = self.stages.get(name, (0.0, 0))
        self.stages[name] = (before[0] + seconds, before[1] + nbytes)

    def spent(self, name: str) -> float:
        """Seconds charged to a stage; for `OTHER`, what no stage charged."""
        if name == OTHER:
            return max(0.0, self.seconds - sum(seconds for seconds, _ in self.stages.values()))
        return self.stages.get(name, (0.0, 0))[0]

    def __enter__(self) -> Window:
        self._begin = time.perf_counter()
        _here.window, _here.current = self, None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.perf_counter()
        _here.window = None
        self.seconds = end - self._begin
        self._recorder._made(self, self._begin, end)


@dataclass
class Recorder:
    """Adds up one epoch; written by the loader's threads and by the consumer's.

    Attributes
    ----------
    threads, batches_per_window, windows_ahead
        As in :class:`LoaderStats`; the loader keeps them current.
    workers
        As in :class:`LoaderStats`.
    first
        Whether this is the first epoch of a loader, which warms up.
    """

    threads: int = 0
    batches_per_window: int = 1
    windows_ahead: int = 0
    workers: int = 0
    first: bool = False
    idle: float = field(default=0.0, init=False)
    _waited: float = field(default=0.0, init=False)
    _batches: int = field(default=0, init=False)
    _cells: int = field(default=0, init=False)
    _windows: int = field(default=0, init=False)
    _made_cells: int = field(default=0, init=False)
    _busy: float = field(default=0.0, init=False)
    _stages: dict[str, tuple[float, int]] = field(default_factory=dict, init=False)
    _remote: Remote = field(default_factory=Remote, init=False)
    _last: dict[int, float] = field(default_factory=dict, init=False)
    _first: list[Window] = field(default_factory=list, init=False)
    _end: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._begin = time.perf_counter()

    def window(self, cells: int) -> Window:
        """``with`` this around making a window, on the thread that makes it."""
        return Window(self, cells)

    def handed_over(self, seconds: float, batches: int = 1, cells: int = 0) -> None:
        """The consumer got batches after waiting for `seconds`."""
        with self._lock:
            self._waited += seconds
            self._batches += batches
            self._cells += cells

    def end(self) -> None:
        """The epoch is over: time stands still."""
        if self._end is None:
            self._end = time.perf_counter()

    def _made(self, window: Window, begin: float, end: float) -> None:
        with self._lock:
            self._windows += 1
            self._made_cells += window.cells
            self._busy += window.seconds
            self._remote += window.remote
            # A thread that had nothing to do between two windows of an epoch was kept from the next one by
            # the bounds of read-ahead: there was more to make.
            thread = threading.get_ident()
            if self.first and thread not in self._last:
                self._first.append(window)
            self.idle += max(0.0, begin - self._last.get(thread, begin))
            self._last[thread] = end
            for name, (seconds, nbytes) in window.stages.items():
                before = self._stages.get(name, (0.0, 0))
                self._stages[name] = (before[0] + seconds, before[1] + nbytes)

    def stats(self) -> LoaderStats:
        """The sums so far."""
        with self._lock:
            found = {name: self._stages.get(name, (0.0, 0)) for name in STAGES}
            charged = sum(seconds for seconds, _ in found.values())
            found[OTHER] = (max(0.0, self._busy - charged), 0)
            found[WARM_UP] = (self._take_warm_up(found), 0)
            total = sum(seconds for seconds, _ in found.values()) + self.idle
            cells = self._made_cells
            return LoaderStats(
                seconds=(self._end or time.perf_counter()) - self._begin,
                batches=self._batches,
                cells=self._cells,
                windows=self._windows,
                threads=self.threads,
                batches_per_window=self.batches_per_window,
                windows_ahead=self.windows_ahead,
                stages={
                    name: Stage(s, _per(s, total), nbytes, _per(nbytes, s), _per(cells, s))
                    for name, (s, nbytes) in found.items()
                },
                wait_for_data=self._waited,
                wait_for_consumer=self.idle,
                workers=self.workers,
                remote=self._remote,
            )

    def _take_warm_up(self, found: dict[str, tuple[float, int]]) -> float:
        """Seconds by which the first windows took longer than the others, taken out of their stages."""
        first_cells = sum(window.cells for window in self._first)
        later_cells = self._made_cells - first_cells
        taken = 0.0
        for name in found:
            if name == "read":
                continue  # a cold page cache is the storage's time
            first = sum(window.spent(name) for window in self._first)
            later = max(0.0, found[name][0] - first)
            usual = later / later_cells * first_cells if later_cells else 0.0
            excess = max(0.0, first - usual)
            found[name] = found[name][0] - excess, found[name][1]
            taken += excess
        return taken
