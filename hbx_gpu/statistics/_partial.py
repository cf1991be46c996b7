"""`Partial`: the statistics of some rows, to which more rows and other partial results can be added."""

from __future__ import annotations

import numpy as np

from hbx_gpu.statistics import _kernels as kernels
from hbx_gpu.statistics._bins import Bins
from hbx_gpu.statistics._kernels import Listed, Sums

_CARRY = 32  # bits of the lower half of a sum of squares


class Partial:
    """Sums and counts over some rows; picklable.

    Whole numbers are counted and summed in integers, so that any way of cutting rows into parts gives the
    same result, bit for bit. Other numbers are summed as means and squared deviations, which are stable and
    may differ in the last bits.

    Parameters
    ----------
    n_features, n_groups
        Shape of the result, whose cells are numbered ``feature * n_groups + group``.
    target
        See :func:`~hbx_gpu.statistics._kernels.add_columns`.
    exact
        Keep every value that medians are made of, rather than counts of bins.
    """

    def __init__(self, n_features: int, n_groups: int, target: float, *, exact: bool) -> None:
        self.n_features, self.n_groups, self.target, self.exact = n_features, n_groups, target, exact
        n = n_features * n_groups
        # Memory that nothing is added to is never touched.
        self.sums = Sums(
            *(np.zeros(n, np.float64 if name in ("mean", "m2") else np.int64) for name in Sums._fields)
        )
        self.whole, self.ratios = Bins(), Bins()
        self.listed: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, indices: np.ndarray, values: np.ndarray, offsets: np.ndarray, group: np.ndarray) -> None:
        """Add rows.

        Parameters
        ----------
        indices, values, offsets
            CSR, columns below `n_features`; they may repeat within a row, which means their sum.
        group
            int32, (n_rows,). Group of each row.
        """
        if values.dtype == np.float16:  # numba does not compute with it
            values = values.astype(np.float32)
        begin, row, value, totals = kernels.by_column(indices, values, offsets, self.n_features)
        room = len(value) if self.exact else 0
        listed = Listed(np.empty(room, np.int64), np.empty(room, np.float64), np.zeros(1, np.int64))
        at = 0
        while at < self.n_features:
            at = kernels.add_columns(
                at, begin, row, value, totals, group, self.n_groups, self.target,
                self.sums, self.whole.table, self.ratios.table, listed,
            )  # fmt: skip
            if at < self.n_features:
                n = int(begin[at + 1] - begin[at])
                self.whole.make_room(n)
                if not self.exact:
                    self.ratios.make_room(n)
        if used := int(listed.used[0]):
            self.listed.append((listed.cell[:used].copy(), listed.value[:used].copy()))

    def merge(self, other: Partial) -> None:
        """Add the result of other rows."""
        mine, theirs = self.sums, other.sums
        for name in ("nonzero", "total", "square_high", "square_low", "odd"):
            into: np.ndarray = getattr(mine, name)
            into += getattr(theirs, name)
        mine.square_high[:] += mine.square_low >> _CARRY
        mine.square_low[:] &= (1 << _CARRY) - 1
        kernels.merge_floats(mine.n, mine.mean, mine.m2, theirs.n, theirs.mean, theirs.m2)
        self.whole.add(other.whole)
        self.ratios.add(other.ratios)
        self.listed += other.listed
