"""Rows in the order in which they are stored, cut into tasks, and the groups that they belong to."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.dense import DenseCellDataset
from hbx_gpu._source import BoxIndex
from hbx_gpu.batch import DenseBatch, RaggedBatch, SparseBatch
from hbx_gpu.errors import UnknownNameError, UnsupportedError
from hbx_gpu.statistics._partial import Partial

Matrix = CellDataset | DenseCellDataset

_WINDOW = 1 << 20  # values that are read together
_BLOCK = 1 << 20  # rows that are looked at together
_DECODED = 64 << 20  # bytes of decoded chunks, of which consecutive windows share a few
_MOST_GROUPS = 10_000


@dataclass(frozen=True)
class Groups:
    """Groups of rows by the values of an obs column.

    Attributes
    ----------
    names
        Values of the column that occur, as text, sorted as the column sorts them.
    code
        int32, (n_rows,). Position in `names`; ``len(names)`` where the value is missing. None: all rows are
        one group.
    """

    names: tuple[str, ...] = ()
    code: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of groups, that of missing values included."""
        return 1 if self.code is None else len(self.names) + 1

    def of(self, rows: np.ndarray) -> np.ndarray:
        """int32. Group of each of some rows."""
        return np.zeros(len(rows), np.int32) if self.code is None else self.code[rows]

    @classmethod
    def by(cls, dataset: Matrix, column: str | None) -> Groups:
        """Group the rows of a dataset.

        Raises
        ------
        UnknownNameError
            The dataset does not carry the column.
        UnsupportedError
            The column has more values than anyone means to group by.
        """
        if column is None:
            return cls()
        if column not in dataset.columns:
            raise UnknownNameError(
                f"the dataset carries no obs column {column!r}; it carries {sorted(dataset.columns)}. Name "
                "the column in metadata_columns of to_cell_dataset"
            )
        values = dataset.columns[column]
        if values.ndim != 1:
            raise UnsupportedError(f"obs column {column!r} holds vectors; group by a column of plain values")
        if column in dataset.categories:
            present = np.unique(values)
            present = present[present >= 0]
            names = [str(name) for name in dataset.categories[column][present]]
        else:
            present = np.unique(values)
            if values.dtype.kind == "f":
                present = present[~np.isnan(present)]
            elif values.dtype.kind == "i":
                present = present[present != np.iinfo(values.dtype).min]
            names = [str(value) for value in present.tolist()]
        if len(names) > _MOST_GROUPS:
            raise UnsupportedError(
                f"obs column {column!r} has {len(names):,} different values, and statistics are made for at "
                f"most {_MOST_GROUPS:,} groups; group by a column of categories"
            )
        code = np.searchsorted(present, values).astype(np.int32)
        code[~np.isin(values, present)] = len(names)
        return cls(tuple(names), code)


class Tasks:
    """The rows of a dataset in storage order, cut into tasks of about equally many values.

    Parameters
    ----------
    dataset
        Cells of one sparse or dense matrix.
    """

    def __init__(self, dataset: Matrix) -> None:
        self._dataset = dataset
        self._rows = dataset.row_index
        self._dense = isinstance(self._rows, BoxIndex)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def _order(self) -> np.ndarray | None:
        """int64. Row numbers in storage order; None where rows are numbered in that order."""
        for begin in range(0, len(self) - 1, _BLOCK):
            source, start = self._places(np.arange(begin, min(begin + _BLOCK + 1, len(self))))
            source = np.diff(source)
            if ((source < 0) | ((source == 0) & (np.diff(start) < 0))).any():
                source, start = self._places(np.arange(len(self)))
                order: np.ndarray = np.lexsort((start, source))
                return order
        return None

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and first element or position of some rows."""
        if isinstance(self._rows, BoxIndex):
            boxes = self._rows.at(rows)
            return boxes.source, boxes.lower[:, 0]
        places = self._rows.at(rows)
        return places.source, places.start

    def rows(self, first: int, last: int) -> np.ndarray:
        """int64. Row numbers at these places of the storage order."""
        return np.arange(first, last) if self._order is None else self._order[first:last]

    def _values(self, rows: np.ndarray) -> np.ndarray:
        """int64. Stored values of each row, and one for the row itself."""
        if not isinstance(self._rows, BoxIndex):
            lengths: np.ndarray = self._rows.at(rows).length.astype(np.int64) + 1
            return lengths
        return np.full(len(rows), self._dataset.n_features + 1, np.int64)

    @cached_property
    def n_values(self) -> int:
        """Stored values of all rows, and one for each row."""
        n = len(self)
        return sum(int(self._values(np.arange(i, min(i + _BLOCK, n))).sum()) for i in range(0, n, _BLOCK))

    def cuts(self, first: int, last: int, size: int) -> list[int]:
        """Places at which rows are cut so that parts hold about `size` values, the ends included."""
        cuts, before = [first], 0
        for begin in range(first, last, _BLOCK):
            ends = before + np.cumsum(self._values(self.rows(begin, min(begin + _BLOCK, last))))
            full = np.flatnonzero(np.diff(ends // size, prepend=before // size))
            cuts += (begin + 1 + full).tolist()
            before = int(ends[-1])
        return cuts if cuts[-1] == last else [*cuts, last]

    def windows(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Row numbers that are read together, window after window."""
        cuts = self.cuts(first, last, _WINDOW)
        for begin, end in itertools.pairwise(cuts):
            yield self.rows(begin, end)


