"""Batches with equal numbers of cells of each category, none twice in an epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu.sampler._codes import checked_codes
from hbx_gpu.sampler._epoch import EpochSampler
from hbx_gpu.sampler._permutation import Permutations
from hbx_gpu.sampler._position import CELLS, EpochKey, at_least, digest
from hbx_gpu.sampler._rounds import Even, batch_sizes
from hbx_gpu.sampler._selection import LabelTable


class BalancedCellSampler(EpochSampler):
    """Batches with equal numbers of cells of each category, none twice in an epoch.

    A batch holds ``max(1, batch_size // n_categories)`` cells of each category, so it may be a little smaller
    than asked for (larger with more categories than batch_size). An epoch ends with the smallest category;
    larger ones leave out a surplus, another one in each epoch, which `n_dropped` counts.

    Parameters
    ----------
    balance_values
        Integer (n_cells,), category codes. Cells of code -1 (missing) are never drawn. The array is used as
        it is; nothing else is kept for each cell.
    batch_size, shuffle, seed, drop_last, num_workers, rank, world_size
        As in :class:`CellSampler`.

    Raises
    ------
    ValueError
        The codes are not integers in one dimension, or the batch size is below 1.
    """

    def __init__(
        self,
        balance_values: ArrayLike,
        batch_size: int = 1024,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.shuffle = bool(shuffle)
        self._table = LabelTable.of(checked_codes("balance_values", balance_values))
        counts = self._table.counts
        self._n_epoch = int(counts.sum())
        self._n_each = int(counts.min(initial=self._n_epoch))
        self._per = max(1, at_least("batch_size", batch_size, 1) // max(1, len(counts)))
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
            random=self.shuffle,
        )

    def _sizes(self, key: EpochKey) -> Even:  # noqa: ARG002 - the same in every epoch
        alike = batch_sizes(self._n_each, self._per, drop_last=self.drop_last)
        return alike.times(max(1, len(self._table.labels)))

    def _order(self, key: EpochKey, lanes: int) -> _BalancedOrder:  # noqa: ARG002 - batches are all alike
        return _BalancedOrder(self._table, key if self.shuffle else None)

    def _identity(self) -> dict[str, object]:
        return {"shuffle": self.shuffle, "balance_values": digest(self._table.codes)}


@dataclass(slots=True)
class _BalancedOrder:
    """One cell of each category in turn: any cut of the result is balanced to within one cell.

    Parameters
    ----------
    table
        Cells of each category.
    key
        Source of randomness; None: the cells of a category in ascending order.
    """

    table: LabelTable
    key: EpochKey | None
    _within: Permutations | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.key is not None:
            keys = [self.key.stream(CELLS, label) for label in self.table.labels.tolist()]
            self._within = Permutations(self.table.counts, keys)

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`~hbx_gpu.sampler._orders.EpochOrder`."""
        which, label = np.divmod(np.arange(begin, end), max(1, len(self.table.labels)))
        if self._within is not None:
            which = self._within.at(label, which)
        return self.table.cells(label, which)
