"""Orders of an epoch from which any stretch can be taken alone, so that none is held in memory.

Every class here answers one question: which cells come at the positions ``[begin, end)`` of this epoch? What
they keep grows with the number of groups or labels, never with the number of cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hbx_gpu.sampler._groups import GroupTable
from hbx_gpu.sampler._lanes import LaneQueues
from hbx_gpu.sampler._permutation import Permutation
from hbx_gpu.sampler._position import BLOCKS, CELLS, POOL, QUEUES, WINDOWS, EpochKey
from hbx_gpu.sampler._runs import ranges


class EpochOrder(Protocol):
    """The cells of one epoch, one batch after the other."""

    def cells(self, begin: int, end: int) -> np.ndarray:
        """Cells at the positions ``[begin, end)``: int64, an array of the caller's own."""


@dataclass(frozen=True, slots=True)
class HeldOrder:
    """An order that is held in memory as a whole."""

    held: np.ndarray

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`EpochOrder`."""
        # A copy, so that a batch kept by the consumer does not keep the whole epoch.
        return self.held[begin:end].copy()


@dataclass(frozen=True, slots=True)
class StoredOrder:
    """Cell after cell, as they are numbered."""

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`EpochOrder`."""
        return np.arange(begin, end)


@dataclass(frozen=True, slots=True)
class UniformOrder:
    """All cells in a uniformly random order."""

    permutation: Permutation

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`EpochOrder`."""
        return self.permutation.span(begin, end)

    def find(self, cell: int) -> int:
        """Position at which a cell comes."""
        return int(self.permutation.find(np.array([cell]))[0])


@dataclass(slots=True)
class BlockOrder:
    """Blocks of neighbors in a random order; the cells of several blocks at a time are shuffled together.

    Parameters
    ----------
    groups
        Cells of each group; a group is cut into blocks from its beginning, and its last block may be shorter.
    block_size, per_window
        Cells of a block, and blocks whose cells are shuffled together.
    key
        Source of randomness.
    """

    groups: GroupTable
    block_size: int
    per_window: int
    key: EpochKey
    _blocks_before: np.ndarray = field(init=False)
    _order: Permutation = field(init=False)
    _short_at: np.ndarray = field(init=False)
    _lacking: np.ndarray = field(init=False)
    _kept: dict[int, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        per_group = -(-self.groups.sizes // self.block_size)
        self._blocks_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_group)])
        self._order = Permutation(int(self._blocks_before[-1]), self.key.stream(BLOCKS))
        # Only the last block of a group can be short. Where those came to lie says how many cells the blocks
        # before any place hold, without a list of all blocks.
        lacking = per_group * self.block_size - self.groups.sizes
        short = np.flatnonzero(lacking)
        at = self._order.find(self._blocks_before[short + 1] - 1)
        by_place = np.argsort(at)
        self._short_at = at[by_place]
        self._lacking = np.concatenate([np.zeros(1, np.int64), np.cumsum(lacking[short][by_place])])

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`EpochOrder`."""
        parts = [np.empty(0, np.int64)]
        window = self._window_of(begin)
        while begin < end:
            first, last = self._begins(window), self._begins(window + 1)
            parts.append(self._window(window)[begin - first : end - first])
            begin, window = max(begin, last), window + 1
        return np.concatenate(parts)

    def find(self, cell: int) -> int:
        """Position at which a cell comes."""
        place = self.groups.place_of(cell)
        group = int(np.searchsorted(self.groups.begins + self.groups.sizes, place, "right"))
        block = int(self._blocks_before[group]) + (place - int(self.groups.begins[group])) // self.block_size
        window = int(self._order.find(np.array([block]))[0]) // self.per_window
        return self._begins(window) + int(np.flatnonzero(self._window(window) == cell)[0])

    def _begins(self, window: int) -> int:
        """Position of the first cell of a window."""
        block = min(window * self.per_window, self._order.n)
        return block * self.block_size - int(self._lacking[np.searchsorted(self._short_at, block)])

    def _window_of(self, position: int) -> int:
        low, high = 0, -(-self._order.n // self.per_window)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._begins(middle) <= position else (low, middle)
        return low

    def _window(self, window: int) -> np.ndarray:
        if window not in self._kept:
            blocks = self._order.span(
                window * self.per_window, min((window + 1) * self.per_window, self._order.n)
            )
            group = np.searchsorted(self._blocks_before, blocks, "right") - 1
            within = (blocks - self._blocks_before[group]) * self.block_size
            lengths = np.minimum(self.block_size, self.groups.sizes[group] - within)
            cells = self.groups.cells(ranges(self.groups.begins[group] + within, lengths))
            np.random.default_rng(self.key.stream(WINDOWS, window)).shuffle(cells)
            # Consecutive batches mostly lie in one window, and a batch in two of them at most.
            self._kept = {k: v for k, v in self._kept.items() if k == window - 1} | {window: cells}
        return self._kept[window]


@dataclass(slots=True)
class GroupOrder:
    """Batches of one group each, queued on lanes; what groups hold beyond full batches is pooled.

    Parameters
    ----------
    groups
        Cells of each group.
    batch_size
        Cells of a batch.
    lanes
        Workers of all ranks, which take batches in turns.
    key
        Source of randomness.
    """

    groups: GroupTable
    batch_size: int
    lanes: int
    key: EpochKey
    _pool: Permutation = field(init=False)
    _pool_begins: np.ndarray = field(init=False)
    _batches_before: np.ndarray = field(init=False)
    _queues: LaneQueues = field(init=False)
    _kept: dict[int, Permutation] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        tails = self.groups.sizes % self.batch_size
        self._pool_begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(tails)])
        self._pool = Permutation(int(self._pool_begins[-1]), self.key.stream(POOL))
        # The pool is queued like one more group; its partial batch comes after all the full ones.
        n_batches = np.append(self.groups.sizes, self._pool.n) // self.batch_size
        self._batches_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_batches)])
        ranks = np.random.default_rng(self.key.stream(QUEUES)).permutation(len(n_batches))
        self._queues = LaneQueues.pack(n_batches, self.lanes, queue_ranks=ranks)

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`EpochOrder`."""
        parts = [np.empty(0, np.int64)]
        while begin < end:
            turn, skip = divmod(begin, self.batch_size)
            count = min(end - begin, self.batch_size - skip)
            if turn < self._queues.n_batches:
                parts.append(self._of_batch(self._queues.batch_at(turn), skip, skip + count))
            else:
                left = int(self._batches_before[-1] - self._batches_before[-2]) * self.batch_size
                parts.append(self._pooled(left + skip, left + skip + count))
            begin += count
        return np.concatenate(parts)

    def _of_batch(self, batch: int, first: int, last: int) -> np.ndarray:
        group = int(np.searchsorted(self._batches_before, batch, "right")) - 1
        begin = (batch - int(self._batches_before[group])) * self.batch_size
        if group == len(self.groups.sizes):
            return self._pooled(begin + first, begin + last)
        places = self._within(group).span(begin + first, begin + last)
        return self.groups.cells(places + self.groups.begins[group])

    def _pooled(self, begin: int, end: int) -> np.ndarray:
        """Cells of the pool; its places are the last ones of each group's shuffled order."""
        places = self._pool.span(begin, end)
        owner = np.searchsorted(self._pool_begins, places, "right") - 1
        result = np.empty(len(places), np.int64)
        for group in np.unique(owner).tolist():
            mine = owner == group
            of_group = self.groups.sizes[group] - self._pool_begins[group + 1] + places[mine]
            result[mine] = self._within(group).at(of_group) + self.groups.begins[group]
        return self.groups.cells(result)

    def _within(self, group: int) -> Permutation:
        """The shuffled order of the cells of one group."""
        if group not in self._kept:
            if len(self._kept) >= _KEPT_GROUPS:
                self._kept.clear()
            self._kept[group] = Permutation(int(self.groups.sizes[group]), self.key.stream(CELLS, group))
        return self._kept[group]


