"""The base class of all datasets: it checks row numbers, reads batches and makes variants of a dataset."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Generic, Self, TypeVar

import numpy as np

from hbx_gpu._protocols import AnyCollate, AnyFeed, AnyLoadable, Rows, Widths
from hbx_gpu.batch import teach_torch

BatchT = TypeVar("BatchT")


class Dataset(ABC, Generic[BatchT]):
    """Map-style dataset: rows by number, several at a time. A :class:`~hbx_gpu._protocols.Loadable`.

    Attributes
    ----------
    n_cells
        Number of rows.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def n_features(self) -> Widths:
        """Width of dense matrices of the rows."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, np.ndarray]:
        """Metadata of all rows: numbers as stored, codes where `categories` has the name."""

    @abstractmethod
    def read_rows(self, selections: Sequence[np.ndarray]) -> list[BatchT]:
        """Read several batches under one plan; the row numbers come from `checked`."""

    @abstractmethod
    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Return the bytes of each of several batches, without metadata; row numbers come from `checked`."""

    @abstractmethod
    def with_row_numbers(self) -> Self:
        """This dataset with row numbers as metadata column ``index`` of its batches.

        Raises
        ------
        ValueError
            A metadata column has a name that means something else in a batch.
        """

    @property
    def n_cells(self) -> int:
        return len(self)

    def __getitem__(self, rows: int | np.integer | slice | Rows) -> BatchT:
        """A batch of the rows asked for; one row number gives a batch of one row."""
        if isinstance(rows, slice):
            return self.__getitems__(np.arange(len(self))[rows])
        # One number in any form: an int, a NumPy integer, an array or tensor without axes.
        if isinstance(rows, int | np.integer) or np.ndim(rows) == 0:
            teach_torch()
            return self.marked(self.__getitems__(np.atleast_1d(np.asarray(rows))))
        return self.__getitems__(rows)

    def marked(self, batch: BatchT) -> BatchT:
        """Note in a batch of one row what tells whether rows of other datasets go with it."""
        return batch

    def __getitems__(self, rows: Rows) -> BatchT:
        """Read one batch of `rows`, in the order given; negative and repeated numbers are allowed.

        Raises
        ------
        IndexError
            A row number is outside ``[-n_cells, n_cells)``.
        CorruptChunkError
            A chunk that holds one of the rows cannot be decoded.
        """
        return self.read_batches([rows])[0]

    def read_batches(self, batches: Sequence[Rows]) -> list[BatchT]:
        """Read several batches under one plan: a chunk that many of them need is read and decoded once.

        Parameters
        ----------
        batches
            Row numbers of each batch.

        Returns
        -------
        list
            The batches; their arrays are views of one allocation.
        """
        return self.read_rows(self.checked(batches))

    def batch_nbytes(self, rows: Rows) -> int:
        """Return the bytes of one batch of `rows`, without metadata."""
        return self.rows_nbytes(self.checked([rows]))[0]

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """Check the row numbers of several batches together; return them as int64 in ``[0, n_cells)``.

        Raises
        ------
        IndexError
            A row number is out of range.
        """
        if not all(isinstance(rows, np.ndarray) and rows.dtype == np.int64 for rows in batches):
            return [self.row_numbers(rows) for rows in batches]
        if len(batches) == 1:
            return [self.row_numbers(batches[0])]
        whole = self.row_numbers(np.concatenate([*batches, np.empty(0, np.int64)]))
        ends = accumulate(map(len, batches), initial=0)
        return [whole[first:last] for first, last in pairwise(ends)]

    def row_numbers(self, rows: Rows) -> np.ndarray:
        """Row numbers as int64 in ``[0, n_cells)``."""
        try:
            rows, shape = np.asarray(rows), ""
        except ValueError:  # rows of rows, of different lengths
            rows, shape = np.empty((0, 0)), "lists of different lengths"
        if rows.ndim != 1:
            shape = shape or f"shape {rows.shape}"
            raise IndexError(
                f"row numbers must be one-dimensional, got {shape}; a sampler that yields whole batches is "
                "given to a torch DataLoader as batch_sampler="
            )
        if rows.size == 0:
            return np.empty(0, np.int64)
        n = len(self)
        if rows.dtype == bool:
            if len(rows) != n:
                raise IndexError(f"a boolean mask needs {n} entries, got {len(rows)}")
            return np.flatnonzero(rows)
        if rows.dtype.kind not in "iu":
            raise IndexError(f"row numbers must be integers, got {rows.dtype}")
        rows = rows.astype(np.int64, copy=False)
        if rows.view(np.uint64).max() < n:  # negative numbers are huge ones then
            return rows
        low, high = rows.min(), rows.max()
        if low < -n or high >= n:
            bad = low if low < -n else high
            raise IndexError(f"row {bad} is out of range for a dataset of {n} cells")
        return np.where(rows < 0, rows + n, rows)

    def with_wide_columns(self) -> Self:
        """Return this dataset with sparse batches that become CSR tensors without a copy."""
        return self

    def collate_with(self, collate: AnyCollate) -> AnyCollate:
        """Adapt a collate for batches of cells to this dataset's batches; `make_loader` calls this."""
        return collate

    def feed_with(self, make: Callable[[AnyLoadable], AnyFeed]) -> AnyFeed:
        """Make a feed of this dataset on a device.

        `make` makes a feed of a dataset of cells; `make_loader` calls this method with it.
        """
        return make(self)

    def _derived(self, **changes: object) -> Self:
        """This dataset with other values of some attributes; everything else is shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **changes)
        return other


def digest_of_axes(
    feature_uids: np.ndarray,
    layers: Sequence[str],
    categories: Mapping[str, np.ndarray],
    shape: tuple[int, ...] | None = None,
) -> str:
    """Return a digest of what the columns and codes of batches mean."""
    state = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    texts = {"features": feature_uids, "layers": np.array(layers), **dict(sorted(categories.items()))}
    for name, words in texts.items():
        state.update("\0".join([name, str(len(words)), *map(str, words)]).encode() + b"\0\0")
    return state.hexdigest()
