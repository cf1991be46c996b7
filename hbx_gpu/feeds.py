"""How a window of batches is made: on the host, or staged there and decoded on a GPU.

A feed's `make` runs on the loader's threads, several at a time; `deliver` on the consumer's thread, batch by
batch in order. What a feed delivers belongs to the consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hbx_gpu.collates import DenseCollate, sparse_to_dense_collate

if TYPE_CHECKING:
    pass


class Feed(Protocol):
    """Makes batches of row numbers."""

    def make(self, selections: list[np.ndarray]) -> list[Any]:
        """One entry per batch of a window; any thread."""

    def deliver(self, made: Any) -> Any:
        """What the consumer receives for an entry; the consumer's thread."""

    def nbytes(self, rows: np.ndarray) -> int:
        """Bytes that the batch of `rows` takes up, as far as that can be told."""


class HostFeed:
    """Batches of a dataset, collated on the thread that read them."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def make(self, selections: list[np.ndarray]) -> list[Any]:
        """See :class:`Feed`."""
        read_batches = getattr(self._dataset, "read_batches", None)
        if read_batches is None:
            return [self._collate(self._dataset.__getitems__(rows)) for rows in selections]
        return [self._collate(batch) for batch in read_batches(selections)]

    def deliver(self, made: Any) -> Any:
        """See :class:`Feed`."""
        return made

    def nbytes(self, rows: np.ndarray) -> int:
        """See :class:`Feed`."""
        batch_nbytes = getattr(self._dataset, "batch_nbytes", None)
        nbytes = int(batch_nbytes(rows)) if batch_nbytes else 0
        collate_nbytes = getattr(self._collate, "nbytes", None)
        if self._collate is sparse_to_dense_collate:
            collate_nbytes = DenseCollate().nbytes
        if collate_nbytes:
            nbytes += int(collate_nbytes(len(rows), self._dataset.n_features))
        return nbytes
