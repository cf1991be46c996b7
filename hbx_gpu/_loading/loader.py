"""The iterable a training loop sees: batches in sampler order, made ahead of it.

Owns threads, queues and the position within an epoch; knows nothing of how a batch is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._collates import as_collate
from hbx_gpu._datasets.plain import loadable
from hbx_gpu._devices import cores
from hbx_gpu._loading.closing import close_dropped
from hbx_gpu._loading.feeds.host import HostFeed
from hbx_gpu._loading.framework_samplers import Batches, HasOrder, RankSampler, as_order
from hbx_gpu._loading.identity import check_identity, identity_of
from hbx_gpu._loading.options import HOST_BUDGET, LoaderOptions
from hbx_gpu._loading.pairs import with_controls, with_neighbors
from hbx_gpu._loading.read_ahead import Ahead, ReadAhead
from hbx_gpu._loading.sampler_attributes import OfEpochs, batch_size_of, is_paired, workers_of
from hbx_gpu._loading.sizing import Sizing
from hbx_gpu._loading.workers import Handover, explained, refuse_in_workers
from hbx_gpu._protocols import AnyFeed, CollateFunction
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu.loader_stats import LiveLine, LoaderStats, Recorder
from hbx_gpu.sampler import NeighborSampler

ROWS_PER_WINDOW = 4096


def _identity(batch: object) -> object:
    return batch


def default_window(sampler: object) -> int:
    """Return the number of batches that make a window of about `ROWS_PER_WINDOW` rows."""
    return max(1, ROWS_PER_WINDOW // (batch_size_of(sampler) or ROWS_PER_WINDOW))


_STATE_VERSION = 2


@dataclass(slots=True)
class _Run:
    """An iteration: the source of its batches, the batches before it in the epoch, and those handed over."""

    ahead: Ahead | None
    before: int
    delivered: int = 0
    ended: bool = False


_WAITING = 4
"""Threads besides one per core if chunks are in object storage: while some wait for it, others decode."""


@runtime_checkable
class _HasDirectory(Protocol):
    """A dataset whose chunks lie in files or objects."""

    @property
    def directory(self) -> ChunkDirectory:
        """Directory of its chunks."""


def _is_remote(dataset: object) -> bool:
    return isinstance(dataset, _HasDirectory) and dataset.directory.is_remote


_WINDOW_NBYTES = 24 << 20
"""Bytes of batches in a window whose rows share no work; more would only take more memory."""
_SHARING_WINDOW_NBYTES = 64 << 20
"""Bytes of batches in a window whose rows share chunks that decode whole only, requests, or launches."""


def _window_nbytes(feed: AnyFeed, dataset: object) -> int:
    """Return how many bytes of batches to make together, until the loader finds that more are better."""
    on_host = isinstance(feed, HostFeed)
    if not on_host or not isinstance(dataset, _HasDirectory) or dataset.directory.is_remote:
        return _SHARING_WINDOW_NBYTES
    codecs = ChunkCodec.several(dataset.directory.layouts)
    return _WINDOW_NBYTES if all(one.decodes_rows_alone for one in codecs) else _SHARING_WINDOW_NBYTES


class CellLoader(DataLoader[Any]):
    """A torch DataLoader that reads ahead with threads (num_workers 0) or spawned workers, and resumes.

    Parameters
    ----------
    dataset, sampler, collate_fn
        As for :func:`hbx_gpu.dataloader.make_loader`.
    options
        Numbers of threads and processes, limits of read-ahead, and keywords of torch's DataLoader.
    feed
        Feed that makes batches on threads; None for one of `dataset` and `collate_fn` on the host.
    batch_sampler
        As torch calls a sampler of batches; instead of `sampler`.
    batch_size, shuffle, drop_last
        The sampler decides these. They are here for frameworks that make a loader of this class again from
        its attributes, with another `batch_sampler` and torch's defaults beside it, as Lightning does to
        predict.

    Attributes
    ----------
    options, feed
        The given options, completed with what `sampler` decided, so that another loader can be made from
        them.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: object = None,
        collate_fn: CollateFunction | None = None,
        *,
        options: LoaderOptions | None = None,
        feed: AnyFeed | None = None,
        batch_sampler: object = None,
        batch_size: int | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
    ) -> None:
        decided = {"batch_size": batch_size not in (None, 1), "shuffle": shuffle, "drop_last": drop_last}
        if wrong := [name for name, value in decided.items() if value]:
            raise ValueError(f"{', '.join(wrong)}: the sampler decides this; set it there")
        if (sampler is None) == (batch_sampler is None):
            raise ValueError(
                "a loader needs either sampler= or batch_sampler=; make_loader(dataset, batch_size=...) "
                "makes a sampler of its own"
            )
        options = options or LoaderOptions()
        if isinstance(batch_sampler, Batches):
            batch_sampler = batch_sampler.within(options.rows)
        sampler = batch_sampler if sampler is None else sampler
        num_workers = options.num_workers
        if num_workers is None:
            num_workers = workers_of(sampler)
        keywords = dict(options.torch)
        if num_workers > 0:
            # Spawn: forked children of a process with threads and open files hang or corrupt.
            keywords = {"multiprocessing_context": "spawn", "persistent_workers": True} | keywords
        # A batch sampler that a framework made is shown to it again: it looks there for the rows of a batch.
        # torch itself feeds worker processes from it, so there the order is the one inside.
        self._order = as_order(sampler, inner=num_workers > 0)
        as_given = num_workers == 0 or isinstance(batch_sampler, HasOrder)
        batches = Batches.of(self._order)
        super().__init__(
            dataset,
            batch_sampler=batch_sampler if as_given and isinstance(batch_sampler, Iterable) else batches,
            collate_fn=collate_fn or _identity,
            num_workers=num_workers,
            **keywords,
        )
        self.feed: AnyFeed = feed or HostFeed(loadable(dataset), as_collate(self.collate_fn))
        self.options = replace(options, num_workers=num_workers)
        self._paired = is_paired(self._order)
        self._neighbors = self._order.neighbors_per_cell if isinstance(self._order, NeighborSampler) else 0
        self._memory_budget = options.memory_budget or HOST_BUDGET
        self._progress = options.progress
        self._threads = options.threads or cores() + (_WAITING if _is_remote(dataset) else 0)
        single = self.feed.one_batch_per_window
        self._window = options.window or (1 if single else default_window(sampler))
        self._window_nbytes = _window_nbytes(self.feed, dataset)
        given = options.window is not None or options.threads is not None or single
        self._sizing = Sizing(self._threads, fixed=given)
        self._runs: list[_Run] = []
        self._recorder = self._new_recorder()
        self._live: list[Ahead] = []
        # torch sets this attribute where it makes the batch sampler itself, and refuses later assignments.
        self.__dict__["sampler"] = batches.sampler
        # Hugging Face accelerate deals the batches of other loaders to processes, which ours does by itself.
        self._is_accelerate_prepared = isinstance(batches.sampler, RankSampler)

    @property
    def epoch(self) -> int:
        """Epoch of the running or the next iteration, at which a loop over epochs has to begin."""
        return self._order.epoch

    @property
    def resumed(self) -> bool:
        """Whether the next iteration continues from a loaded state."""
        return self._order.resumed

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the epoch, or of what remains of it.

        Nothing begins before the first ``next()``: until then, :meth:`set_epoch` and :meth:`load_state_dict`
        take effect, and ranks are those there are then.
        """
        return self._iterate()

    def _iterate(self) -> Iterator[object]:
        if self.num_workers > 0:
            refuse_in_workers()
        batches = self._from_workers() if self.num_workers > 0 else self._read_ahead()
        ahead = batches if isinstance(batches, Ahead) else None
        recorder = self._recorder = Recorder(workers=self.num_workers) if ahead is None else ahead.recorder
        run = _Run(ahead, self._order.n_done)
        self._runs = [*(other for other in self._runs if not other.ended), run]
        line: LiveLine | None = None
        clock = time.perf_counter
        try:
            if self._progress:
                line = LiveLine(recorder, self._length(), run.before)
            while not run.ended:
                begin = clock()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                recorder.handed_over(clock() - begin, cells=0 if ahead is None else ahead.cells)
                # Counted before it is handed over: a state saved by the consumer includes this batch.
                run.delivered += 1
                if line is not None:
                    line.update()
                batch = with_controls(batch) if self._paired else batch
                batch = with_neighbors(batch, self._neighbors) if self._neighbors else batch
                yield batch if self.options.convert is None else self.options.convert(batch)
        finally:
            recorder.end()
            if line is not None:
                line.close()
            run.ended = True
            if ahead is not None:
                close_dropped(ahead.close)

    def _from_workers(self) -> Iterator[object]:
        """Yield batches of worker processes; errors at their start are explained."""
        if isinstance(self.collate_fn, OfEpochs):  # before workers are asked for batches of it
            self.collate_fn.set_epoch(self._order.epoch)
        with explained():
            batches = super().__iter__()
        while True:
            with explained():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def _get_iterator(self) -> Any:
        """Start worker processes, as torch does, with a collate that finds out where shared memory ends."""
        given: Any = self.collate_fn
        self.collate_fn = Handover(given) if self.num_workers > 0 else given
        try:
            return super()._get_iterator()
        finally:
            self.collate_fn = given

    def _length(self) -> int | None:
        return len(self._order) if isinstance(self._order, Sized) else None

    def _read_ahead(self) -> Ahead:
        order = self._order.batches()
        self.feed.set_epoch(self._order.epoch)
        return ReadAhead(
            self.feed,
            order,
            threads=self._threads,
            window=self._window,
            window_nbytes=self._window_nbytes,
            memory_budget=self._memory_budget,
            sizing=self._sizing,
            recorder=self._new_recorder(),
            timeout=self.timeout,
        )

    def _new_recorder(self) -> Recorder:
        first = not self._runs
        return Recorder(self._threads, self._window * self._sizing.factor, self._sizing.depth, first=first)

    def stats(self) -> LoaderStats:
        """Return where the time of the running or last epoch went so far.

        With worker processes, only batches and the consumer's waiting are known. The first epoch has a stage
        "warm-up" for compiling and for touching memory for the first time.
        """
        return self._recorder.stats()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, for the sampler too.

        Setting the epoch of a loaded state keeps its position. Any other epoch starts from its beginning,
        with a warning if that drops a position which was loaded and not used.
        """
        self._order.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed over: small, picklable, independent of read-ahead.

        A loader over the same cells that loads it with :meth:`load_state_dict` continues with the next batch,
        also with another number of workers or ranks. After the last batch of an epoch, the state is that of
        the beginning of the next epoch.

        Returns
        -------
        dict
            ``epoch``: the epoch to continue with; ``version``, ``sampler`` and ``dataset``, which says what
            the rows are.
        """
        position = self._order.state_dict(self._runs[-1].delivered if self._runs else 0)
        return {
            "version": _STATE_VERSION,
            "epoch": position["epoch"],
            "sampler": position,
            "dataset": identity_of(self.dataset),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` at the next iteration.

        Raises
        ------
        RuntimeError
            An iteration is running; its position cannot be changed.
        ValueError
            The state belongs to other cells or to another kind of sampler, or another release saved it.
        """
        if any(not run.ended for run in self._runs):
            raise RuntimeError(
                "load_state_dict() while an iteration of this loader is running: its next batches are made "
                "already. Load the state before iterating, or end the iteration with loader.close() first"
            )
        if state.get("version") != _STATE_VERSION or "sampler" not in state:
            found = f"version {state['version']}" if "version" in state else f"none, only {sorted(state)}"
            raise ValueError(
                f"this release of hbx_gpu continues loader states of version {_STATE_VERSION}, and this one "
                f"has {found}. Continue with the release that saved it, or start the epoch anew "
                "without the state"
            )
        check_identity(state.get("dataset"), self.dataset)
        self._order.load_state_dict(state["sampler"])
        self._runs.clear()

    def close(self) -> None:
        """Stop reading ahead and end the threads; running iterations stop."""
        for run in self._runs:
            run.ended = True
            if run.ahead is not None:
                run.ahead.close()
        # torch has no public way to end workers that persist.
        workers: object = getattr(self, "_iterator", None)
        if workers is not None and hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
            self._iterator = None

    def __enter__(self) -> CellLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
