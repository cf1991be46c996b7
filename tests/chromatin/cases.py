"""Fragments to count: batches from lists of intervals, hypothesis strategies, and a dataset in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin._regions import COUNTS, Bins, Peaks, Regions

NAMES = ["chr1", "chr10", None, "chrX"]


def fragments(rows: Sequence[Sequence[tuple[int, int, int]]], dtype: Any = np.uint32) -> SparseBatch:
    """A batch from (chromosome number, start, length) per row."""
    flat = [fragment for row in rows for fragment in row]
    chromosome, start, length = zip(*flat, strict=True) if flat else ((), (), ())
    starts = np.array(start, np.uint32)
    return SparseBatch(
        indices=np.array(chromosome, np.int32),
        values=starts,
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        n_features=len(NAMES),
        layers={"starts": starts, "lengths": np.array(length, dtype)},
    )


def dense(batch: SparseBatch) -> np.ndarray:
    """A batch as a matrix; columns must ascend, each once within a row."""
    out = np.zeros((len(batch), batch.n_features), np.int64)
    for i in range(len(batch)):
        columns = batch.indices[batch.offsets[i] : batch.offsets[i + 1]]
        assert (np.diff(columns) > 0).all()
        out[i, columns] = batch.values[batch.offsets[i] : batch.offsets[i + 1]]
    return out


# Few positions, so that borders, overlaps and repeats are met all the time; and the far end of uint32.
_START = st.one_of(st.integers(0, 40), st.integers(2**32 - 20, 2**32 - 1))
_LENGTH = st.one_of(st.integers(0, 12), st.sampled_from([60, 2**16 - 1]))
_FRAGMENT = st.tuples(st.integers(0, len(NAMES) - 1), _START, _LENGTH)

batches = st.lists(st.lists(_FRAGMENT, max_size=12), max_size=5).map(fragments)

_CHROMOSOME = st.sampled_from(["chrX", "chr1", "chr7", "chr10"])


@st.composite
def bins(draw: st.DrawFn) -> Regions:
    far = draw(st.booleans())
    # A chromosome that reaches beyond 2^32 needs wide bins, or the reference would not fit.
    size = st.integers(2**32 - 30, 2**33) if far else st.integers(1, 60)
    sizes = draw(st.dictionaries(_CHROMOSOME, size, min_size=1).filter(lambda s: set(s) & set(NAMES)))
    width = draw(st.sampled_from([2**28, 2**30 + 7]) if far else st.integers(1, 70))
    return Bins(width, sizes, count=draw(st.sampled_from(COUNTS))).over(NAMES)


@st.composite
def peaks(draw: st.DrawFn) -> Regions:
    start = st.one_of(st.integers(0, 45), st.integers(2**32 - 25, 2**32 + 40))
    width = st.one_of(st.integers(1, 15), st.sampled_from([50, 2**33]))
    found = draw(
        st.lists(
            st.builds(lambda c, s, w: (c, s, s + w), _CHROMOSOME, start, width), max_size=12, unique=True
        )
    )
    if not any(chrom in NAMES for chrom, _, _ in found):
        found.append(("chr1", 3, 9))
    return Peaks(found, count=draw(st.sampled_from(COUNTS))).over(NAMES)


class InMemory:
    """A fragment dataset without files: the part of a CellDataset's interface that loaders use."""

    def __init__(self, rows: Sequence[Sequence[tuple[int, int, int]]]) -> None:
        self._all = fragments(rows)
        self._rows = rows
        n = len(rows)
        self.n_cells, self.n_features = n, len(NAMES)
        self.feature_uids = np.array([f"u{i}" for i in range(len(NAMES))], dtype=object)
        self.groups_np = (np.arange(n) % 2).astype(np.int32)
        self.columns = {"label": np.arange(n, dtype=np.int64) * 3}
        self.categories = {"label": np.arange(3 * n, dtype=object)}
        self.present = np.ones(n, dtype=bool)

    def __len__(self) -> int:
        return self.n_cells

    def row_numbers(self, rows: Any) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        result: np.ndarray = np.where(rows < 0, rows + self.n_cells, rows)
        return result

    def __getitem__(self, rows: Any) -> SparseBatch:
        return self.__getitems__(np.atleast_1d(np.arange(self.n_cells)[rows]))

    def __getitems__(self, rows: Any) -> SparseBatch:
        rows = self.row_numbers(rows)
        batch = fragments([self._rows[i] for i in rows])
        batch.metadata = {name: column[rows] for name, column in self.columns.items()}
        return batch

    def read_rows(self, batches: Any) -> list[SparseBatch]:
        return [self.__getitems__(rows) for rows in batches]

    def rows_nbytes(self, batches: Any) -> list[int]:
        return [10 * len(rows) for rows in batches]