_KEPT_GROUPS = 4096


@dataclass(slots=True)
class LengthOrder:
    """Another order, of which so many cells at a time are sorted by descending length.

    The longest cell of all comes first, so that too little memory is noticed at once.

    Parameters
    ----------
    order, n_cells
        The order, and how many cells it has.
    together
        Cells that are sorted together.
    lengths
        Of the cells of the dataset.
    longest
        Position in `order` of the longest cell; called once.
    """

    order: EpochOrder
    n_cells: int
    together: int
    lengths: np.ndarray
    longest: Callable[[], int]
    _swapped: tuple[int, int, int] | None = field(init=False, default=None)
    _kept: dict[int, np.ndarray] = field(init=False, default_factory=dict)

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`EpochOrder`."""
        if begin >= end:
            return np.empty(0, np.int64)
        if self._swapped is None:
            self._swapped = self._find_longest()
        parts = []
        for part in range(begin // self.together, (end - 1) // self.together + 1):
            first = part * self.together
            parts.append(self._sorted(part)[max(begin - first, 0) : end - first])
        cells = np.concatenate(parts)
        place, longest, front = self._swapped
        if begin == 0:
            cells[0] = longest
        if begin <= place < end and place:
            cells[place - begin] = front
        return cells

    def _find_longest(self) -> tuple[int, int, int]:
        """The place of the longest cell among the sorted ones, that cell, and the cell that is in front."""
        at = self.longest()
        cell = int(self.order.cells(at, at + 1)[0])
        part = at // self.together
        place = part * self.together + int(np.flatnonzero(self._sorted(part) == cell)[0])
        return place, cell, int(self._sorted(0)[0])

    def _sorted(self, part: int) -> np.ndarray:
        if part not in self._kept:
            first = part * self.together
            cells = self.order.cells(first, min(first + self.together, self.n_cells))
            # A stable sort: equal lengths stay shuffled.
            cells = cells[np.argsort(-self.lengths[cells].astype(np.int64), kind="stable")]
            self._kept = {k: v for k, v in self._kept.items() if k == part - 1} | {part: cells}
        return self._kept[part]


@dataclass(frozen=True, slots=True)
class SomeRows:
    """Another order, whose cells are positions in a list of row numbers."""

    order: EpochOrder
    rows: np.ndarray

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`EpochOrder`."""
        found: np.ndarray = self.rows[self.order.cells(begin, end)].astype(np.int64)
        return found
