"""The feed that makes batches on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from hbx_gpu._loading.residency.host import hold_on_host
from hbx_gpu._protocols import Collate, Loadable, Rows
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from hbx_gpu._loading.options import LoaderOptions

BatchT = TypeVar("BatchT")
OutT = TypeVar("OutT")


class HostFeed(Generic[BatchT, OutT]):
    """Batches of a dataset, collated on the thread that read them.

    Parameters
    ----------
    dataset, collate
        Dataset to read, and the collate that is applied to each batch.
    options
        How stored bytes are read and whether chunks stay on the heap; None: as the dataset does.
    """

    one_batch_per_window = False

    def __init__(
        self,
        dataset: Loadable[BatchT],
        collate: Collate[BatchT, OutT],
        options: LoaderOptions | None = None,
    ) -> None:
        self._collate = collate
        self._dataset = dataset if options is None else hold_on_host(dataset, options)

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return self._dataset.checked(batches)

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        found = zip(self._dataset.rows_nbytes(selections), selections, strict=True)
        return [nbytes + self._collated_nbytes(len(rows)) for nbytes, rows in found]

    def make(self, selections: Sequence[np.ndarray]) -> list[OutT]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        batches = self._dataset.read_rows(selections)
        with stage("decode") as collating:
            collating.nbytes = sum(self._collated_nbytes(len(rows)) for rows in selections)
            return [self._collate(batch) for batch in batches]

    def deliver(self, made: OutT) -> OutT:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return made

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        self._collate.set_epoch(epoch)

    def _collated_nbytes(self, n_rows: int) -> int:
        return self._collate.nbytes(n_rows, self._dataset.n_features)
