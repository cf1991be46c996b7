"""`Bins`: how often values occur, per cell of the result, in a table that grows; two of them can be added."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbx_gpu.errors import ResourceError
from hbx_gpu.statistics import _kernels as kernels
from hbx_gpu.statistics._kernels import EXACT_BELOW, KEY_BITS, PAGE_BITS, Table

_CODE_SHIFT = 46
RELATIVE_ERROR = 2.0**-7
"""Largest relative error of the middle of a bin: a bin is at most 1/64 of its lower end wide."""


@dataclass(frozen=True)
class Counted:
    """The contents of bins, sorted by cell and then by value.

    Attributes
    ----------
    cell
        int64, (n,). Cell of the result.
    code
        int32, (n,). Code of the value.
    count
        int64, (n,). How often it occurs.
    """

    cell: np.ndarray
    code: np.ndarray
    count: np.ndarray

    def of_cells(self, numbers: np.ndarray) -> Counted:
        """The same with cell c renamed ``numbers[c]``, and counts of cells that became one added."""
        return counted(numbers[self.cell], self.code, self.count)


def counted(cell: np.ndarray, code: np.ndarray, count: np.ndarray) -> Counted:
    """Sort what was counted, and add the counts of what occurs more than once."""
    order = np.lexsort((code, cell))
    cell, code, count = cell[order], code[order], count[order]
    new = np.ones(len(cell), bool)
    new[1:] = (np.diff(cell) != 0) | (np.diff(code) != 0)
    first = np.flatnonzero(new)
    sums = np.add.reduceat(count, first) if len(first) else count
    return Counted(cell[first], code[first], sums.astype(np.int64))


def edges(code: np.ndarray, *, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """float64. Lower end and upper end of bins; they are equal where a bin holds one value.

    Parameters
    ----------
    code
        Codes of the bins.
    whole
        Whether these are bins of whole numbers, of which small ones have a bin of their own.
    """
    low = (code.astype(np.int64) << _CODE_SHIFT).view(np.float64)
    high = ((code.astype(np.int64) + 1) << _CODE_SHIFT).view(np.float64)
    if not whole:
        return low, high
    single = code < EXACT_BELOW
    return np.where(single, code, low), np.where(single, code, high - 1.0)


class Bins:
    """A table of pages; see :class:`~hbx_gpu.statistics._kernels.Table`.

    Attributes
    ----------
    table
        What kernels work on.
    """

    def __init__(self) -> None:
        self.table = _empty(1 << 10)

    def make_room(self, n: int) -> None:
        """Let at least `n` new pages fit."""
        used = int(self.table.used[0])
        if used + n > len(self.table.keys):
            self._resize(max(used + n, used + used // 2))

    def _resize(self, capacity: int) -> None:
        old, used = self.table, int(self.table.used[0])
        new = _empty(capacity)
        new.keys[:used], new.counts[:used], new.used[0] = old.keys[:used], old.counts[:used], used
        kernels.fill_slots(new)
        self.table = new

    def add(self, other: Bins) -> None:
        """Add the counts of another table.

        Raises
        ------
        ResourceError
            A counter would pass 2**32 - 1.
        """
        theirs = int(other.table.used[0])
        self.make_room(theirs)
        if not kernels.add_table(self.table, other.table.keys[:theirs], other.table.counts[:theirs]):
            raise ResourceError(
                "more than 4,294,967,295 cells have the same value of one feature; compute the statistics of "
                "parts of these cells"
            )

    def counted(self) -> Counted:
        """The counts that are not 0, which are sorted because pages and codes are."""
        used = int(self.table.used[0])
        order = np.argsort(self.table.keys[:used])
        keys, counts = self.table.keys[order], self.table.counts[order]
        page, low = np.nonzero(counts)
        key = keys[page]
        code = ((key & ((1 << KEY_BITS) - 1)) << PAGE_BITS | low).astype(np.int32)
        return Counted(key >> KEY_BITS, code, counts[page, low].astype(np.int64))

    def __getstate__(self) -> dict[str, np.ndarray]:
        used = int(self.table.used[0])
        return {"keys": self.table.keys[:used], "counts": self.table.counts[:used]}

    def __setstate__(self, state: dict[str, np.ndarray]) -> None:
        used = len(state["keys"])
        self.table = _empty(max(used, 1))
        self.table.keys[:used], self.table.counts[:used] = state["keys"], state["counts"]
        self.table.used[0] = used
        kernels.fill_slots(self.table)


def _empty(capacity: int) -> Table:
    slots = 1 << (2 * capacity - 1).bit_length()
    return Table(
        np.full(slots, -1, np.int64),
        np.zeros(slots, np.int32),
        np.zeros(capacity, np.int64),
        np.zeros((capacity, 1 << PAGE_BITS), np.uint32),
        np.zeros(1, np.int64),
    )


def binned_medians(bins: Counted, n_cells: int) -> np.ndarray:
    """float64, (n_cells,). Median of each cell from counts of values that need not be whole numbers.

    Every value counts as the middle of its bin; see `RELATIVE_ERROR`. NaN where a cell has no values.
    """
    result = np.full(n_cells, np.nan)
    if not len(bins.cell):
        return result
    before = np.concatenate([[0], np.cumsum(bins.count)])
    first = np.flatnonzero(np.diff(bins.cell, prepend=-1))
    last = np.append(first[1:], len(bins.cell))
    n = before[last] - before[first]
    low, high = edges(bins.code, whole=False)
    middle = (low + high) / 2

    def ranked(rank: np.ndarray) -> np.ndarray:
        """The value of a rank, counted from 0 within each cell."""
        found: np.ndarray = middle[np.searchsorted(before, before[first] + rank, side="right") - 1]
        return found

    result[bins.cell[first]] = (ranked((n - 1) // 2) + ranked(n // 2)) / 2
    return result
