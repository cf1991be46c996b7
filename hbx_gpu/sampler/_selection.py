"""Which cell is the k-th one of a label, from a table of counts instead of a sorted list of all cells.

The codes of the cells are cut into blocks, and for each label the table says how many of its cells come
before each block. Finding a cell is a binary search in the table and a look through one block.
:func:`~hbx_gpu.sampler._selection_numba.select` does it; ``numpy.flatnonzero(codes == code)[k]`` says what is
right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

_ENTRIES = 1 << 22
"""Of the table, at most: 32 MiB, whatever the number of cells."""
_LEAST_BLOCK = 512
_MOST_LABELS = 1 << 16
"""Codes are used as they are up to this one; larger ones are numbered anew first."""


@dataclass(frozen=True, slots=True)
class LabelTable:
    """The cells of each label; memory grows with the labels, not with the cells.

    Attributes
    ----------
    codes
        Integer (n_cells,). Code of each cell: the caller's array, unless its codes are too large to count.
    labels
        int64 (n_labels,). Codes that occur in `codes`, ascending, without -1.
    given
        int64 (n_labels,). The same labels as the caller numbers them.
    before
        int64 (n_labels, n_blocks + 1). Cells of each label before each block.
    block
        Cells of a block.
    """

    codes: np.ndarray
    labels: np.ndarray
    given: np.ndarray
    before: np.ndarray
    block: int

    @classmethod
    def of(cls, codes: np.ndarray) -> Self:
        """The table of codes, each -1 (missing) or above."""
        from hbx_gpu.sampler._selection_numba import count

        given = None
        if codes.max(initial=-1) >= max(_MOST_LABELS, 4 * len(codes)):
            given, codes = np.unique(codes, return_inverse=True)
            if given[0] < 0:
                given, codes = given[1:], codes - 1
        n_codes = int(codes.max(initial=-1)) + 1
        # A block is long where there are many labels, so that the table stays small.
        block = max(_LEAST_BLOCK, -(-len(codes) * max(n_codes, 1) // _ENTRIES))
        counts = count(codes, n_codes, block)
        labels = np.flatnonzero(counts.any(axis=1))
        before = np.zeros((len(labels), counts.shape[1] + 1), np.int64)
        np.cumsum(counts[labels], axis=1, out=before[:, 1:])
        return cls(codes, labels, labels if given is None else given, before, block)

    @property
    def counts(self) -> np.ndarray:
        """int64 (n_labels,). Cells of each label."""
        result: np.ndarray = self.before[:, -1]
        return result

    def cells(self, label: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Cells by label and number.

        Parameters
        ----------
        label
            int64 (n,). Positions in `labels`.
        which
            int64 (n,). Number of each cell among those of its label, from 0.

        Returns
        -------
        numpy.ndarray
            int64 (n,).
        """
        from hbx_gpu.sampler._selection_numba import select

        result: np.ndarray = select(self.codes, self.labels, self.before, self.block, label, which)
        return result
