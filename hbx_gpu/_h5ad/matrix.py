"""Any stored matrix as a stream of row blocks of bounded size: CSR, CSC or dense, memory or HDF5."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import scipy.sparse

from hbx_gpu.errors import InvalidDataError

# Stored values per block (sparse) or elements per block (dense).
BLOCK_VALUES = 1 << 21
# A compressed HDF5 chunk is decoded in one piece, so a block should not be much smaller than a chunk.
_MAX_BLOCK_VALUES = 1 << 24
# Nonzeros that are transposed in memory at once.
_BUCKET_VALUES = 1 << 22
_MAX_BUCKETS = 4096


@dataclass(frozen=True, slots=True)
class CsrBlock:
    """Consecutive rows of a matrix.

    Attributes
    ----------
    first_row
        Number of the first row in the matrix.
    indptr
        int64, (n_rows + 1,), from 0.
    indices
        (nnz,) integer column numbers in stored order, checked to be inside the matrix.
    values
        (nnz,), dtype of the source.
    """

    first_row: int
    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    @property
    def last_row(self) -> int:
        """Number of the row after the last one."""
        return self.first_row + len(self.indptr) - 1

    def place(self, at: int) -> tuple[int, int]:
        """Row and column of the `at`-th value."""
        row = self.first_row + int(np.searchsorted(self.indptr, at, side="right")) - 1
        return row, int(self.indices[at])

    def rows(self, first: int, last: int) -> CsrBlock:
        """Those of the rows [first, last) of the matrix, which must lie in this block."""
        indptr = self.indptr[first - self.first_row : last - self.first_row + 1]
        part = slice(int(indptr[0]), int(indptr[-1]))
        return CsrBlock(first, indptr - indptr[0], self.indices[part], self.values[part])


@dataclass(frozen=True, slots=True)
class DenseBlock:
    """Consecutive rows of a matrix in full.

    Attributes
    ----------
    first_row
        Number of the first row in the matrix.
    values
        (n_rows, n_columns), dtype of the source.
    """

    first_row: int
    values: np.ndarray

    def place(self, at: int) -> tuple[int, int]:
        """Row and column of the `at`-th value."""
        row, column = divmod(at, self.values.shape[1])
        return self.first_row + row, column

    @property
    def last_row(self) -> int:
        """Number of the row after the last one."""
        return self.first_row + len(self.values)

    def rows(self, first: int, last: int) -> DenseBlock:
        """Those of the rows [first, last) of the matrix, which must lie in this block."""
        return DenseBlock(first, self.values[first - self.first_row : last - self.first_row])


_B = TypeVar("_B", CsrBlock, DenseBlock)
Block = CsrBlock | DenseBlock


class Sliceable(Protocol):
    """An array, in memory or on disk, that is read by stretches of its first axis."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


def two_axes(shape: object) -> tuple[int, int] | None:
    """Return the shape of a matrix that attributes of a store give; None for anything else."""
    found = np.asarray(shape)
    if found.shape != (2,) or found.dtype.kind not in "iu":
        return None
    return int(found[0]), int(found[1])


class Matrix(Protocol):
    """A matrix that can be read row block by row block.

    Attributes
    ----------
    name
        File and place in it, used in error messages.
    shape
        (n_rows, n_columns).
    dtype
        Dtype of the stored values.
    """

    name: str
    shape: tuple[int, int]
    dtype: np.dtype

    @property
    def values(self) -> Sliceable:
        """Stored values, or some of them, for a look at what kind they are."""
        ...

    def blocks(self, scratch: Path) -> Iterator[CsrBlock]:
        """All rows in order; `scratch` is an existing folder for temporary files."""
        ...


@dataclass
class CsrMatrix:
    """Compressed rows: three sliceable 1-D arrays (h5py datasets or NumPy arrays).

    Raises
    ------
    InvalidDataError
        On construction: lengths or `indptr` contradict the shape. In `blocks`: column numbers out of range.
    """

    name: str
    shape: tuple[int, int]
    indptr: Sliceable
    indices: Sliceable
    values: Sliceable

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.values.dtype)
        self._indptr = _checked_indptr(self, self.shape[0], "row")

    def blocks(self, scratch: Path) -> Iterator[CsrBlock]:
        """All rows in order; needs no temporary files."""
        del scratch
        size = _block_size(self.values)
        for first, last in row_runs(self._indptr, size):
            begin, end = int(self._indptr[first]), int(self._indptr[last])
            indices = _read(self, self.indices, begin, end)
            _check_range(self, indices, self.shape[1], begin, self._row_of, "column")
            yield CsrBlock(
                first, self._indptr[first : last + 1] - begin, indices, _read(self, self.values, begin, end)
            )

    def _row_of(self, element: int) -> str:
        return f"row {int(np.searchsorted(self._indptr, element, side='right')) - 1}"


