"""The order that visits every cell once per epoch: by group, by block, or uniformly at random."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu.sampler._epoch import EpochSampler
from hbx_gpu.sampler._position import at_least, digest
from hbx_gpu.sampler._rounds import batch_sizes
from hbx_gpu.sampler._runs import integers, number, ranges, rows_by_code, shuffle_runs

LOCALITIES = ("group", "block", "none")


class CellSampler(EpochSampler):
    """Visits every cell exactly once per epoch, in full batches except at most one.

    Parameters
    ----------
    groups_np
        Integer (n_cells,): the group (stored matrix) of each cell, ``dataset.groups_np``.
    batch_size
        Cells per batch.
    shuffle
        False: the order of the dataset (or of `rows`), whatever the locality.
    seed
        Non-negative. The order of an epoch comes from ``numpy.random.SeedSequence([seed, epoch])``. None
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
        batches is pooled into mixed ones. ``"block"``: between the two, see `block_size`.
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
        Number of stored values of each cell, (n_cells,), for `length_group`: ``dataset.row_lengths``.
    rank, world_size
        By default those of torch.distributed when an iteration begins, else 0 and 1. All ranks get the same
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
        groups_np: ArrayLike,
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
        if locality not in LOCALITIES:
            raise ValueError(
                f"unknown locality {locality!r}; choose one of {', '.join(map(repr, LOCALITIES))}"
            )
        self.shuffle = bool(shuffle)
        self.locality = locality
        self.block_size = at_least("block_size", block_size, 1)
        self.blocks_per_window = at_least("blocks_per_window", blocks_per_window, 1)
        groups = integers("groups_np", groups_np)
        # The array lives as long as the sampler, so it is kept in 32 bits where these suffice.
        width = np.int32 if len(groups) < 2**31 else np.int64
        self._rows = None if rows is None else _checked_rows(rows, len(groups)).astype(width)
        self._length_group, self._lengths = 0, np.empty(0, np.int32)
        if length_group is not None:
            self._length_group = at_least("length_group", length_group, 1)
            self._lengths = self._checked_lengths(lengths, len(groups))
        elif lengths is not None:
            raise ValueError("lengths are for length_group=, the number of batches that are sorted at a time")
        codes, self._group_sizes = number(groups if self._rows is None else groups[self._rows])
        self._n_epoch = len(codes)
        self._by_group = rows_by_code(codes).astype(width)
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

    def _sizes(self, rng: np.random.Generator) -> np.ndarray:  # noqa: ARG002 - the same in every epoch
        return batch_sizes(self._n_epoch, self.batch_size, drop_last=self.drop_last)

    def _cells(self, rng: np.random.Generator, lanes: int) -> np.ndarray:
        if not self.shuffle:
            cells = np.arange(self._n_epoch)
        elif self.locality == "group":
            cells = self._grouped(rng, lanes)
        elif self.locality == "block":
            cells = self._blocked(rng)
        else:
            cells = rng.permutation(self._n_epoch)
        cells = cells if self._rows is None else self._rows[cells].astype(np.int64)
        return self._by_length(cells) if self._length_group else cells

    def _by_length(self, cells: np.ndarray) -> np.ndarray:
        """Sort `length_group` batches of cells at a time by descending length, the longest cell in front."""
        batches = max(1, min(len(cells) // (4 * self.batch_size), self._length_group))
        megabatch = np.arange(len(cells)) // (batches * self.batch_size)
        lengths = self._lengths[cells]
        cells = cells[np.lexsort((-lengths, megabatch))]  # stable: equal lengths stay shuffled
        if len(cells):
            longest = int(np.argmax(self._lengths[cells]))
            cells[[0, longest]] = cells[[longest, 0]]
        return cells

    def _checked_lengths(self, lengths: ArrayLike | None, n_cells: int) -> np.ndarray:
        if not self.shuffle or self.locality == "group":
            raise ValueError(
                'length_group sorts a shuffled order: leave shuffle on, and locality at "none" or "block"'
            )
        if lengths is None:
            raise ValueError("length_group needs lengths=, such as dataset.row_lengths")
        found = integers("lengths", lengths)
        if len(found) != n_cells:
            raise ValueError(f"lengths must have {n_cells} entries, one for each cell, got {len(found)}")
        return found.astype(np.int32)

    def _grouped(self, rng: np.random.Generator, lanes: int) -> np.ndarray:
        size, ends = self.batch_size, np.cumsum(self._group_sizes)
        rows = self._by_group.astype(np.int64)
        shuffle_runs(rows, ends, rng)
        tails = self._group_sizes % size
        is_tail = np.zeros(len(rows), bool)
        is_tail[ranges(ends - tails, tails)] = True
        pool = rows[is_tail]
        rng.shuffle(pool)
        cells = np.empty_like(rows)
        n_whole = len(rows) - len(pool)
        np.compress(~is_tail, rows, out=cells[:n_whole])
        cells[n_whole:] = pool

        # The pool is packed like one more group; its partial batch comes after all the full ones.
        n_batches = np.append(self._group_sizes, len(pool)) // size
        order = pack_lanes(n_batches, lanes, queue_ranks=rng.permutation(len(n_batches)))
        n_full = len(order) * size
        rows[n_full:] = cells[n_full:]
        full = cells[:n_full].reshape(-1, size)
        np.take(full, order, axis=0, out=rows[:n_full].reshape(-1, size), mode="clip")
        return rows

    def _blocked(self, rng: np.random.Generator) -> np.ndarray:
        ends = np.cumsum(self._group_sizes)
        per_group = -(-self._group_sizes // self.block_size)
        within = ranges(np.zeros_like(per_group), per_group) * self.block_size
        starts = np.repeat(ends - self._group_sizes, per_group) + within
        lengths = np.minimum(self.block_size, np.repeat(ends, per_group) - starts)
        order = rng.permutation(len(starts))
        starts, lengths = starts[order], lengths[order]
        cells: np.ndarray = self._by_group[ranges(starts, lengths)].astype(np.int64)
        window_ends = np.cumsum(lengths)[self.blocks_per_window - 1 :: self.blocks_per_window]
        shuffle_runs(cells, np.append(window_ends, len(cells)), rng)
        return cells

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
            "groups": digest(self._by_group, self._group_sizes),
        }


def _checked_rows(rows: ArrayLike, n_cells: int) -> np.ndarray:
    """Row numbers in ``[0, n_cells)``, each once; a boolean mask of all cells is fine too."""
    chosen = np.asarray(rows)
    if chosen.dtype == bool and chosen.shape == (n_cells,):
        return np.flatnonzero(chosen)
    chosen = integers("rows", chosen).astype(np.int64)
    low, high = int(chosen.min(initial=0)), int(chosen.max(initial=-1))
    if low < -n_cells or high >= n_cells:
        raise IndexError(
            f"row {low if low < -n_cells else high} is out of range for a dataset of {n_cells} cells"
        )
    chosen = np.where(chosen < 0, chosen + n_cells, chosen)
    times = np.bincount(chosen, minlength=n_cells)
    if times.max(initial=0) > 1:
        raise IndexError(
            f"row {int(times.argmax())} is in rows {times.max()} times; each is drawn once per epoch. "
            "WeightedCellSampler draws with replacement"
        )
    return chosen


def pack_lanes(n_batches: np.ndarray, lanes: int, *, queue_ranks: np.ndarray) -> np.ndarray:
    """Order batches in time so that every lane (worker of a rank) stays with a group as long as it can.

    Groups go to lanes greedily, the largest first, each to the lane with the fewest batches so far (the
    lowest on ties); a lane's queue is group after group. Position p of the result is lane ``p % lanes``'s
    turn. Lanes have equally many turns, so what a queue holds beyond its turns, taken from its end, goes to
    lanes that would run dry, the longest queue first: a single huge group ends up on all lanes.

    Parameters
    ----------
    n_batches
        Integer (n_groups,), full batches of each group; a group's batches are numbered consecutively.
    queue_ranks
        Integer (n_groups,): groups of a lowest rank come first in their lane's queue.

    Returns
    -------
    numpy.ndarray
        int64 (n_batches.sum(),), numbers of batches in the order of time.
    """
    total = int(n_batches.sum())
    lane_of = np.zeros(len(n_batches), np.int64)
    loads = [(0, lane) for lane in range(lanes)]
    for group in np.argsort(-n_batches, kind="stable").tolist():
        load, emptiest = loads[0]
        lane_of[group] = emptiest
        heapq.heapreplace(loads, (load + int(n_batches[group]), emptiest))

    queue = np.lexsort((queue_ranks, lane_of))
    batches = ranges((np.cumsum(n_batches) - n_batches)[queue], n_batches[queue])
    queued = np.bincount(lane_of, weights=n_batches, minlength=lanes).astype(np.int64)
    turns = total // lanes + (np.arange(lanes) < total % lanes)
    lane = np.repeat(np.arange(lanes), queued)
    turn = ranges(np.zeros_like(queued), queued)

    over = np.maximum(queued - turns, 0)
    longest_first = np.argsort(-over, kind="stable")
    ends = np.cumsum(queued)
    moved = ranges((ends - over)[longest_first], over[longest_first])
    lacking = np.maximum(turns - queued, 0)
    lane[moved] = np.repeat(np.arange(lanes), lacking)
    turn[moved] = ranges(queued, lacking)

    order = np.empty(total, np.int64)
    order[turn * lanes + lane] = batches
    return order
