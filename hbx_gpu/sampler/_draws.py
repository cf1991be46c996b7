"""Independent draws of cells, each a function of (seed, epoch, position) alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from hbx_gpu._draws import philox, unit
from hbx_gpu.sampler._orders import EpochOrder, HeldOrder
from hbx_gpu.sampler._position import DRAWS, EpochKey, digest
from hbx_gpu.sampler._race import RaceOrder
from hbx_gpu.sampler._selection import LabelTable

_BLOCK = 512  # cells whose weights are summed up before drawing
_AT_ONCE = _BLOCK << 12
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class Draws(Protocol):
    """A distribution over cells."""

    @property
    def n_drawable(self) -> int:
        """Cells that can be drawn."""

    def cells(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cells that follow from two uniform numbers each, float64 (n,) in [0, 1): int64 (n,)."""

    def once(self, n: int, key: EpochKey) -> EpochOrder:
        """The first `n` of successive draws in which no cell comes twice."""

    def digest(self) -> str:
        """A short name for the distribution, for comparing states."""


@dataclass(frozen=True, slots=True)
class CellWeights:
    """Draws in proportion to a weight for each cell.

    Attributes
    ----------
    weights
        float (n_cells,), not negative. An array of the caller's.
    before
        float64 (n_blocks + 1,). Sum of the weights before each block of cells.
    n_drawable
        Cells of positive weight.
    """

    weights: np.ndarray
    before: np.ndarray
    n_drawable: int

    @classmethod
    def of(cls, weights: np.ndarray) -> Self:
        """The distribution of weights that were checked."""
        n_drawable, sums = 0, [np.zeros(1)]
        for begin in range(0, len(weights), _AT_ONCE):
            part = weights[begin : begin + _AT_ONCE]
            n_drawable += int(np.count_nonzero(part))
            sums.append(np.add.reduceat(part, np.arange(0, len(part), _BLOCK), dtype=np.float64))
        return cls(weights, np.cumsum(np.concatenate(sums)), n_drawable)

    def cells(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:  # noqa: ARG002 - one is enough
        """See :class:`Draws`."""
        from hbx_gpu.sampler._selection_numba import weigh

        result: np.ndarray = weigh(self.weights, self.before, _BLOCK, first * self.before[-1])
        return result

    def once(self, n: int, key: EpochKey) -> HeldOrder:
        """See :class:`Draws`; memory and time grow with the number of cells."""
        # Exponential races: the n smallest arrival times, in their order, are n successive draws.
        cells = np.flatnonzero(self.weights)
        arrival = key.rng().standard_exponential(len(cells)) / self.weights[cells].astype(np.float64)
        first = np.argpartition(arrival, n - 1)[:n] if n < len(arrival) else np.arange(n)
        return HeldOrder(cells[first[np.argsort(arrival[first])]])

    def digest(self) -> str:
        """See :class:`Draws`."""
        return digest(self.weights)


@dataclass(frozen=True, slots=True)
class LabelDraws:
    """Draws of a label in proportion to its weight, and of a cell of it, each equally likely.

    Attributes
    ----------
    table
        Cells of each label.
    weights
        float64 (n_labels,). Weight of each label of the table.
    keep, other
        Alias table of the weights, float64 and int64 (n_labels,); see :func:`alias_table`.
    """

    table: LabelTable
    weights: np.ndarray
    keep: np.ndarray
    other: np.ndarray

    @classmethod
    def of(cls, table: LabelTable, weights: np.ndarray) -> Self:
        """The distribution of labels with weights, at least one of which is positive if there are labels."""
        return cls(table, weights, *alias_table(weights))

    @property
    def n_drawable(self) -> int:
        """See :class:`Draws`."""
        return int(self.table.counts[self.weights > 0].sum())

    def cells(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """See :class:`Draws`."""
        scaled = first * len(self.weights)
        label = scaled.astype(np.int64)
        label = np.where(scaled - label < self.keep[label], label, self.other[label])
        return self.table.cells(label, (second * self.table.counts[label]).astype(np.int64))

    def once(self, n: int, key: EpochKey) -> RaceOrder:  # noqa: ARG002 - any stretch is computed alone
        """See :class:`Draws`."""
        return RaceOrder(self.table, self.weights, key)

    def digest(self) -> str:
        """See :class:`Draws`."""
        return digest(self.table.codes, self.weights)


def alias_table(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker's alias table, built as Vose does: one draw costs the same however many entries there are.

    Returns
    -------
    keep
        float64 (n,). Chance that entry i stays when it was chosen uniformly.
    other
        int64 (n,). The entry taken otherwise.
    """
    n = len(weights)
    keep, other = np.ones(n), np.arange(n)
    if n == 0:
        return keep, other
    share = weights * (n / weights.sum())
    small, large = np.flatnonzero(share < 1).tolist(), np.flatnonzero(share >= 1).tolist()
    while small and large:
        poor, rich = small.pop(), large[-1]
        keep[poor], other[poor] = share[poor], rich
        share[rich] -= 1 - share[poor]
        if share[rich] < 1:
            small.append(large.pop())
    # What is left differs from 1 by rounding only, unless its weight is 0.
    for poor in small:
        if weights[poor] == 0:
            keep[poor], other[poor] = 0.0, int(weights.argmax())
    return keep, other


def uniform_pairs(begin: int, end: int, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two uniform numbers, float64 in [0, 1), for each of the positions ``[begin, end)``, in plain NumPy."""
    positions = np.arange(begin, end).astype(np.uint64)
    zeros = np.zeros_like(positions)
    words = philox(np.stack([positions & _LOW, positions >> _HALF, zeros, zeros]), key)
    return unit(words[0], words[1]), unit(words[2], words[3])


@dataclass(frozen=True, slots=True)
class DrawnOrder:
    """Draws at each position of an epoch."""

    draws: Draws
    key: EpochKey

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`~hbx_gpu.sampler._orders.EpochOrder`."""
        if begin >= end:
            return np.empty(0, np.int64)
        from hbx_gpu.sampler._draws_numba import pairs

        low, high = self.key.stream(DRAWS).generate_state(2).tolist()
        return self.draws.cells(*pairs(begin, end, low, high))
