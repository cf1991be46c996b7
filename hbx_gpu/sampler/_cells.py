"""The order that visits every cell once per epoch: by group, by block, or uniformly at random."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu._remote.link import longest_latency
from hbx_gpu._source import GroupRuns
from hbx_gpu.sampler._epoch import EpochSampler
from hbx_gpu.sampler._groups import GroupTable, group_runs
from hbx_gpu.sampler._orders import (
    BlockOrder,
    EpochOrder,
    GroupOrder,
    LengthOrder,
    SomeRows,
    StoredOrder,
    UniformOrder,
)
from hbx_gpu.sampler._permutation import Permutation
from hbx_gpu.sampler._position import EpochKey, at_least, digest, distributed_rank
from hbx_gpu.sampler._rounds import Even, batch_sizes
from hbx_gpu.sampler._runs import as_array, integers

LOCALITIES = ("group", "block", "none")
_FAR = 0.002  # seconds; if requests take this long, the order of reads matters
_LOG = logging.getLogger(__name__)


class CellSampler(EpochSampler):
    """Visits every cell exactly once per epoch, in full batches except at most one.

    Parameters
    ----------
    groups_np
        Integer (n_cells,): the group (stored matrix) of each cell, ``dataset.groups_np``. Also
        ``dataset.group_runs``, which says the same in memory that does not grow with the cells. Only
        localities ``"block"`` and ``"group"`` look at the values.
    batch_size
        Cells per batch.
    shuffle
        False: the order of the dataset (or of `rows`), whatever the locality.
    seed
        Non-negative. The order of an epoch is a function of (seed, epoch). None
        draws a new seed for every iteration; several ranks, which must agree, take 0 instead.
    drop_last
        Leave out the partial batch and, on several ranks, the batches of an incomplete last round;
        `n_dropped` counts the cells, and a warning says so once.
    num_workers
        Number of worker processes that take a rank's batches in turn. It decides when a batch comes, never
        what it contains.
    locality
        ``"none"``: a uniform permutation. ``"group"``: each batch comes from one group, and the batches a
        worker gets in a row come from the same group as long as it lasts; what groups hold beyond their full
        batches is pooled into mixed ones. ``"block"``: between the two, see `block_size`. ``"auto"``:
        ``"block"`` if requests to object storage took this process long so far, else ``"none"``; the log says
        which. Several ranks might measure differently, so there it is an error.
    block_size, blocks_per_window
        For ``locality="block"``: each group is cut into blocks of block_size cells that lie side by side, the
        blocks of all groups are shuffled, and the cells of blocks_per_window blocks at a time are shuffled
        among themselves.
    rows
        Row numbers to draw from, for instance those of the training split; all rows by default. Batches hold
        row numbers of the whole dataset.
    length_group
        Number of batches that are sorted together, so that a batch holds cells of similar length, as
        transformers need: so many batches of the shuffled order at a time are sorted by descending length.
        The epoch begins with its longest cell, so that too little memory is noticed at once. This is the rule
        of Hugging Face's LengthGroupedSampler. None: no sorting.
    lengths
        Number of stored values of each cell, (n_cells,), for `length_group`. None: ``dataset.row_lengths`` of
        the dataset that ``make_loader`` is given with the sampler.
    rank, world_size
        By default those of torch.distributed when an iteration begins, else those that torchrun or srun
        put into the environment, else 0 and 1. All ranks get the same
        number of batches: the batches of the last round are cut smaller if need be, so that their sizes
        differ by at most one, and none holds a single cell unless batch_size is 1 (or they are dropped, see
        `drop_last`).

    Raises
    ------
    ValueError
        Groups are not one-dimensional, a size is below 1, the locality is unknown, the rank is not below the
        world size, or there are fewer than two cells per rank.
    IndexError
        A row number lies outside the dataset or is given twice.
    """

    def __init__(
        self,
        groups_np: ArrayLike | GroupRuns,
        batch_size: int = 1024,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        *,
        locality: str = "none",
        block_size: int = 64,
        blocks_per_window: int = 256,
        rows: ArrayLike | None = None,
        length_group: int | None = None,
        lengths: ArrayLike | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if locality not in (choices := (*LOCALITIES, "auto")):
            raise ValueError(f"unknown locality {locality!r}; choose one of {', '.join(map(repr, choices))}")
        self.shuffle = bool(shuffle)
        self.locality = _measured(world_size) if locality == "auto" else locality
        self.block_size = at_least("block_size", block_size, 1)
        self.blocks_per_window = at_least("blocks_per_window", blocks_per_window, 1)
        groups = groups_np if isinstance(groups_np, GroupRuns) else integers("groups_np", groups_np)
        # The array lives as long as the sampler, so it is kept in 32 bits where these suffice.
        width = np.int32 if len(groups) < 2**31 else np.int64
        self._rows = None if rows is None else _checked_rows(rows, len(groups)).astype(width)
        self._length_group, self._given_lengths, self._n_cells = 0, np.empty(0, np.int32), len(groups)
        if length_group is not None:
            self._length_group = at_least("length_group", length_group, 1)
            if not self.shuffle or self.locality == "group":
                raise ValueError(
                    'length_group sorts a shuffled order: leave shuffle on, and locality at "none" or "block"'
                )
            if lengths is not None:
                self.take_lengths(lengths)
        elif lengths is not None:
            raise ValueError("lengths are for length_group=, the number of batches that are sorted at a time")
        self._n_epoch = len(groups) if self._rows is None else len(self._rows)
        # A uniform order and that of the dataset do not depend on groups, and never look at them.
        self._groups: GroupTable | None = None
        if self.shuffle and self.locality != "none":
            self._groups = GroupTable.of(group_runs(groups, self._rows))
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
            random=self.shuffle,
        )

    @property
    def rows(self) -> np.ndarray | None:
        """Row numbers that batches are made of; None: all rows."""
        return self._rows

    def _sizes(self, key: EpochKey) -> Even:  # noqa: ARG002 - the same in every epoch
        return batch_sizes(self._n_epoch, self.batch_size, drop_last=self.drop_last)

    def _order(self, key: EpochKey, lanes: int) -> EpochOrder:
        if not self.shuffle:
            return self._chosen(StoredOrder())
        if self._groups is not None and self.locality == "group":
            return self._chosen(GroupOrder(self._groups, self.batch_size, lanes, key))
        found: UniformOrder | BlockOrder
        if self._groups is not None:
            found = BlockOrder(self._groups, self.block_size, self.blocks_per_window, key)
        else:
            found = UniformOrder(Permutation(self._n_epoch, key.stream()))
        order = self._chosen(found)
        if not self._length_group:
            return order
        batches = max(1, min(self._n_epoch // (4 * self.batch_size), self._length_group))
        return LengthOrder(
            order,
            self._n_epoch,
            batches * self.batch_size,
            self._lengths,
            lambda: found.find(self._longest()),
        )

    def _chosen(self, order: EpochOrder) -> EpochOrder:
        return order if self._rows is None else SomeRows(order, self._rows)

    def _longest(self) -> int:
        """Which of the cells of an epoch is the longest."""
        return int(np.argmax(self._lengths if self._rows is None else self._lengths[self._rows]))

    @property
    def needs_lengths(self) -> bool:
        """Whether cells are sorted by lengths that were not given yet."""
        return bool(self._length_group and self._n_cells and not len(self._given_lengths))

    def take_lengths(self, lengths: ArrayLike) -> None:
        """Set `lengths`, which were left out when the sampler was made.

        Raises
        ------
        ValueError
            They are not integers, one for each cell.
        """
        found = integers("lengths", lengths)
        if len(found) != self._n_cells:
            raise ValueError(
                f"lengths must have {self._n_cells} entries, one for each cell, got {len(found)}"
            )
        self._given_lengths = found.astype(np.int32)

    @property
    def _lengths(self) -> np.ndarray:
        if self.needs_lengths:
            raise ValueError(
                "length_group needs the lengths of cells: pass lengths=dataset.row_lengths, or give the "
                "sampler to make_loader, which takes them from its dataset"
            )
        return self._given_lengths

    def _identity(self) -> dict[str, object]:
        blocks = {"block_size": self.block_size, "blocks_per_window": self.blocks_per_window}
        return {
            "shuffle": self.shuffle,
            **({"locality": self.locality} if self.shuffle else {}),
            **(blocks if self.shuffle and self.locality == "block" else {}),
            **({} if self._rows is None else {"rows": digest(self._rows)}),
            **(
                {"length_group": self._length_group, "lengths": digest(self._lengths)}
                if self._length_group
                else {}
            ),
            "n_cells": self._n_epoch,
            **({} if self._groups is None else {"groups": self._groups.digest()}),
        }


def _measured(world_size: int | None) -> str:
    """The locality that suits the stores which this process has asked so far; the log says which, and why."""
    if (distributed_rank()[1] if world_size is None else world_size) > 1:
        raise ValueError(
            'locality="auto": ranks measure by themselves and may choose differently; pass "none" or "block"'
        )
    latency = longest_latency()
    if latency is None:
        chosen, why = (
            "none",
            "this process has asked no object storage, and local reads are quick in any order",
        )
    elif latency < _FAR:
        chosen, why = "none", f"a request to object storage takes {1000 * latency:.1f} ms, which is little"
    else:
        chosen = "block"
        why = f"a request to object storage takes {1000 * latency:.1f} ms, and neighboring cells need few"
    _LOG.info('locality="auto": %r, because %s; name it to get this order in every run', chosen, why)
    return chosen


def _checked_rows(rows: ArrayLike, n_cells: int) -> np.ndarray:
    """Row numbers in ``[0, n_cells)``, each once; a boolean mask of all cells is fine too."""
    chosen = as_array("rows", rows)
    if chosen.dtype == bool and chosen.shape == (n_cells,):
        return np.flatnonzero(chosen)
    chosen = integers("rows", chosen).astype(np.int64)
    low, high = int(chosen.min(initial=0)), int(chosen.max(initial=-1))
    if low < -n_cells or high >= n_cells:
        raise IndexError(
            f"row {low if low < -n_cells else high} is out of range for a dataset of {n_cells} cells"
        )
    chosen = np.where(chosen < 0, chosen + n_cells, chosen)
    if (np.diff(chosen) > 0).all():
        return chosen
    seen = np.zeros(n_cells, bool)
    seen[chosen] = True
    if np.count_nonzero(seen) < len(chosen):
        again, times = np.unique(chosen, return_counts=True)
        most = int(times.argmax())
        raise IndexError(
            f"row {again[most]} is in rows {times[most]} times; each is drawn once per epoch. "
            "WeightedCellSampler draws with replacement"
        )
    return chosen