@dataclass(frozen=True)
class Task:
    """Some rows of a dataset, for a worker anywhere.

    Attributes
    ----------
    dataset
        Pickled dataset: paths, and how to find its rows again.
    by
        obs column that rows are grouped by.
    first, last
        Places in storage order.
    target, exact
        See :class:`~hbx_gpu.statistics._partial.Partial`.
    """

    dataset: bytes
    by: str | None
    first: int
    last: int
    target: float
    exact: bool

    def __call__(self) -> Partial:
        """Read the rows."""
        return run(*_opened(self.dataset, self.by), self)


@lru_cache(maxsize=1)
def _opened(dataset: bytes, by: str | None) -> tuple[Matrix, Tasks, Groups]:
    """A dataset in a worker process, which keeps it for its next task."""
    found: Matrix = pickle.loads(dataset)
    return prepared(found), Tasks(found), Groups.by(found, by)


def prepared(dataset: Matrix) -> Matrix:
    """A dataset that is read once, from its beginning to its end."""
    return dataset.without_metadata().with_decoded_cache(_DECODED)


def run(dataset: Matrix, tasks: Tasks, groups: Groups, task: Task) -> Partial:
    """The statistics of some rows."""
    partial = Partial(dataset.n_features, groups.n, task.target, exact=task.exact)
    for rows in tasks.windows(task.first, task.last):
        partial.add(*_csr(dataset.read_batches([rows])[0]), groups.of(rows))
    return partial


def _csr(batch: SparseBatch | DenseBatch | RaggedBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert not isinstance(batch, RaggedBatch)  # checked before
    if isinstance(batch, SparseBatch):
        return batch.indices, batch.values, batch.offsets
    row, column = np.nonzero(batch.data)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(batch.data)))])
    return column.astype(np.int32), batch.data[row, column], offsets


def measured(dataset: Matrix, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Cells of each group, and how many of them measure each feature; nothing is read.

    Returns
    -------
    n_cells, measured
        int64, (n_groups,) and (n_features, n_groups).
    """
    n_sources, n = len(dataset.sources), len(dataset)
    cells = np.zeros((n_sources + 1) * groups.n, np.int64)
    for begin in range(0, n, _BLOCK):
        rows = np.arange(begin, min(begin + _BLOCK, n))
        source = dataset.groups_of(rows).astype(np.int64)
        source[source < 0] = n_sources
        cells += np.bincount(source * groups.n + groups.of(rows), minlength=len(cells))
    cells = cells.reshape(n_sources + 1, groups.n)[:-1]
    # Sources that share a layout share the remap.
    by_remap: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for i, stored in enumerate(dataset.sources):
        before = by_remap.get(id(stored.remap), (stored.remap, np.zeros(groups.n, np.int64)))[1]
        by_remap[id(stored.remap)] = stored.remap, before + cells[i]
    found = np.zeros((dataset.n_features, groups.n), np.int64)
    for remap, total in by_remap.values():
        has = np.zeros(dataset.n_features, bool)
        has[remap[remap >= 0]] = True
        found[has] += total
    return cells.sum(axis=0), found
