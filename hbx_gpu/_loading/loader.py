"""The iterable a training loop sees: batches in sampler order, made ahead of it.

Owns threads, queues and the position within an epoch; knows nothing of how a batch is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from hbx_gpu._devices import cores
from hbx_gpu._loading.ahead import Ahead, ReadAhead
from hbx_gpu._loading.feeds.host import Feed, HostFeed, tell_epoch
from hbx_gpu._loading.sizing import Sizing
from hbx_gpu.stats import LiveLine, LoaderStats, Recorder

ROWS_PER_WINDOW = 4096
_DECIDED_BY_SAMPLER = ("batch_size", "shuffle", "drop_last", "batch_sampler")


def _identity(batch: Any) -> Any:
    return batch


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
        self._threads = threads or cores()
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
        return ReadAhead(
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
