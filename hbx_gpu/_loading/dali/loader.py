"""DALI runs the loader: a real DALI pipeline that our threads feed, one sample per batch.

A thread takes finished batches from the loader, feeds them and starts DALI's run; the consumer's thread picks
up outputs without a copy. What DALI cannot carry travels beside it, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._loading.closing import close_dropped
from hbx_gpu._loading.dali.feed import Feeder, finished, rebuild, run_on, take_outputs
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._loading.options import DaliOptions, LoaderOptions
from hbx_gpu._loading.read_ahead import Ahead
from hbx_gpu._loading.sampler_attributes import rank_of, seed_of
from hbx_gpu._protocols import AnyFeed, CollateFunction
from hbx_gpu._streams import Held

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline


class CellPipeline(CellLoader):
    """A :class:`~hbx_gpu._loading.loader.CellLoader` whose batches go through DALI.

    Every iteration makes a DALI pipeline of its own, so that random operators depend on seed, epoch and rank
    alone. Made by :func:`cell_pipeline`.
    """

    def __init__(
        self,
        dataset: object,
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
        options = options or LoaderOptions(num_workers=0)
        super().__init__(
            dataset,
            sampler,
            collate_fn,
            options=options,
            feed=feed,
            batch_sampler=batch_sampler,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
        )
        assert options.dali is None or isinstance(options.dali, DaliOptions)
        self.dali = options.dali or DaliOptions()
        self._feeders: list[Feeder] = []
        self._run: _Run | None = None
        self._restored: dict[str, Any] | None = None  # state of random operators to begin with
        self._position = 0  # in the epoch, where the next iteration begins

    def _read_ahead(self) -> Ahead:
        ahead = super()._read_ahead()
        checkpoint = self._restored["checkpoint"] if self._restored else None
        self._run = _Run(ahead, self.dali, self.noise_seed(), checkpoint)
        self._restored, self._position = None, 0
        return self._run

    def noise_seed(self) -> int:
        """Seed of DALI's random operators; read after the sampler began, which may draw a seed."""
        seed = self.dali.seed
        if seed is None:
            seed = seed_of(self._order)
        entropy = [seed, self.epoch, self._rank(), self._position]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _rank(self) -> int:
        return rank_of(self._order)

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`CellLoader.set_epoch`."""
        before, self._run = self.epoch, None
        super().set_epoch(epoch)
        if self.epoch != before:
            self._restored, self._position = None, 0

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`CellLoader.state_dict`; with a graph also the state of DALI's random operators."""
        state = super().state_dict()
        if state["sampler"]["batches"] == 0:
            return state  # an epoch begins with a seed of its own
        if self._run is not None:
            checkpoint = self._run.checkpoint()
            if checkpoint is not None:
                state["graph"] = {"rank": self._rank(), "checkpoint": checkpoint}
        elif self._restored is not None:
            state["graph"] = self._restored
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`CellLoader.load_state_dict`.

        Random operators go on where they were on the rank that the state is from; on another rank, or with a
        state of a loader without a graph, they start again with a seed of their own.
        """
        super().load_state_dict(state)
        self._run = None
        graph = state.get("graph")
        same = graph is not None and self.dali.graph is not None and graph["rank"] == self._rank()
        self._restored = graph if same else None
        position = state["sampler"]
        self._position = int(position.get("cells", position["batches"]))

    def pipeline(self) -> Pipeline:
        """A ``nvidia.dali.Pipeline`` for an iterator of DALI's, such as ``DALIGenericIterator``.

        Its attribute `names` holds the names of the outputs, in order. It raises ``StopIteration`` after the
        last batch of an epoch; ``reset()`` begins the next epoch, or the one chosen with :meth:`set_epoch`.
        It has DALI outputs only: metadata that are not numbers are left out, bfloat16 comes as uint16, sparse
        batches come in three parts, and :meth:`state_dict` does not count its batches. This call waits for
        the first batch; ``close()`` ends the pipeline's thread.
        """
        from hbx_gpu._loading.dali.graph import FedPipeline

        return FedPipeline.begin(self)

    def begin_epoch(self, feed: Callable[[Ahead], Feeder]) -> Feeder:
        """Return the feeder of a pipeline for DALI's iterators in the coming epoch; :meth:`close` ends it."""
        ahead = super()._read_ahead()
        try:
            feeder = feed(ahead)
        except BaseException:
            ahead.close()
            raise
        self._feeders.append(feeder)
        return feeder

    def close(self) -> None:
        """See :meth:`CellLoader.close`; pipelines from :meth:`pipeline` end too."""
        super().close()
        for feeder in self._feeders:
            feeder.close()
        self._feeders.clear()


class _Run(Ahead):
    """One iteration through DALI: pipeline and feeding thread begin with the first ``next()``."""

    def __init__(self, ahead: Ahead, options: DaliOptions, seed: int, checkpoint: bytes | None) -> None:
        self._ahead, self._options, self._seed = ahead, options, seed
        self._checkpoint = checkpoint
        self.recorder = ahead.recorder
        self._feeder: Feeder | None = None
        self._received = 0
        self._closed = False
        self._held = Held()

    def __next__(self) -> object:
        if self._closed:
            raise StopIteration
        try:
            feeder = self._feeder or self._begin()
            packed = feeder.take()
            with feeder.lock:
                outputs = take_outputs(feeder.built, packed, self._options.device_id, self._held)
            feeder.give_room()
            self.cells = packed.cells
            self._received += 1
            built = feeder.built
            if not built.named:
                return tuple(outputs)
            return rebuild(packed, dict(zip(built.names, outputs, strict=True)))
        except StopIteration:
            self._checkpoint, self._received = None, 0  # a new epoch begins with a new seed
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def _begin(self) -> Feeder:
        from hbx_gpu._loading.dali.graph import build

        options = self._options
        batches = finished(self._ahead, options.device_id)
        first = next(batches)
        # DALI's own depth is how many runs it starts at once before the first output; ours is the room.
        built = build(first, options, depth=1, seed=self._seed, checkpoint=self._checkpoint)
        self._feeder = Feeder(
            run_on(first, batches), built, self._ahead, room=options.prefetch_queue_depth, start=True
        )
        return self._feeder

    def checkpoint(self) -> bytes | None:
        """State of random operators after the last batch received; None at the beginning of an epoch."""
        feeder = self._feeder
        if self._options.graph is not None and self._received and feeder is not None and not feeder.closed:
            with feeder.lock:
                self._checkpoint = bytes(feeder.built.pipe.checkpoint())
        return self._checkpoint

    def close(self) -> None:
        """See :class:`Ahead`."""
        if not self._closed:
            try:
                self.checkpoint()
            except RuntimeError:  # a pipeline that broke has no state
                self._checkpoint = None
            self._closed = True
            if self._feeder is not None:
                self._feeder.close()
                self._feeder = None
            self._ahead.close()

    def __del__(self) -> None:
        if not self._closed:
            close_dropped(self.close)
