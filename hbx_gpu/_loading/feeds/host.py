"""What a feed is, and the one that makes batches on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hbx_gpu._collates import (
    DenseCollate,
    MultimodalCollate,
    multimodal_to_dense_collate,
    sparse_to_dense_collate,
)
from hbx_gpu._devices import cores
from hbx_gpu.stats import stage


class Feed(Protocol):
    """Makes batches of row numbers."""

    def make(self, selections: list[np.ndarray]) -> list[Any]:
        """One entry per batch of a window; any thread."""

    def deliver(self, made: Any) -> Any:
        """What the consumer receives for an entry; the consumer's thread."""

    def nbytes(self, rows: np.ndarray) -> int:
        """Bytes that the batch of `rows` takes up, as far as that can be told."""


def tell_epoch(collate: Any, epoch: int) -> None:
    """Tell a feed or a collate which epoch comes, if it wants to know."""
    set_epoch = getattr(collate, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


class HostFeed:
    """Batches of a dataset, collated on the thread that read them.

    Parameters
    ----------
    dataset, collate
        What is read, and what becomes of each batch.
    io
        How stored bytes are read: ``"mmap"``, ``"pinned"`` (``preadv`` here), ``"auto"``, which measures
        both; None: as the dataset was opened.
    residency, residency_budget
        ``"none"`` and ``"auto"``: the page cache keeps chunks. ``"host"`` and ``"device"``: a copy on the
        heap, of so many bytes at most.
    threads
        That copy and measure; None: as many as cores.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Any],
        *,
        io: str | None = None,
        residency: str = "none",
        residency_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._collate = collate
        if io is not None or residency != "none":
            from hbx_gpu._loading.residency.host import hold_on_host

            dataset = hold_on_host(
                dataset, residency, io=io, budget=residency_budget, threads=threads or cores()
            )
        self._dataset = dataset

    def make(self, selections: list[np.ndarray]) -> list[Any]:
        """See :class:`Feed`."""
        read_batches = getattr(self._dataset, "read_batches", None)
        if read_batches is None:
            return [self._collate(self._dataset.__getitems__(rows)) for rows in selections]
        batches = read_batches(selections)
        with stage("decode") as collating:
            collating.nbytes = sum(self._collated_nbytes(len(rows)) for rows in selections)
            return [self._collate(batch) for batch in batches]

    def set_epoch(self, epoch: int) -> None:
        """Tell the collate, if what it makes depends on the epoch."""
        tell_epoch(self._collate, epoch)

    def deliver(self, made: Any) -> Any:
        """See :class:`Feed`."""
        return made

    def nbytes(self, rows: np.ndarray) -> int:
        """See :class:`Feed`."""
        batch_nbytes = getattr(self._dataset, "batch_nbytes", None)
        return (int(batch_nbytes(rows)) if batch_nbytes else 0) + self._collated_nbytes(len(rows))

    def nbytes_of(self, batches: list[np.ndarray]) -> list[int]:
        """:meth:`nbytes` of each of several batches."""
        batches_nbytes = getattr(self._dataset, "batches_nbytes", None)
        if batches_nbytes is None:
            return [self.nbytes(rows) for rows in batches]
        found = zip(batches_nbytes(batches), batches, strict=True)
        return [nbytes + self._collated_nbytes(len(rows)) for nbytes, rows in found]

    def _collated_nbytes(self, n_rows: int) -> int:
        collate_nbytes = getattr(self._collate, "nbytes", None)
        if self._collate is sparse_to_dense_collate:
            collate_nbytes = DenseCollate().nbytes
        if self._collate is multimodal_to_dense_collate:
            collate_nbytes = MultimodalCollate().nbytes
        return int(collate_nbytes(n_rows, self._dataset.n_features)) if collate_nbytes else 0