@dataclass
class CscMatrix:
    """Compressed columns, transposed through files: one bucket of rows after the other fits in memory.

    Columns come in ascending order inside a row. Raises as :class:`CsrMatrix`.
    """

    name: str
    shape: tuple[int, int]
    indptr: Sliceable
    indices: Sliceable
    values: Sliceable

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.values.dtype)
        self._indptr = _checked_indptr(self, self.shape[1], "column")

    def blocks(self, scratch: Path) -> Iterator[CsrBlock]:
        """All rows in order; writes about 8 bytes + one value per nonzero below `scratch`."""
        per_row = self._count_rows()
        row_indptr = np.concatenate([[0], np.cumsum(per_row)])
        bucket_size = max(_BUCKET_VALUES, int(row_indptr[-1]) // _MAX_BUCKETS)
        runs = list(row_runs(row_indptr, bucket_size))
        files = [scratch / f"bucket{i}" for i in range(len(runs))]
        record = np.dtype([("row", "<u4"), ("column", "<u4"), ("value", self.dtype)])
        self._scatter(runs, files, record)
        for (first, last), file in zip(runs, files, strict=True):
            items = np.fromfile(file, record) if file.exists() else np.empty(0, record)
            file.unlink(missing_ok=True)
            # Stable: columns were appended in ascending order and stay so within a row.
            items = items[np.argsort(items["row"], kind="stable")]
            begin = row_indptr[first]
            columns, values = items["column"].copy(), items["value"].copy()
            del items
            yield CsrBlock(first, row_indptr[first : last + 1] - begin, columns, values)

    def _count_rows(self) -> np.ndarray:
        per_row = np.zeros(self.shape[0], np.int64)
        size = _block_size(self.indices)
        for begin in range(0, int(self._indptr[-1]), size):
            rows = _read(self, self.indices, begin, min(begin + size, int(self._indptr[-1])))
            _check_range(self, rows, self.shape[0], begin, self._column_of, "row")
            per_row += np.bincount(rows, minlength=self.shape[0])
        return per_row

    def _scatter(self, runs: list[tuple[int, int]], files: list[Path], record: np.dtype) -> None:
        bounds = np.array([last for _, last in runs])
        size = _block_size(self.values)
        for begin in range(0, int(self._indptr[-1]), size):
            end = min(begin + size, int(self._indptr[-1]))
            items = np.empty(end - begin, record)
            rows = _read(self, self.indices, begin, end)
            items["value"] = _read(self, self.values, begin, end)
            items["column"] = np.searchsorted(self._indptr, np.arange(begin, end), side="right") - 1
            bucket = np.searchsorted(bounds, rows, side="right")
            items["row"] = rows - np.array([first for first, _ in runs])[bucket]
            order = np.argsort(bucket, kind="stable")
            items, bucket = items[order], bucket[order]
            edges = np.searchsorted(bucket, np.arange(len(runs) + 1))
            for i in np.flatnonzero(np.diff(edges)):
                # Opened per piece: there may be more buckets than a process may hold files.
                with open(files[i], "ab") as file:
                    file.write(items[edges[i] : edges[i + 1]].tobytes())

    def _column_of(self, element: int) -> str:
        return f"column {int(np.searchsorted(self._indptr, element, side='right')) - 1}"


@dataclass
class DenseMatrix:
    """A 2-D array of which everything that is not zero is stored (NaN is not zero)."""

    name: str
    shape: tuple[int, int]
    values: Sliceable

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.values.dtype)

    def blocks(self, scratch: Path) -> Iterator[CsrBlock]:
        """All rows in order; needs no temporary files."""
        del scratch
        n_rows, n_columns = self.shape
        step = self._rows_per_block()
        for first in range(0, n_rows, step):
            block = _read(self, self.values, first, min(first + step, n_rows))
            at = np.flatnonzero(block != 0)
            rows = at // n_columns
            indptr = np.searchsorted(rows, np.arange(len(block) + 1))
            yield CsrBlock(first, indptr, (at % n_columns).astype(np.uint32), block.reshape(-1)[at])

    def dense_blocks(self) -> Iterator[DenseBlock]:
        """All rows in order and in full."""
        step = self._rows_per_block()
        for first in range(0, self.shape[0], step):
            yield DenseBlock(first, _read(self, self.values, first, min(first + step, self.shape[0])))

    def _rows_per_block(self) -> int:
        width = max(1, self.shape[1])
        rows = max(1, BLOCK_VALUES // width)
        chunk_rows = _chunk_length(self.values)
        if chunk_rows * width <= _MAX_BLOCK_VALUES:
            # Whole chunks, so that none is decoded twice.
            return max(1, rows // chunk_rows) * chunk_rows
        return max(1, _MAX_BLOCK_VALUES // width)


def dense_blocks(matrix: Matrix, scratch: Path) -> Iterator[DenseBlock]:
    """All rows of any matrix in full, in order; values of a sparse one that share a place are added up."""
    if isinstance(matrix, DenseMatrix):
        yield from matrix.dense_blocks()
        return
    width = matrix.shape[1]
    step = max(1, BLOCK_VALUES // width)
    for block in matrix.blocks(scratch):
        for first in range(block.first_row, block.last_row, step):
            part = block.rows(first, min(first + step, block.last_row))
            rows = scipy.sparse.csr_array(
                (part.values, part.indices, part.indptr), shape=(len(part.indptr) - 1, width)
            )
            yield DenseBlock(first, rows.toarray())


def aligned(matrices: Sequence[Matrix], scratch: Path) -> Iterator[list[CsrBlock]]:
    """Several matrices of one shape side by side: blocks of the same rows, as stored elements.

    `scratch` is an existing folder for temporary files.
    """
    folders = [scratch / str(i) for i in range(len(matrices))]
    for folder in folders:
        folder.mkdir()
    yield from _in_step(
        [m.blocks(folder) for m, folder in zip(matrices, folders, strict=True)], CsrBlock.rows
    )


def aligned_dense(matrices: Sequence[Matrix], scratch: Path) -> Iterator[list[DenseBlock]]:
    """As :func:`aligned`, in full."""
    folders = [scratch / str(i) for i in range(len(matrices))]
    for folder in folders:
        folder.mkdir()
    streams = [dense_blocks(m, folder) for m, folder in zip(matrices, folders, strict=True)]
    yield from _in_step(streams, DenseBlock.rows)


def _in_step(streams: Sequence[Iterator[_B]], rows: Callable[[_B, int, int], _B]) -> Iterator[list[_B]]:
    blocks = [next(stream) for stream in streams]
    while True:
        first, last = blocks[0].first_row, min(block.last_row for block in blocks)
        yield [rows(block, first, last) if block.last_row > last else block for block in blocks]
        rest = []
        for block, stream in zip(blocks, streams, strict=True):
            left = rows(block, last, block.last_row) if block.last_row > last else next(stream, None)
            if left is None:
                return
            rest.append(left)
        blocks = rest


@runtime_checkable
class _InChunks(Protocol):
    """An array of h5py, which may have chunks, or one of ours."""

    @property
    def chunks(self) -> tuple[int, ...] | None: ...


def _chunk_length(values: Sliceable) -> int:
    """Length of a chunk on the first axis; 1 for arrays without chunks."""
    return (values.chunks or (1,))[0] if isinstance(values, _InChunks) else 1


def _block_size(values: Sliceable) -> int:
    return min(max(BLOCK_VALUES, _chunk_length(values)), _MAX_BLOCK_VALUES)


def row_runs(indptr: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive [first, last) with at most `size` elements each, or one row that has more."""
    n_rows = len(indptr) - 1
    first = 0
    while first < n_rows:
        last = int(np.searchsorted(indptr, indptr[first] + size, side="right")) - 1
        last = min(max(last, first + 1), n_rows)
        yield first, last
        first = last


def _checked_indptr(matrix: CsrMatrix | CscMatrix, n_major: int, axis: str) -> np.ndarray:
    n_values, n_indices = matrix.values.shape[0], matrix.indices.shape[0]
    if matrix.indices.dtype.kind not in "iu" or matrix.indptr.dtype.kind not in "iu":
        raise InvalidDataError(
            f"{matrix.name}: indices and indptr must be integers, found {matrix.indices.dtype} and "
            f"{matrix.indptr.dtype}; the matrix is damaged, write the file anew"
        )
    indptr: np.ndarray = matrix.indptr[:].astype(np.int64)
    if len(indptr) != n_major + 1:
        raise InvalidDataError(
            f"{matrix.name}: indptr has {len(indptr)} entries, {n_major} {axis}s need {n_major + 1}; "
            "the matrix is damaged, write the file anew"
        )
    falling = np.flatnonzero(np.diff(indptr) < 0)
    if indptr[0] != 0 or falling.size or indptr[-1] != n_values or n_values != n_indices:
        where = (
            f"decreases at {axis} {int(falling[0])}"
            if falling.size
            else f"runs from {indptr[0]} to {indptr[-1]}"
        )
        raise InvalidDataError(
            f"{matrix.name}: indptr {where}, but must rise from 0 to the number of stored values "
            f"({n_values} values, {n_indices} indices); the matrix is damaged, write the file anew"
        )
    return indptr


def _check_range(
    matrix: Matrix, numbers: np.ndarray, limit: int, begin: int, where: Callable[[int], str], axis: str
) -> None:
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= limit):
        at = int(np.flatnonzero((numbers < 0) | (numbers >= limit))[0])
        raise InvalidDataError(
            f"{matrix.name}: {where(begin + at)} names {axis} {int(numbers[at])}, but the matrix has {limit} "
            f"{axis}s; the matrix is damaged, write the file anew"
        )


def _read(matrix: Matrix, array: Sliceable, begin: int, end: int) -> np.ndarray:
    try:
        return np.asarray(array[begin:end])
    except (OSError, RuntimeError) as error:  # h5py raises either for truncated or damaged chunks
        raise InvalidDataError(
            f"{matrix.name}: cannot read elements {begin} to {end}: {error}; the file is truncated or damaged"
        ) from error
